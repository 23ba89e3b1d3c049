"""All measurements of speed and of how cost grows, by name: each is a claim, the commands that show it, and a table.

Every cell of a table is a process of its own, ``kempnerforge bench CONFIG --json`` unless the measurement says otherwise; the cells of a
measurement run one after the other, ``--repeats`` times through, and the table has medians. Where a peer is named, its steps and ours are
taken in turns in one process.

Usage: python benchmarks/run.py OUT_DIR [NAME ...] [--repeats 3] [--steps 10] [--list]

OUT_DIR gets NAME.json (everything that the commands have said, with machine, versions and commit) and results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

PROBE = "configs/data/probe.toml"
ONE_KIND = ("--train.batch_size=16", "--data.skills=['counting']", "--data.samples=2000")
TILES = (
    "--data.images.fit=tiles",
    "--data.images.tiling=overlap",
    "--data.picture_size=128",
    "--model.max_seq_len=512",
    "--train.seq_len=512",
)
TEXT = ("configs/text.toml", "--model.dim=256", "--model.n_layers=6", "--model.n_heads=8", "--model.n_kv_heads=8", "--train.batch_size=16")
PACKED = ("--train.batch_size=4", "--train.seq_len=512", "--model.max_seq_len=512")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One table.

    Attributes:
        claim: what it shows.
        cells: by the first column of the table: config and overrides of a command.
        columns: by heading: what is shown of a cell, given its facts and those of the first cell.
        measure: runs a cell.
    """

    claim: str
    cells: dict[str, Sequence[str]]
    columns: dict[str, Callable[[Facts, Facts], str]]
    measure: Callable[[Sequence[str], argparse.Namespace], Facts]


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kempnerforge", *argv], check=True, stdout=subprocess.PIPE, text=True)


