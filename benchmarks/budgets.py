"""What the cells of a study were asked to use and what they used, for each quantity that can be matched; and whether rows saw the same samples.

Usage: python benchmarks/budgets.py OUT_DIR [QUANTITY ...]

Runs recipes/studies/smoke.toml with one seed, one trial a row and few steps, once for each quantity (all, unless some are named). Prints a table
in Markdown. Exit code 1 if a cell is off by more than 1 %, or two rows of a seed did not see the same samples.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from kempnerforge.study.budget import TOLERANCE
from kempnerforge.study.config import QUANTITIES, load_study
from kempnerforge.study.findings import find

STUDY = Path(__file__).parents[1] / "recipes" / "studies" / "smoke.toml"
BY = {"params": ("--study.match.by=model.ffn_dim", "--study.match.multiple_of=4", "--study.match.amount=530000")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("quantities", nargs="*", default=QUANTITIES)
    args = parser.parse_args()
    out: Path = args.out.resolve()
    wrong = 0
    print("| matched | row | asked | used | off | samples, digest of their ids |\n|---|---|---|---|---|---|")
    for quantity in args.quantities:
        words = [
            *(f"--study.dir={out / quantity}", f"--study.match.quantity={quantity}", "--study.seeds=[0]", "--study.tune.trials=1"),
            *("--train.max_steps=60", "--eval.interval=0", "--eval.samples=16", "--study.jobs=1", *BY.get(quantity, ())),
        ]
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"{quantity}.log").open("w") as log:
            subprocess.run([sys.executable, "-m", "kempnerforge", "study", "run", str(STUDY), *words], check=True, stdout=log, stderr=log)
        found = find(load_study(STUDY, words))
        for planned in found.rows:
            assert planned.asked, "something is matched"
            for cell in found.by_row[planned.row.name]:
                used, samples = found.realised(planned, cell), found.samples[cell.seed]
                off = used / planned.asked - 1
                wrong += abs(off) > TOLERANCE or not samples.same
                digest = samples.digests[planned.row.name]
                print(
                    f"| {quantity} | {planned.row.name} | {planned.asked:,.6g} | {used:,.6g} | {100 * off:+.2f} % | {samples.compared}, {digest[:12]} |"
                )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
