"""What freezing saves: time and memory of a training step with parts of the model frozen, against the same step with nothing frozen.

Time: all variants take their steps in turns in one process, with the same batches; medians, and their ratio to nothing frozen. Memory: every
variant in a process of its own. "Kept" is what the forward pass of the first micro-batch keeps for the backward pass, without parameters;
"state" is gradients and optimizer state after a few steps; "peak" is resident memory at its highest, less what the process held when model
and data were loaded.

Usage: python benchmarks/stages.py [CONFIG] [--rounds 8] [--steps 5] [--threads N] [--section.key=value ...]

Prints a Markdown table for each stage of the config.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kempnerforge.util.process import tune_memory

tune_memory()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kempnerforge.config import FreezeSpec, JobConfig, StageConfig, load_config  # noqa: E402
from kempnerforge.distributed import world as worlds  # noqa: E402
from kempnerforge.inspection.plan import plan  # noqa: E402
from kempnerforge.training.setup import assemble  # noqa: E402
from kempnerforge.training.trainer import Trainer  # noqa: E402

VARIANTS: dict[str, list[FreezeSpec]] = {
    "nothing frozen": [],
    "encoder frozen": [FreezeSpec("vision_encoder")],
    "text model frozen": [FreezeSpec("transformer")],
    "adapter alone trains": [FreezeSpec("*"), FreezeSpec("adapter", frozen=False)],
}
MIB = 2**20


def variant(job: JobConfig, stage: StageConfig, freeze: Sequence[FreezeSpec]) -> JobConfig:
    """The job with this one stage and this freezing, without an end."""
    return replace(job, stages=[replace(stage, steps=10**6, freeze=list(freeze))], train=replace(job.train, max_steps=0))


@contextmanager
def training(job: JobConfig):
    """A trainer ready for its first step."""
    world = worlds.start(job.distributed)
    try:
        trainer = Trainer(assemble(job), world, [])
        trainer.apply_freeze()
        yield trainer
    finally:
        worlds.stop()


def step(trainer: Trainer) -> float:
    """Seconds of one step, its data included."""
    result = trainer.train_step()
    trainer.step += 1
    assert not result.skipped
    return result.seconds


def times(job: JobConfig, stage: StageConfig, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step by variant; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    world = worlds.start(job.distributed)
    trainers = {name: Trainer(assemble(variant(job, stage, freeze)), world, []) for name, freeze in VARIANTS.items()}
    for trainer in trainers.values():
        trainer.apply_freeze()
    for round_ in range(rounds + 1):
        for name, trainer in trainers.items():
            seconds = [step(trainer) for _ in range(steps)]
            found[name] += seconds if round_ else []
    worlds.stop()
    return found


def resident(key: str) -> int:
    """Bytes from /proc/self/status: VmRSS now, VmHWM at its highest."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def kept_bytes(trainer: Trainer) -> int:
    """What the forward pass of one micro-batch leaves for the backward pass."""
    batch = next(trainer.assembly.data.batches(trainer.stage, trainer.step))
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = trainer.model(batch).total
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    total.backward()
    trainer.optimizers.zero_grad()
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def memory(job: JobConfig, steps: int) -> dict[str, int]:
    """Bytes of one variant; this process does nothing else."""
    with training(job) as trainer:
        step(trainer)  # loads libraries, fills caches, makes state
        kept = kept_bytes(trainer)
        optimizers, sizes = trainer.optimizers, {"gradients": 0}
        update = optimizers.step

        def weigh() -> None:
            sizes["gradients"] = sum(p.grad.numel() * p.grad.element_size() for p in trainer.model.parameters() if p.grad is not None)
            update()

        optimizers.step = weigh
        for _ in range(steps):
            step(trainer)
        tensors = [value for optimizer in optimizers.all for state in optimizer.state.values() for value in state.values()]
        state = sum(value.numel() * value.element_size() for value in tensors)
    return {"kept": kept, "state": sizes["gradients"] + state}


def memory_row(job: JobConfig, steps: int) -> dict[str, int]:
    """``memory``, and the peak above what model and data take."""
    assemble(job)  # libraries and data are loaded now, and gone again as far as they can be
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    found = memory(job, steps)
    return found | {"peak": resident("VmHWM") - before}


def in_its_own_process(argv: list[str], stage: int, name: str) -> dict[str, int]:
    command = [sys.executable, __file__, *argv, f"--row={stage}:{name}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(job: JobConfig, index: int, args: argparse.Namespace, argv: list[str]) -> None:
    stage = job.stages[index]
    seconds = times(job, stage, args.rounds, args.steps)
    print(f"\nStage {stage.name!r}, {stage.train.get('batch_size', job.train.batch_size)} samples a step\n")
    print("| what trains | step | ratio | counted FLOPs | kept for backward | gradients and state | peak above the start |")
    print("|---|---|---|---|---|---|---|")
    first = statistics.median(seconds["nothing frozen"])
    flops = {name: plan(variant(job, stage, freeze)).stages[0].cost.flops for name, freeze in VARIANTS.items()}
    for name in VARIANTS:
        size = in_its_own_process(argv, index, name)
        median = statistics.median(seconds[name])
        spread = statistics.quantiles(seconds[name], n=4)
        cells = [f"{median * 1e3:.1f} ms ({spread[0] * 1e3:.1f} to {spread[2] * 1e3:.1f})", f"{median / first:.2f}"]
        cells += [f"{flops[name] / flops['nothing frozen']:.2f}", *(f"{size[key] / MIB:.1f} MiB" for key in ("kept", "state", "peak"))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.toml")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves them as they are")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    job = load_config(args.config, ["--eval.interval=0", "--eval.at_end=false", *overrides])
    if not job.stages:
        job = replace(job, stages=[StageConfig("train", 1)])
    if args.row:
        index, _, name = args.row.partition(":")
        print(json.dumps(memory_row(variant(job, job.stages[int(index)], VARIANTS[name]), args.steps)))
        return
    print(
        f"{args.config}: load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads, medians (quartiles) of {args.rounds * args.steps} steps"
    )
    for index in range(len(job.stages)):
        table(job, index, args, sys.argv[1:])


if __name__ == "__main__":
    main()