def bench(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """What ``kempnerforge bench`` says."""
    return json.loads(command("bench", *cell, "--json", f"--steps={args.steps}").stdout)


def start_up(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """Seconds of a command."""
    begin = time.perf_counter()
    command(*cell)
    return {"step_s": time.perf_counter() - begin}


def written(out: Path, rows: int, longest: int) -> list[str]:
    """Overrides for a JSONL file of ``rows`` prompts and answers of words, at most ``longest``, most of them much shorter."""
    path = out / "rows" / f"{rows}-{longest}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path.parent / "a.png")  # a text model does not look at it
        draw = random.Random(0)
        with path.open("w") as file:
            for number in range(rows):
                words = [f"word{draw.randrange(300)}" for _ in range(min(longest, 1 + int(draw.lognormvariate(2.2, 1.0))))]
                file.write(json.dumps({"image": "a.png", "prompt": f"what is {number}?", "answer": " ".join(words)}) + "\n")
    return ["--data.source=jsonl", f"--data.path={path}", "--data.max_bad_fraction=0.05"]  # a few are longer than a row


def bench_captions(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """What ``kempnerforge bench`` says of texts of very different lengths."""
    return bench([*TEXT, *written(args.out, 4000, 200), *cell], args)


def against_trainer(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """As ``bench_captions``, beside ``benchmarks/hf_trainer.py`` on the same texts."""
    words, script = [*TEXT, *written(args.out, 4000, 200), *cell], Path(__file__).with_name("hf_trainer.py")
    ours, theirs = bench(words, args), [sys.executable, str(script), *TEXT, *written(args.out, 4000, 200), f"--steps={args.steps}"]
    said = subprocess.run(theirs, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    peer = json.loads(said)
    return {**ours, "peer": {**peer, "tokens_ratio": ours["tokens_per_s"] / peer["tokens_per_s"]}}


def head_and_loss(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """What ``benchmarks/logits.py`` says."""
    script = Path(__file__).with_name("logits.py")
    return json.loads(subprocess.run([sys.executable, str(script), *cell], check=True, stdout=subprocess.PIPE, text=True).stdout)


def first_step(cell: Sequence[str], args: argparse.Namespace) -> Facts:
    """Seconds and memory until the first batch of so many rows is there, in a new process, with a tokenizer of few of them."""
    tokenizer = args.out / "rows" / "run" / "tokenizer"
    if not tokenizer.exists():
        words = [*written(args.out, 1000, 5), f"--run.dir={tokenizer.parent}", "--train.max_steps=1", "--eval.at_end=false"]
        command("train", *TEXT, *words)
    words = [*TEXT, *written(args.out, int(cell[0]), 5), f"--data.tokenizer={tokenizer}"]
    return json.loads(subprocess.run([sys.executable, "-c", FIRST, *words], check=True, stdout=subprocess.PIPE, text=True).stdout)


FIRST = """
import json, resource, sys, time
from kempnerforge.config import load_config
from kempnerforge.training.setup import assemble
job = load_config(sys.argv[1], sys.argv[2:])
begin = time.perf_counter()
made = assemble(job)
next(iter(made.data.batches(made.stages[0], 0)))
print(json.dumps({"step_s": time.perf_counter() - begin, "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def ms(facts: Facts, first: Facts) -> str:
    return f"{1e3 * facts['step_s']:,.1f} ms"


def seconds(facts: Facts, first: Facts) -> str:
    return f"{facts['step_s']:.2f} s"


def ratio(key: str) -> Callable[[Facts, Facts], str]:
    return lambda facts, first: f"{facts[key] / first[key]:.2f}"


def time_over_flops(facts: Facts, first: Facts) -> str:
    """Of what is computed: all archs wait for the same data."""
    ours, theirs = (run["step_s"] * (1 - run["data_share"]) / run["flops_per_step"] for run in (facts, first))
    return f"{ours / theirs:.2f}"


def memory(facts: Facts, first: Facts) -> str:
    return f"{facts['memory_gib']:.2f} GiB"


STEP = {
    "step": ms,
    "times the first": ratio("step_s"),
    "FLOPs, times the first": ratio("flops_per_step"),
    "time without data per FLOP, times the first": time_over_flops,
}
GROWTH = {**STEP, "peak memory": memory}
PEER = {
    "useful tokens/s": lambda facts, first: f"{facts['tokens_per_s']:,.0f}",
    "the peer's": lambda facts, first: f"{facts['peer']['tokens_per_s']:,.0f}",
    "ours over the peer's": lambda facts, first: f"{facts['peer']['tokens_ratio']:.2f}",
    "data wait": lambda facts, first: f"{facts['data_share']:.1%}",
    "MFU": lambda facts, first: f"{facts['mfu']:.1%}",
}


def grown(key: str, values: Sequence[int], *more: str) -> dict[str, Sequence[str]]:
    return {f"{key} = {value}": (PROBE, *ONE_KIND, f"--{key}={value}", *more) for value in values}


def archs(*more: str) -> dict[str, Sequence[str]]:
    return {arch: (PROBE, *ONE_KIND, f"--vlm.arch={arch}", *more) for arch in ("joint_decoder", "mot", "cross_attention", "moma")}


MEASUREMENTS = {
    "peers": Measurement(
        "a plain loop around the same model as a class of transformers makes fewer useful tokens a second",
        {
            f"{batching}, the peer {theirs}": (f"--data.batching={batching}", *more, "--against=transformers", *peer)
            for batching, more, length in (("group", (), 256), ("pack", PACKED, 512))
            for theirs, peer in (("pads to the longest", ()), (f"pads to {length}", (f"--pad-to={length}",)))
        },
        PEER,
        bench_captions,
    ),
    "trainer": Measurement(
        "transformers.Trainer with the same model, samples and batch size makes fewer useful tokens a second",
        {"group": ("--data.batching=group",), "pack": ("--data.batching=pack", *PACKED)},
        PEER,
        against_trainer,
    ),
    "workers": Measurement(
        "with a worker, a step waits for less than 3 % of its time for data",
        {
            f"{batching}, {workers} workers": (f"--data.batching={batching}", *more, f"--data.num_workers={workers}")
            for batching, more in (("group", ()), ("pack", PACKED))
            for workers in (0, 1)
        },
        {name: PEER[name] for name in ("useful tokens/s", "data wait", "MFU")},
        bench_captions,
    ),
    "archs": Measurement(
        "mot takes at most 1.15 times joint_decoder's step at equal FLOPs; cross_attention's time follows its FLOPs within 10 %",
        archs(),
        STEP,
        bench,
    ),
    "wide-archs": Measurement(
        "the same with a step of 4,600 positions",
        archs("--model.dim=256", "--model.n_heads=8", "--train.batch_size=128"),
        STEP,
        bench,
    ),
    "layers": Measurement("time grows with FLOPs", grown("model.n_layers", (2, 4, 8, 16)), GROWTH, bench),
    "width": Measurement("wider models use the machine better", grown("model.dim", (64, 128, 256, 512)), GROWTH, bench),
    "batch": Measurement("time grows with samples", grown("train.batch_size", (4, 8, 16, 32)), GROWTH, bench),
    "positions": Measurement(
        "time grows with the positions of a row",
        {
            f"train.seq_len = {length}": (
                "--data.batching=pack",
                "--train.batch_size=1",
                f"--train.seq_len={length}",
                f"--model.max_seq_len={length}",
            )
            for length in (256, 512, 1024, 2048, 4096)
        },
        GROWTH,
        bench_captions,
    ),
    "tiles": Measurement(
        "time grows with images a sample",
        grown("data.images.max_tiles", (1, 4, 9), *TILES),
        GROWTH,
        bench,
    ),
    "rows": Measurement(
        "a file is read once at the start; memory is a few dozen bytes a row",
        {f"{rows:,} rows": (str(rows),) for rows in (10_000, 100_000, 1_000_000, 10_000_000)},
        {"until the first batch": seconds, "times the first": ratio("step_s"), "peak memory": memory},
        first_step,
    ),
    "logits": Measurement(
        "in pieces of 1,024, head and loss take at most a fifth more time, and the memory of a piece",
        {
            f"{dtype}, {targets:,} targets of {words:,} words, {way}": (way, str(words), str(targets), dtype)
            for dtype in ("float32", "bfloat16")
            for targets in (512, 4096)
            for words in (8192, 32768, 131072)
            for way in ("all", "256", "1024", "torch:256")
        },
        {"processor time": seconds, "peak memory": memory},
        head_and_loss,
    ),
    "start-up": Measurement(
        "commands that need no torch do not import it",
        {"--help": ("--help",), "check": ("check", PROBE, "--data.samples=200"), "config model": ("config", "model")},
        {"time": seconds},
        start_up,
    ),
}


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import torch

    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu or platform.processor()}, {os.cpu_count()} cores"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"device": device, "threads": os.environ.get("OMP_NUM_THREADS", "default"), "torch": str(torch.__version__), "commit": commit}


def median(runs: Sequence[Any]) -> Any:
    """The same facts, each number the median of ``runs``."""
    first = runs[0]
    if isinstance(first, dict):
        return {key: median([run[key] for run in runs]) for key in first if all(key in run for run in runs)}
    return statistics.median(runs) if isinstance(first, int | float) and not isinstance(first, bool) else first


def table(name: str, made: Measurement, found: dict[str, Facts]) -> str:
    first = next(iter(found.values()))
    lines = [f"| {name} | {' | '.join(made.columns)} |", "|---" * (len(made.columns) + 1) + "|"]
    lines += [f"| {cell} | {' | '.join(show(facts, first) for show in made.columns.values())} |" for cell, facts in found.items()]
    return f"**{name}**: {made.claim}.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--list", action="store_true", help="print the claims and end")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - MEASUREMENTS.keys()):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(MEASUREMENTS)}")
    if args.list:
        print("\n".join(f"{name}: {made.claim}" for name, made in MEASUREMENTS.items()))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    here, tables = machine(), []
    for name in args.names or MEASUREMENTS:
        made = MEASUREMENTS[name]
        runs: dict[str, list[Facts]] = {cell: [] for cell in made.cells}
        for _ in range(args.repeats):
            for cell, words in made.cells.items():
                runs[cell].append(made.measure(words, args))
        said = {
            "claim": made.claim,
            "machine": here,
            "cells": {cell: {"words": list(made.cells[cell]), "runs": runs[cell]} for cell in runs},
        }
        (args.out / f"{name}.json").write_text(json.dumps(said, indent=1))
        tables.append(table(name, made, {cell: median(found) for cell, found in runs.items()}))
        print(tables[-1], flush=True)
    facts = ", ".join(f"{key} {value}" for key, value in here.items())
    (args.out / "results.md").write_text(f"{facts}; medians of {args.repeats}.\n\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
