"""``train.batch_size = "auto"``: the largest micro-batch that fits, chosen once and kept in the run's config.

What a step is computed from is ``train.rows_per_step``; the memory decides only into how many micro-batches
it is cut. Nothing is tried out: bytes are counted on the meta device, with the heaviest rows of the data.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kempnerforge.config import JobConfig, Stage
from kempnerforge.config.training import AUTO, TrainConfig
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.loader import heavy_rows, padded_length
from kempnerforge.distributed.world import World, compute_dtype
from kempnerforge.model.memory import available_bytes, memory_bytes, resident_bytes
from kempnerforge.training.memory import Passes, State
from kempnerforge.training.setup import Assembly
from kempnerforge.util.errors import InputError

LOG = logging.getLogger("kempnerforge")
SHARE = {"cuda": 0.8, "cpu": 0.4}
"""Of the memory that is there, what may be planned for. The rest is for what is not counted: longer rows
later in the data, kernels' own buffers, evaluation, blocks that were let go and do not fit again. On a CPU a
process took 0.99 to 1.05 times the count with an allocator that returns every block at once, and up to 2.4
times with glibc's, which keeps them (25 million parameters, 8 steps)."""
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """The micro-batch of a stage on each of ``processes``, of which those that have the same samples count
    once.

    Attributes:
        step_rows: rows of a step, over all processes.
        rows: of a micro-batch; 0: not even one fits.
        needed: bytes of a process with ``rows``, or with one row.
        too_many, too_much: the next larger micro-batch and its bytes; 0: there is none.
        room: bytes that may be planned for.
        memory: bytes that there are.
    """

    stage: str
    processes: int
    step_rows: int
    rows: int
    needed: int
    too_many: int
    too_much: int
    room: int
    memory: int

    @property
    def accumulated(self) -> int:
        """Micro-batches of a step; of one row each where none fits."""
        return self.step_rows // (self.processes * (self.rows or 1))

    def __str__(self) -> str:
        gib = lambda size: f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"
        rows = lambda count: f"{count} row{'s' if count != 1 else ''}"
        start = f'train.batch_size = "auto", stage {self.stage!r}: '
        there = f"{gib(self.room)} of {gib(self.memory)} may be planned for"
        if not self.rows:
            return f"{start}not even one row fits: a process needs {gib(self.needed)}, and {there}"
        steps = f"{self.step_rows} a step = {self.processes} x {self.accumulated} x {self.rows}"
        larger = f", {rows(self.too_many)} {gib(self.too_much)}" if self.too_many else ""
        return f"{start}micro-batches of {rows(self.rows)} ({steps}); they need {gib(self.needed)}{larger}; {there}"

    def require(self) -> None:
        """Raises InputError where not even one row fits."""
        if not self.rows:
            raise InputError(f"{self}; take a smaller model or shorter rows, or train.activation_checkpointing")


