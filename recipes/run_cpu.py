"""Runs the CPU variants of recipes and fills the tables in their READMEs: ``python recipes/run_cpu.py llava flamingo``, without names all.

The rows are the ones of the README's table that begin with a TOML file; what they start from (``run.init_from``) is run before them. A run that
is complete is not run again, one that was interrupted goes on. Run directories are relative to the working directory, as always.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from kempnerforge.checkpoint import CheckpointError, resolve, tensor_info
from kempnerforge.checkpoint.state import MODEL
from kempnerforge.config import load_config

HERE = Path(__file__).parent
ROW = re.compile(r"^\| `([^`]+\.toml)` \|")
RESULTS = 4
"""Cells at the end of a row that are results: trained parameters, exact match, the same with blank images, minutes of training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="folders of recipes/ (default: all that have rows)")
    parser.add_argument("--write", action="store_true", help="put the results into the READMEs; otherwise they are printed")
    parser.add_argument("--list", action="store_true", help="print the runs in their order and stop")
    args = parser.parse_args()
    readmes = [HERE / name / "README.md" for name in args.recipes] or sorted(HERE.glob("*/README.md"))
    if missing := [str(readme) for readme in readmes if not readme.is_file()]:
        parser.error(f"no such recipe: {', '.join(missing)}")
    tables = {readme: found for readme in readmes if (found := rows(readme))}
    order = in_order([config for found in tables.values() for config in found])
    if args.list:
        print(*(config.relative_to(HERE) for config in order), sep="\n")
        return 0
    for number, config in enumerate(order, 1):
        print(f"== {number}/{len(order)} {config.relative_to(HERE)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "kempnerforge", "train", str(config)]).returncode
        if code:
            return code
    for readme in tables:
        text = filled(readme)
        if args.write:
            readme.write_text(text, encoding="utf-8")
        else:
            print(f"\n{readme.relative_to(HERE)}", *(line for line in text.splitlines() if ROW.match(line)), sep="\n")
    return 0


def rows(readme: Path) -> list[Path]:
    """The CPU variants in the tables of ``readme``."""
    found = [match[1] for line in readme.read_text(encoding="utf-8").splitlines() if (match := ROW.match(line))]
    return [(readme.parent / name).resolve() for name in found if Path(name).name.startswith("cpu-")]


def in_order(configs: list[Path]) -> list[Path]:
    """``configs`` and all that they start from, each once and after what it starts from."""
    makers = {load_config(path).run.dir: path.resolve() for path in sorted(HERE.glob("*/cpu-*.toml"))}
    order: list[Path] = []

    def add(config: Path) -> None:
        if before := makers.get(load_config(config).run.init_from):
            add(before)
        if config not in order:
            order.append(config)

    for config in configs:
        add(config)
    return order


def filled(readme: Path) -> str:
    """The text of ``readme`` with the results of the runs that are there."""
    lines = []
    for line in readme.read_text(encoding="utf-8").splitlines():
        match = ROW.match(line)
        if match and Path(match[1]).name.startswith("cpu-") and (found := results(readme.parent / match[1])):
            cells = line.strip("| ").split(" | ")
            line = f"| {' | '.join([*cells[:-RESULTS], *found])} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def results(config: Path) -> list[str]:
    """The last cells of a row; nothing if the run is not complete."""
    run_dir = Path(load_config(config).run.dir)
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        trained = trained_parameters(run_dir)
    except (OSError, CheckpointError):
        return []
    shares = [f"{100 * summary[key]:.2f} %" if key in summary else "-" for key in ("exact_match", "exact_match_blind")]
    return [f"{trained:,}", *shares, f"{summary['train_s'] / 60:.1f}"]


def trained_parameters(run_dir: Path) -> int:
    """Parameters that the last stage trained.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    checkpoint = resolve(run_dir)
    frozen = set(json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["state"]["frozen"])
    shapes = {name.removeprefix(MODEL): shape for name, (shape, _) in tensor_info(checkpoint).items() if name.startswith(MODEL)}
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in frozen)


if __name__ == "__main__":
    sys.exit(main())
