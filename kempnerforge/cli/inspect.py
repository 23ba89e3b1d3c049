"""``kempnerforge inspect``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kempnerforge.config import load_config

HELP = """Look at what the model would really be trained on.

Takes real training batches of each stage, prints them as text with every trained token marked (from the labels, not from the template),
names whatever is wrong with them, and draws their images on a contact sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the TOML file")
    parser.add_argument("-n", type=int, default=4, help="samples of each stage (default: 4)")
    parser.add_argument("--step", type=int, default=0, help="from this step of the stage on (default: 0)")
    parser.add_argument("--out", type=Path, help="directory for contact-sheet-STAGE.png (default: run.dir/inspect)")


def run(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    from kempnerforge.training.inspection import inspect_stages

    findings = 0
    for stage in inspect_stages(job, args.n, args.step, args.out or Path(job.run.dir) / "inspect", color=sys.stdout.isatty()):
        print(f"== stage {stage.name}: {stage.summary}")
        for row in stage.rows:
            print(row)
        if stage.sheet is not None:
            print(f"images: {stage.sheet}")
        for sample, reason in stage.skipped:
            print(f"skipped: {sample}: {reason}")
        for finding in stage.findings:
            print(f"WRONG: {finding}")
        findings += len(stage.findings)
    return 2 if findings else 0
