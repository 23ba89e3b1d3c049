"""``kempnerforge eval``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kempnerforge.cli.numbers import whole
from kempnerforge.util.errors import InputError, visible
from kempnerforge.util.reading import irregular

HELP = """Evaluate a checkpoint on its held-out split: generated exact match, with the images and blind.

Takes a checkpoint directory or a run directory (its newest checkpoint). --data.* keys change what it is evaluated on. With the scores
come three counts: questions that were asked, that could not be read, and whose true answer takes more tokens than eval.max_new_tokens.
--predictions writes each question and its answers, one JSON object a line, from which every number can be counted again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint or run directory")
    parser.add_argument("--limit", type=whole(0), default=0, metavar="N", help="ask N questions, drawn by train.seed (default: all)")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write every question and its answers, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from kempnerforge.eval.predictions import require_replaceable
    from kempnerforge.inference.model import TrainedModel
    from kempnerforge.util.files import why_not_writable

    if args.predictions is not None and (kind := irregular(args.predictions)):
        raise InputError(f"--predictions {args.predictions}: is {kind}; name a file")
    if args.predictions is not None and (reason := why_not_writable(args.predictions.parent)):
        raise InputError(f"--predictions {args.predictions}: cannot be written: {reason}")
    if args.predictions is not None:
        require_replaceable(args.predictions)
    found = TrainedModel.restore(args.checkpoint, args.overrides).evaluate(args.limit, args.predictions)
    for line in found.remarks:
        print(f"warning: {visible(line)}", file=sys.stderr)
    if args.json:
        held_out = found.held_out.counts() if found.held_out else None
        print(json.dumps(found.values | {"by_answer": found.by_answer, "held_out": held_out}))
        return 0
    for truth, (right, total) in sorted(found.by_answer.items(), key=lambda row: -row[1][1]):
        print(f"  {visible(truth):24s} {right:6d} / {total:<6d} {right / total:7.2%}", file=sys.stderr)
    for key, value in found.values.items():
        print(f"{key:24s} {value:.4f}" if isinstance(value, float) else f"{key:24s} {value}")
    return 0