@dataclass(frozen=True)
class _Counter:
    """Bytes of a process.

    Attributes:
        whole: rows of a step on it.
        beside: bytes that are neither state nor a micro-batch's.
        peak: rows of a micro-batch -> its bytes.
    """

    state: State
    whole: int
    beside: int
    peak: Callable[[int], int]

    def needed(self, rows: int, peak: int) -> int:
        """All bytes, where a micro-batch of ``rows`` takes ``peak``."""
        return sum(self.state.bytes(self.whole // rows).values()) + max(peak, self.state.passing()) + self.beside


class Chooser:
    """Chooses micro-batches for the stages of ``assembly``.

    Args:
        dtype: of compute.
        on_cpu: it is to run on a CPU.
    """

    def __init__(self, assembly: Assembly, dtype: torch.dtype, on_cpu: bool) -> None:
        self.assembly, self.dtype, self.on_cpu = assembly, dtype, on_cpu

    @cached_property
    def passes(self) -> Passes:
        return Passes(self.assembly.job, self.dtype, self.on_cpu)

    def choose(self, stage: Stage, processes: int, memory: int) -> Choice:
        """The micro-batch of ``stage``, from its rows a step; its ``train.grad_accum_steps`` is not read.

        NOTE: for processes that share layers or rows, bytes are counted as if each had all of them. So the
        choice may be smaller than the largest that fits.

        Args:
            memory: bytes that a process may use.

        Raises:
            InputError: the step cannot be cut, or what it computes would depend on the micro-batch.
        """
        step_rows = stage.train.step_rows
        group = self.assembly.job.distributed.group
        self.assembly.job.distributed.check_processes(processes)
        shares = processes // group
        if step_rows % shares:
            counted = f"the number of processes, {processes}" + (f", over {group} that have the same samples" if group > 1 else "")
            raise InputError(f"train.rows_per_step = {step_rows}: must be a multiple of {counted}")
        whole, room = step_rows // shares, int(memory * SHARE["cpu" if self.on_cpu else "cuda"])
        count = self._counter(stage, processes, whole)
        best = 0, count.needed(1, count.peak(1))
        larger = 0, 0  # the first one after it, which does not fit
        for rows in (rows for rows in range(1, whole + 1) if whole % rows == 0):
            size = count.needed(rows, peak := count.peak(rows))
            if size <= room:
                best, larger = (rows, size), (0, 0)
            elif best[0] and not larger[0]:
                larger = rows, size
            if count.needed(whole, peak) > room:  # a step of one micro-batch adds no gradients up: nothing larger takes less
                break
        return Choice(stage.name, shares, step_rows, *best, *larger, room, memory)

    def _counter(self, stage: Stage, processes: int, whole: int) -> _Counter:
        assembly, data = self.assembly, self.assembly.data
        freeze, layout = assembly.freeze, data.layouts[stage.index]
        steps = [stage.start, *(step for step in freeze.boundaries if stage.start < step < stage.end)]
        trainable = frozenset().union(*map(freeze.trainable, steps))
        state = State(assembly, stage, trainable, self.dtype, processes)
        heavy = heavy_rows(data.sources[stage.index], data.encoder(stage), stage.data, layout, stage.train)
        pad_id, pad_to = data.tokenizer.pad_id, padded_length(stage.data, layout)
        run = lambda row, rows: self.passes.run(collate([row] * rows, pad_id, pad_to), trainable)
        alone = [run(row, 1) for row in heavy]
        self._check_independent(any(live.draws for live in alone))
        beside = self._beside(stage, state) if self.on_cpu else 0
        return _Counter(state, whole, beside, peak=lambda rows: max(run(row, rows).peak for row in heavy))

    def _beside(self, stage: Stage, state: State) -> int:
        """Bytes in the machine's memory that no device has: decoded images, a checkpoint in the making."""
        cached = sum(section.image_cache_mib for section in stage.data.sections()) * max(1, stage.data.num_workers) * 2**20
        saved = state.bytes(1)
        return cached + (saved["weights"] + saved["optimizer"] if self.assembly.job.checkpoint.in_background else 0)

    def _check_independent(self, draws: bool) -> None:
        """Raises InputError where a step would compute something else with other micro-batches."""
        model, why = self.assembly.model, ""
        if "embeddings" in model.gives:
            why = "its images and texts are compared within a micro-batch"
        elif model.with_aux_loss:
            why = "it has an auxiliary loss, a mean over a micro-batch"
        elif draws:
            why = "it draws random numbers in training (dropout), others in other micro-batches"
        if why:
            raise InputError(
                f'train.batch_size = "auto": what this model learns depends on the micro-batch: {why}. Set train.batch_size and'
                " train.grad_accum_steps"
            )


def decide(assembly: Assembly, world: World | None = None) -> dict[int, Choice]:
    """Chooses for every stage with "auto", the same on all ranks: as the one with least memory needs it. The
    stages and the job of ``assembly`` have numbers afterwards. With a ``world`` it says what was chosen.

    Args:
        world: None: as few processes as the config allows, on the device that training would take.

    Returns:
        The choices by index of the stage; without ``world`` not even one row may fit in them.

    Raises:
        InputError: on all ranks: not even one row fits, or see ``Chooser.choose``.
    """
    stages = [stage for stage in assembly.stages if stage.train.batch_size == AUTO]
    if not stages:
        return {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if world is None else world.device
    hosts = [socket.gethostname()] if world is None else world.gather(socket.gethostname())
    sharing = assembly.job.distributed
    fewest = (sharing.shard_size or sharing.group) if sharing.group > 1 else 1
    weights = sum(p.nbytes for p in assembly.model.parameters() if p.device.type == "cpu")
    memory = memory_here(device, hosts.count(socket.gethostname()), weights)
    memory, processes = (memory, fewest) if world is None else (min(world.gather(memory)), world.size)
    chooser = Chooser(assembly, compute_dtype(assembly.job.train.mixed_precision, device), device.type == "cpu")

    def choose() -> dict[int, Choice]:
        found = {stage.index: chooser.choose(stage, processes, memory) for stage in stages}
        for choice in found.values() if world is not None else ():
            choice.require()
        return found

    found = choose() if world is None else world.together(choose)
    for choice in found.values() if world is not None else ():
        LOG.info("%s", choice)
    assembly.job = fixed(assembly.job, found)
    cuts = [(stage, found.get(stage.index)) for stage in assembly.stages]
    assembly.data.stages = [
        stage if choice is None else replace(stage, train=numbers(stage.train, choice.accumulated)) for stage, choice in cuts
    ]
    return found


def memory_here(device: torch.device, ranks: int, weights: int) -> int:
    """Bytes that this process may use for training.

    Args:
        ranks: processes of the job on this machine, which share its memory.
        weights: bytes of the model that lie in its memory already; they are part of what is counted.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    own = resident_bytes() - weights  # libraries, data
    return max(0, min(memory_bytes() // ranks - own, available_bytes() // ranks + weights))


# ---- the numbers in the config -------------------------------------------------------------------


def numbers(cfg: TrainConfig, accumulated: int) -> TrainConfig:
    """``cfg`` with the numbers that were chosen."""
    return replace(cfg, batch_size=cfg.step_rows, rows_per_step=0, grad_accum_steps=accumulated)


def fixed(job: JobConfig, found: Mapping[int, Choice | int]) -> JobConfig:
    """``job`` with numbers for "auto".

    Args:
        found: choices, or micro-batches of a step, by index of the stage. A stage that is not in it, as it is
            cut off, stays "auto".
    """
    steps = {index: choice.accumulated if isinstance(choice, Choice) else choice for index, choice in found.items()}
    if not job.stages:
        return replace(job, train=numbers(job.train, steps[0])) if 0 in steps and job.train.batch_size == AUTO else job
    stages = []
    for index, (stage, sections) in enumerate(zip(job.stages, job.staged_sections(), strict=True)):
        cfg: TrainConfig = sections["train"]
        if cfg.batch_size == AUTO:
            own: dict[str, Any] = {"batch_size": AUTO, "rows_per_step": cfg.step_rows}
            if index in steps:
                own = {"batch_size": cfg.step_rows, "grad_accum_steps": steps[index]}
            stage = replace(stage, train={key: value for key, value in stage.train.items() if key != "rows_per_step"} | own)
        stages.append(stage)
    return replace(job, train=numbers(job.train, 1) if job.train.batch_size == AUTO else job.train, stages=stages)


def remembered(job: JobConfig, config: Mapping[str, Any]) -> JobConfig:
    """``job`` with the numbers that the run with ``config`` has, where it has as many rows a step."""
    base, before, steps = config.get("train", {}), config.get("stages", []), dict[int, int]()
    cuts = [stage.get("train", {}) for stage in before] if job.stages else [{}]
    for index, own in enumerate(cuts[: max(1, len(job.stages))]):
        cfg = job.staged_sections()[index]["train"] if job.stages else job.train
        was = {**base, **own}
        if cfg.batch_size == AUTO and was.get("batch_size") == cfg.step_rows:
            steps[index] = was.get("grad_accum_steps", 1)
    return fixed(job, steps)
