"""``kempnerforge train``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from kempnerforge.cli.numbers import whole
from kempnerforge.config import load_config, to_toml
from kempnerforge.util.process import INTERRUPTED

MOST_PROCESSES = 1024
"""On one machine."""
HELP = """Train what a TOML file describes, with evaluation, checkpoints and a report.

The run's directory (run.dir) gets config.toml, checkpoints/, metrics.jsonl, events/ and report.html. The same command continues a run
that was stopped, bitwise as if it had not been; --fresh moves it aside first. Under torchrun, or with --nproc, all processes train one
model; the batch size does not depend on how many there are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the TOML file")
    parser.add_argument("--fresh", action="store_true", help="move an existing run aside and start over; nothing is deleted")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="a key or section that is meant to differ from the run that is there",
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, take one batch through the model, write nothing")
    parser.add_argument("--print-config", action="store_true", help="print the resolved TOML and exit")
    parser.add_argument(
        "--nproc", type=whole(1, MOST_PROCESSES), default=1, metavar="N", help="start N processes on this machine (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_toml(job), end="")
        return 0
    if args.nproc > 1 and "RANK" not in os.environ:
        from kempnerforge.distributed.launch import launch

        return launch(args.argv, args.nproc)
    if args.dry_run:
        from kempnerforge.inspection.plan import dry_run

        for line in dry_run(job):
            print(line, file=sys.stderr)
        return 0
    from kempnerforge.checkpoint.store import newest_step
    from kempnerforge.training.hooks.signals import asked_by
    from kempnerforge.training.run import train

    try:
        if train(job, fresh=args.fresh, allow=args.allow_change, ends_process=True):
            return 0
        message = f"interrupted: step {newest_step(Path(job.run.dir) / 'checkpoints')} is saved"
    except KeyboardInterrupt as error:
        message = str(error) or "interrupted before the first step"
    message = f"{message}; the same command continues" if os.environ.get("RANK", "0") == "0" else ""  # one of the ranks says it
    if signal.SIGINT in asked_by or not asked_by:
        raise KeyboardInterrupt(message)
    if message:
        print(message, file=sys.stderr)
    return INTERRUPTED
