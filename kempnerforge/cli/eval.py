"""``kempnerforge eval``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kempnerforge.config.errors import visible

HELP = """Evaluate a checkpoint on its held-out split: generated exact match, with the images and blind.

Takes a checkpoint directory or a run directory (its newest checkpoint). --data.* keys change what it is evaluated on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="ask N questions, spread over the split (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.training.evaluate import evaluate_checkpoint

    values, by_answer = evaluate_checkpoint(args.checkpoint, args.overrides, args.limit)
    if args.json:
        print(json.dumps(values | {"by_answer": by_answer}))
        return 0
    for truth, (right, total) in sorted(by_answer.items(), key=lambda row: -row[1][1]):
        print(f"  {visible(truth):24s} {right:6d} / {total:<6d} {right / total:7.2%}", file=sys.stderr)
    for key, value in values.items():
        print(f"{key:24s} {value:.4f}" if isinstance(value, float) else f"{key:24s} {value}")
    return 0
