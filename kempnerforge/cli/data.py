"""``kempnerforge data``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.cli.numbers import whole
from kempnerforge.config import load_config
from kempnerforge.util.errors import InputError, visible
from kempnerforge.util.process import exact

if TYPE_CHECKING:
    from kempnerforge.inspection.data_check import Checked, Leak
    from kempnerforge.util.screen import Screen

HELP = """Check whole data sources before training, fetch one, or write what is held out for lm-eval.

"check" reads every sample of every stage, and what is held out: which cannot be used and why, how long texts and rows are, how much of the
rows each batching mode would waste, which limits fit, and whether held-out images are in the training data. "fetch" gets a source that is
not part of the package. "lm-eval" makes a task of the held-out questions. See "data check --help" and so on."""

CHECK_HELP = """Read every sample of every stage of a config, and what is held out.

Decodes each image. Lists all samples that cannot be used in bad_samples.jsonl and all held-out ones that training has seen (the same image,
question about it, or id) in leaks.jsonl, and draws index.html, all in run.dir/data-check. The
recommended limits leave 99.5 percent of the samples whole. Exit code 2 says that more samples are unusable than data.max_bad_fraction
allows, of those to train on or of those held out."""

FETCH_HELP = """Get the files of a source that is not part of the package, through the system's package client.

Prints where they are."""

LM_EVAL_HELP = """Write the held-out questions of a config, or of a run, as a task that lm-eval scores any model on.

Puts a Parquet file of images, questions and answers, the task kempnerforge_vqa and its functions into a directory, which may be moved. An
exported model is scored on it by

  lm-eval run --model hf-multimodal --model_args pretrained=EXPORT --apply_chat_template --include_path OUT --tasks kempnerforge_vqa

with the accuracy of "kempnerforge eval". pip install "kempnerforge[lm-eval]" gets lm-eval; this command does without."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    check = actions.add_parser("check", help=CHECK_HELP.splitlines()[0], description=CHECK_HELP, allow_abbrev=False, formatter_class=raw)
    check.add_argument("config", type=Path, help="the TOML file")
    check.add_argument(
        "--workers", type=whole(1, 1024), default=os.cpu_count() or 1, metavar="N", help="processes that read (default: one a core)"
    )
    check.add_argument(
        "--limit",
        type=whole(0),
        default=0,
        metavar="N",
        help="read only N samples of each source, drawn by train.seed (of a stream the first ones)",
    )
    check.add_argument("--no-images", action="store_true", help="decode no images, and do not compare them")
    check.add_argument("--out", type=Path, help="directory for index.html and bad_samples.jsonl (default: run.dir/data-check)")
    check.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the text")
    fetch = actions.add_parser("fetch", help=FETCH_HELP.splitlines()[0], description=FETCH_HELP, allow_abbrev=False, formatter_class=raw)
    fetch.add_argument("name", help="which source")
    fetch.add_argument("--root", type=Path, default=Path("data"), help="directory that its files go below (default: data)")
    task = actions.add_parser(
        "lm-eval", help=LM_EVAL_HELP.splitlines()[0], description=LM_EVAL_HELP, allow_abbrev=False, formatter_class=raw
    )
    task.add_argument("config", type=Path, help="the TOML file, or a run directory")
    task.add_argument("out", type=Path, help="directory to write")
    task.add_argument("--limit", type=whole(0), default=0, metavar="N", help="write N questions, drawn by train.seed (default: all)")


def run(args: argparse.Namespace) -> int:
    return {"check": _check, "fetch": _fetch, "lm-eval": _lm_eval}[args.action](args)


def _fetch(args: argparse.Namespace) -> int:
    if args.overrides:
        raise InputError(f"data fetch: {' '.join(args.overrides)}: not understood")
    from kempnerforge.data.collections.fetch import fetch

    print(fetch(args.name, args.root, lambda line: print(line, file=sys.stderr)), file=exact(sys.stdout))
    return 0


