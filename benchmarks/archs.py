"""Trains the quickstart with every architecture, one after the other, and prints the comparison as a Markdown table.

Usage: python benchmarks/archs.py OUT_DIR [CONFIG ...] [--section.key=value ...]

Same data in the same order, same stages, same text backbone at step 0. A run that is complete is not run again. FLOPs are those of one
training sample, forward and backward, in each stage, as ``kempnerforge check`` counts them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONFIGS = [
    "configs/quickstart.toml",
    "configs/quickstart-cross_attention.toml",
    "configs/quickstart-mot.toml",
    "configs/quickstart-moma.toml",
    "recipes/plugin-arch/quickstart.toml",
]


def run(*argv: str) -> str:
    return subprocess.run([sys.executable, "-m", "kempnerforge", *argv], check=True, stdout=subprocess.PIPE, text=True).stdout


def row(config: str, out: Path, overrides: list[str]) -> str:
    name = "early_fusion" if "plugin" in config else Path(config).stem
    run_dir = out / name
    run("train", config, f"--run.dir={run_dir}", *overrides)
    found = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    stages = json.loads(run("check", config, "--json", *overrides))["stages"]
    flops = " / ".join(f"{stage['flops_per_sample'] / 1e6:.0f}" for stage in stages)
    accuracy, blind = (f"{100 * found[key]:.2f} %" for key in ("exact_match", "exact_match_blind"))
    return f"| `{found['arch']}` | {found['parameters']:,} | {flops} | {accuracy} | {blind} | {found['train_s']:.0f} s |"


def main() -> None:
    overrides = [word for word in sys.argv[2:] if word.startswith("--")]
    configs = [word for word in sys.argv[2:] if not word.startswith("--")]
    print(
        "| arch | parameters | MFLOP a sample, captions / questions | exact match | image blanked | training |\n|---|---|---|---|---|---|"
    )
    for config in configs or CONFIGS:
        print(row(config, Path(sys.argv[1]), overrides), flush=True)


if __name__ == "__main__":
    main()
