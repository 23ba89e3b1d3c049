"""``kempnerforge inspect``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.numbers import whole
from kempnerforge.config import load_config
from kempnerforge.util.errors import visible
from kempnerforge.util.process import exact

if TYPE_CHECKING:
    from kempnerforge.inspection.rows_page import Inspection

HELP = """Look at what the model would really be trained on.

Takes real training batches of each stage, prints them as text with every trained token marked (from the labels, not from the template),
and names all that is wrong with them. The page index.html shows the same with the images as the model gets them, each token with its
column and id, positions and samples of each row, what was left out and why. Exit code 2 says that something is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the TOML file")
    parser.add_argument("-n", type=whole(1), default=4, help="samples of each stage, and in a mixture of each source (default: 4)")
    parser.add_argument("--step", type=whole(0), default=0, help="from this step of the stage on (default: 0)")
    parser.add_argument("--out", type=Path, help="directory for index.html and contact-sheet-STAGE.png (default: run.dir/inspect)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")


def run(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    from kempnerforge.inspection.rows_page import inspect_stages, write_inspection

    out = args.out or Path(job.run.dir) / "inspect"
    stages = []
    for stage in inspect_stages(job, args.n, args.step, out, color=sys.stdout.isatty() and not args.json):
        stages.append(stage)
        if not args.json:
            _show(stage)
    page = write_inspection(out / "index.html", Path(job.run.dir).name, stages)
    if args.json:
        print(json.dumps({"page": str(page), "stages": [stage.as_json() for stage in stages]}))
    else:
        print(f"page: {page}")
    return 2 if any(stage.findings for stage in stages) else 0


def _show(stage: Inspection) -> None:
    print(f"== stage {stage.name}: {stage.summary}")
    if len(stage.sources) > 1:
        for name, part in zip(stage.sources, stage.parts, strict=True):
            print(f"source {name}: {part['samples']:,} samples, {part['texts']:,} texts, {part['trained']:,} tokens trained")
    for note in stage.notes:
        print(f"note: {visible(note)}")
    for row in stage.rows:
        print(row, file=exact(sys.stdout))  # with colours, where a terminal has them
    if stage.sheet is not None:
        print(f"images: {stage.sheet}")
    for sample, reason in stage.skipped:
        print(f"skipped: {visible(sample)}: {visible(reason)}")
    if stage.texts_left_out:
        print(f"left out: {stage.texts_left_out:,} texts that did not fit into their rows")
    for finding in stage.findings:
        print(f"WRONG: {finding}")