def _lm_eval(args: argparse.Namespace) -> int:
    config = args.config / "config.toml" if args.config.is_dir() else args.config
    job = load_config(config, args.overrides)
    from kempnerforge.cli.progress import reporting
    from kempnerforge.eval.lm_eval_task import TASK, write_task
    from kempnerforge.training.setup import assemble
    from kempnerforge.training.tokenizer import saved_tokenizer

    tokenizer = saved_tokenizer(args.config) if args.config.is_dir() else None
    assembly = assemble(job, tokenizer, device="meta", data=tokenizer is None)
    assembly.data.read_held_out()
    if (source := assembly.data.held_out) is None:
        raise InputError(f"data.eval_path = '': {config} names no held-out data")
    with reporting(sys.stderr) as progress:
        written = write_task(source, assembly.data.encoder(assembly.stages[-1]), args.out, assembly.job.eval, args.limit, progress)
    for line in written.held_out.remarks():
        print(f"warning: {visible(line)}", file=sys.stderr)
    for sample, reason in written.left_out[:5]:
        print(f"left out: {visible(sample)}: {visible(reason)}", file=sys.stderr)
    counts = (
        f"{written.questions:,} questions, {len(written.left_out):,} left out, {written.too_long:,} with answers too long to be written"
    )
    print(f"{written.path}: task {TASK}, {counts}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> int:
    job = load_config(args.config, args.overrides)
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from kempnerforge.inspection.data_check import check_data, write_bad_samples, write_leaks
    from kempnerforge.inspection.data_page import write_data_page
    from kempnerforge.util.screen import Screen, TaskText, bars

    out = args.out or Path(job.run.dir) / "data-check"
    columns = TaskText("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with bars(Screen(sys.stderr), *columns, transient=True) as progress:

        def begin(name: str, samples: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=samples)
            return lambda more: progress.advance(task, more)

        checked, leaks = check_data(job, args.workers, args.limit, not args.no_images, begin)
    page = write_data_page(out / "index.html", Path(job.run.dir).name, checked, leaks)
    bad = write_bad_samples(out / "bad_samples.jsonl", checked)
    listed = write_leaks(out / "leaks.jsonl", leaks)
    if args.json:
        images = [{"stages": leak.stages, "images": leak.count, "first": leak.pairs[:5]} for leak in leaks if leak.kind == "image"]
        found = {"page": str(page), "bad_samples": str(bad), "leaks": str(listed), "sources": [one.as_json() for one in checked]}
        shared = [{"stages": leak.stages, "kind": leak.kind, "samples": len(leak.pairs)} for leak in leaks]
        print(json.dumps(found | {"shared_images": images, "shared": shared}))
    else:
        _show(Screen(sys.stdout, width=100, soft_wrap=True), checked, leaks)
        print(f"page: {page}\nbad samples: {bad}\nheld-out samples that training has seen: {listed}")
    return 0 if all(one.usable for one in checked) else 2


def _show(console: Screen, checked: list[Checked], leaks: list[Leak]) -> None:
    for one in checked:
        _show_source(console, one)
        for line in one.remarks:
            print(f"warning: {visible(line)}", file=sys.stderr)
    for leak in leaks:
        print(f"warning: {leak.warning}:", file=sys.stderr)
        for trained, held_out in leak.pairs[:5]:
            print(f"  {visible(trained)} and {visible(held_out)}", file=sys.stderr)


def _show_source(console: Screen, one: Checked) -> None:
    from rich.table import Table

    from kempnerforge.inspection.check_facts import COVERED, MULTIPLE, histogram
    from kempnerforge.report.histogram import bar_lines

    facts = one.as_json()
    totals = facts["totals"]
    console.print(f"== {visible(one.name)}: {facts['read']:,} of {one.total:,} samples read", style="bold")
    counts = ", ".join(f"{totals[key]:,} {key}" for key in ("texts", "images", "views"))
    console.print(f"{counts}; {one.found.distinct_images:,} images of different content")
    for part in one.parts if len(one.parts) > 1 else []:
        console.print(f"source {part.name}: {part.samples:,} samples, {part.totals['texts']:,} texts, {part.bad:,} unusable")
    kinds = "".join(f", {kind} {number:,}" for kind, number in one.kinds.items())
    if one.found.bad:
        console.print(f"unusable: {facts['bad']:,}{kinds} ({one.bad_fraction:.2%}, data.max_bad_fraction = {one.max_bad_fraction:.2%})")
    for line in one.found.remarks.lines():
        console.print(f"note: {visible(line)}")
    for bad in one.found.bad[:5]:
        console.print(f"  {bad.kind}: {visible(bad.reason)}")
    if one.held_out is not None:
        console.print(one.held_out.summary())
    if not len(one.lengths("positions")):
        return
    console.print("text tokens of a sample:")
    for line in bar_lines(*histogram(one.lengths("text_tokens"), 12)):
        console.print(f"  {line}")
    if not one.modes:
        return
    for name, limits in (("limits of the job", one.now), ("recommended", one.advice)):
        console.print(
            f"{name}: vlm.max_text_len = {limits.max_text_len}, train.seq_len = {limits.seq_len}:"
            f" {limits.too_long:,} samples too long, {limits.shortened:,} with texts left out"
        )
    console.print(f"  (leaves {COVERED:g} % of the samples whole, rounded up to a multiple of {MULTIPLE}; packed rows may be longer)")
    table = Table()
    for column in ("batching", "useful", "trained", "positions a row", "samples a row"):
        table.add_column(column, justify="left" if column == "batching" else "right")
    for mode in one.modes:
        name = f"{mode.name} (the job's)" if mode.mode == one.batching and mode.seq_len in (0, one.now.seq_len) else mode.name
        table.add_row(name, f"{mode.useful:.1%}", f"{mode.trained:.1%}", f"{mode.row_length:,.1f}", f"{mode.samples_per_row:,.1f}")
    console.print(table)
