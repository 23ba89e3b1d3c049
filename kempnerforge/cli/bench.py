"""``kempnerforge bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.numbers import real, whole
from kempnerforge.config import load_config
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import why_not_writable
from kempnerforge.util.reading import irregular

if TYPE_CHECKING:
    from kempnerforge.inspection.bench import Bench

HELP = """Measure what a step of training costs, and where its time goes.

Trains some steps of a stage without a run directory: some to warm up, then timed as they are, then with a stopwatch between phases, then
under torch's profiler. FLOPs are counted, of forward and backward, the vision tower included. MFU = FLOPs a second / peak, where the peak
is given, or the rate of the fastest matrix products that are measured in the same process. "products alone" is the rate that this machine
reaches on the matrix products of a step, run one after the other without anything else: no step can be faster."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="the TOML file")
    parser.add_argument("--stage", default="", metavar="NAME", help="which stage (default: the first)")
    parser.add_argument("--steps", type=whole(2, 10_000), default=20, metavar="N", help="steps in each series (default: 20)")
    parser.add_argument("--warmup", type=whole(0, 10_000), default=5, metavar="N", help="steps before (default: 5)")
    parser.add_argument(
        "--peak-tflops", type=real(1e-6), default=0.0, metavar="X", help="peak of one device (default: metrics.peak_tflops, or measured)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace of two steps, for Perfetto or chrome://tracing")
    parser.add_argument(
        "--against", choices=("transformers",), help="beside it, in turns, a plain loop around the class of transformers that the model is"
    )
    parser.add_argument(
        "--pad-to", type=whole(0), default=0, metavar="N", help="of --against: positions of its rows (default: the longest)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the tables")


def run(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    from kempnerforge.inspection.bench import bench

    if args.pad_to and not args.against:
        raise InputError("--pad-to: only --against reads it")
    if args.trace is not None and (kind := irregular(args.trace)):
        raise InputError(f"--trace {args.trace}: is {kind}; name a file")
    if args.trace is not None and (reason := why_not_writable(args.trace.parent)):
        raise InputError(f"--trace {args.trace}: cannot be written: {reason}")
    against = args.pad_to if args.against else None
    found = bench(job, args.stage, warmup=args.warmup, steps=args.steps, peak_tflops=args.peak_tflops, trace=args.trace, against=against)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        _show(found)
    return 0


def _show(found: Bench) -> None:
    from rich.table import Table

    from kempnerforge.util.screen import Screen

    facts, console = found.to_json(), Screen(sys.stdout, width=100)
    low, high = facts["step_quartiles_s"]
    lines = (
        f"stage {found.stage}: {found.device}, {found.dtype}, {found.processes} process{'es' if found.processes > 1 else ''}",
        f"step: {1e3 * found.median:,.1f} ms (median of {len(found.seconds)}; quartiles {1e3 * low:,.1f} to {1e3 * high:,.1f})",
        f"speed: {facts['samples_per_s']:,.1f} samples/s, {facts['tokens_per_s']:,.0f} useful tokens/s, {facts['images_per_s']:,.1f} images/s",
        f"work: {found.flops / 1e9:,.2f} GFLOP a step, {found.rate / 1e9:,.1f} GFLOP/s a process",
        f"MFU: {found.mfu:.1%} of {found.peak_rate / 1e9:,.0f} GFLOP/s ({found.peak_from})",
        f"products alone: {found.products_rate / 1e9:,.1f} GFLOP/s; the step reaches {facts['share_of_products']:.2f} of it",
        f"memory: {found.memory_gib:,.2f} GiB at most; waiting for data: {found.data_share:.1%} of a step",
    )
    for line in lines:
        console.print(line)
    if (peer := facts.get("peer")) is not None:
        console.print(
            f"against {peer['name']} in a plain loop: {peer['our_samples_per_s']:,.1f} samples/s to {peer['samples_per_s']:,.1f}, "
            f"{peer['samples_ratio']:.2f} times; useful tokens {peer['tokens_ratio']:.2f} times"
        )
    for title, seconds in (("phase of a step", found.phases), ("kind of operator, by the profiler", found.kinds)):
        table, total = Table(), sum(seconds.values())
        table.add_column(title)
        table.add_column("ms a step", justify="right")
        table.add_column("share", justify="right")
        for name, value in seconds.items():
            table.add_row(name, f"{1e3 * value:,.1f}", f"{value / total:.1%}")
        console.print(table)
