"""What one process of a cluster would hold and send, and how long a step would take: state and traffic are
counted, as ``fully_shard`` cuts and sends them; time follows from a stated model.

The model of time: products reach ``EFFICIENCY`` of a GPU's peak. Gathers overlap with computing and are
exposed where they take longer, in the forward and in the backward pass each, and the first unit's always.
Links have their full rate. Nothing else costs time: no waiting for data, no evaluation, no saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple

from kempnerforge.config import JobConfig, Stage
from kempnerforge.distributed.fsdp import recompute_unit
from kempnerforge.inspection.plan import Plan
from kempnerforge.training.accounting import Cost, cost
from kempnerforge.training.optimizer import state_copies
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model
from kempnerforge.vlm.parts import part_of

EFFICIENCY = 0.6
"""Share of a GPU's peak that a step without communication reaches: 57.8 % were measured of 7 billion parameters
on one H200."""
GIB = 2**30
MASTER, REDUCED = 4, 4
"""Bytes of a number of the weights, the optimizer's state and reduced gradients: fp32."""


@dataclass(frozen=True)
class Gpu:
    """One device, by its maker's figures.

    Attributes:
        memory: bytes.
        flops: a second, dense bf16.
        link: bytes a second to the others of its node, one way.
        network: bytes a second to other nodes, one way.
        per_node: devices of a node.
    """

    memory: float
    flops: float
    link: float
    network: float
    per_node: int = 8


GPUS = {
    "a100": Gpu(80e9, 312e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class ClusterStage:
    """One stage on one of ``processes``.

    Attributes:
        memory: bytes by kind, at the moment when most is held.
        rows: samples of a micro-batch on one process.
        largest_rows: of a micro-batch that fits; 0: not even one.
        gathered, reduced, copied: bytes that a process receives in a step: weights; gradients; gradients
            between copies of the weights.
        compute_s, exposed_s: of a step: products, and communication that does not overlap with them.
        tokens: useful ones of a step, over all processes.
        mfu: FLOPs of forward and backward over all that the devices could do in that time.
        warnings: lines for people.
    """

    stage: Stage
    processes: int
    memory: dict[str, int]
    rows: int
    largest_rows: int
    gathered: int
    reduced: int
    copied: int
    compute_s: float
    exposed_s: float
    tokens: float
    mfu: float
    warnings: list[str]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.exposed_s


class Shards:
    """How ``fully_shard`` cuts a model: unit by unit, every parameter along its first axis, padded so that all
    processes hold equally much.

    Args:
        model: on the meta device.
        processes: that share a copy of the weights.
    """

    def __init__(self, model: VLM, processes: int) -> None:
        units, taken = [*model.shard_units()], set[str]()
        names = {id(p): name for name, p in model.named_parameters()}
        self.units: list[list[str]] = []
        for unit in units:
            self.units.append([names[id(p)] for p in unit.parameters()])
            taken |= {*self.units[-1]}
        self.root = [name for name in names.values() if name not in taken]
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.processes = processes

    def part(self, names: Sequence[str]) -> int:
        """Numbers of ``names`` that a process holds."""
        return sum(ceil((self.shapes[name] or (1,))[0] / self.processes) * prod(self.shapes[name][1:]) for name in names)

    def whole(self, names: Sequence[str]) -> int:
        """Numbers of ``names`` once they are gathered, padding included."""
        return self.processes * self.part(names)

    def received(self, names: Sequence[str]) -> int:
        """Numbers that a process gets from the others, to gather ``names`` or to reduce them."""
        return self.whole(names) - self.part(names)


def on_cluster(found: Plan, processes: int, gpu: Gpu) -> list[ClusterStage]:
    """The stages of ``found`` on ``processes`` devices.

    Raises:
        InputError: a batch cannot be divided among them.
    """
    return [_stage(found, stage.stage, stage.cost, stage.useful * stage.row_length, processes, gpu) for stage in found.stages]


def _stage(found: Plan, stage: Stage, counted: Cost, tokens_a_row: float, processes: int, gpu: Gpu) -> ClusterStage:
    job, assembly = found.assembly.job, found.assembly
    accumulated, batch = stage.train.grad_accum_steps, stage.train.batch_size
    rows, rest = divmod(batch, accumulated * processes)
    if rest or not rows:
        raise InputError(
            f"stage {stage.name!r}: train.batch_size = {batch}: {processes} processes with grad_accum_steps = {accumulated} need a multiple "
            f"of {accumulated * processes}"
        )
    shared = (job.distributed.shard_size if processes > 1 else 0) or processes
    if processes % shared:
        raise InputError(f"distributed.shard_size = {shared}: must divide the number of processes, {processes}")
    copies, model = processes // shared, assembly.model
    shards, trainable = Shards(model, shared), assembly.freeze.trainable(stage.start)
    names = [*shards.root, *(name for unit in shards.units for name in unit)]
    trained = [name for name in names if name in trainable]
    slots = state_copies(model, stage.optimizer, job.train.ema_decay > 0)
    width, reshard = found.dtype.itemsize, job.distributed.reshard_after_forward and processes > 1
    at_once = job.distributed.accumulate_sharded
    reductions = accumulated if at_once else 1

    held = sorted((shards.whole(unit) for unit in shards.units), reverse=True)
    shown = shards.whole(shards.root) + (sum(held[:2]) if reshard else sum(held))  # the unit at work and the next one
    cast = width if shared > 1 or width < MASTER else 0
    activations = _activations(found, stage, counted, trainable, slots)
    in_row = activations.growing / max(1, batch // accumulated)  # bytes of one row
    memory = {
        "weights": MASTER * shards.part(names),
        "gradients": MASTER * shards.part(trained),
        "optimizer": MASTER * sum(slots[name] * shards.part([name]) for name in trained),
        "gathered weights": cast * shown,
        "unsharded gradients": REDUCED * shards.whole(trained) if accumulated > 1 and processes > 1 and not at_once else 0,
        "activations": round(in_row * rows) + activations.fixed,
    }
    free = gpu.memory - (sum(memory.values()) - round(in_row * rows))
    largest = max(0, int(free / in_row)) if in_row else rows

    sizes = [shards.received(unit) for unit in shards.units]
    learns = {module.name for module in counted.modules if module.backward_flops}  # parts that a backward pass goes through
    first = next((k for k, unit in enumerate(shards.units) if part_of(unit[0]) in learns), len(sizes))
    forth, back = sum(sizes), sum(sizes[max(0, first - 1) :]) if reshard else 0  # the unit before them is fetched ahead, and not used
    gathered = accumulated * width * (forth + back + shards.received(shards.root))
    reduced = reductions * REDUCED * sum(shards.received([name]) for name in trained)
    copied = round(reductions * REDUCED * 2 * shards.part(trained) * (copies - 1) / copies)

    speed = EFFICIENCY * gpu.flops * processes / batch
    forward, backward = counted.forward_flops / speed, (counted.backward_flops + activations.again) / speed
    link, between = (gpu.link if size <= gpu.per_node else gpu.network for size in (shared, processes))
    exposed = width * max(sizes, default=0) / link + max(0.0, accumulated * width * forth / link - forward)
    exposed += max(0.0, (accumulated * width * back + reduced) / link + copied / between - backward)
    computed = forward + backward
    return ClusterStage(
        stage=stage,
        processes=processes,
        memory=memory,
        rows=rows,
        largest_rows=largest,
        gathered=gathered,
        reduced=reduced,
        copied=copied,
        compute_s=computed,
        exposed_s=exposed,
        tokens=tokens_a_row * batch,
        mfu=counted.flops * batch / (gpu.flops * processes * (computed + exposed)),
        warnings=_warnings(job, memory, largest, rows, gpu, exposed / (computed + exposed)),
    )


class _Activations(NamedTuple):
    """What is held of a micro-batch, and what that costs.

    Attributes:
        again: FLOPs of one sample that activation checkpointing repeats.
        growing, fixed: bytes of a micro-batch, in proportion to its rows and not. With activation
            checkpointing: what enters each unit, the outputs that are kept in it, and the rest of one unit
            while it is recomputed.
    """

    again: float
    growing: float
    fixed: int


def _activations(found: Plan, stage: Stage, counted: Cost, trainable: frozenset[str], slots: dict[str, int]) -> _Activations:
    train, growing = found.assembly.job.train, counted.activation_bytes - counted.fixed_bytes
    if not train.activation_checkpointing:
        return _Activations(0.0, growing, counted.fixed_bytes)
    model = build_model(found.assembly.job, "meta")
    units = [*model.shard_units()]
    for unit in units:
        recompute_unit(unit, train.activation_checkpointing_keeps == "products")
    batch = next(found.assembly.data.batches(stage, stage.start))
    recomputed = cost(model, batch, trainable, slots, found.dtype)
    kept = recomputed.activation_bytes - recomputed.fixed_bytes
    return _Activations(recomputed.flops - counted.flops, kept + max(0, growing - kept) / len(units), recomputed.fixed_bytes)


def _warnings(job: JobConfig, memory: dict[str, int], largest: int, rows: int, gpu: Gpu, exposed: float) -> list[str]:
    lines = []
    if largest < rows:
        fits = f"micro-batches of {largest} rows fit" if largest else "not even one row fits"
        lines.append(f"{sum(memory.values()) / GIB:,.1f} GiB are needed, {gpu.memory / GIB:,.1f} are there: {fits}, not of {rows}")
    if memory["unsharded gradients"] > 0.25 * gpu.memory:
        size = memory["unsharded gradients"] / GIB
        avoids = "distributed.accumulate_sharded avoids it"
        lines.append(f"train.grad_accum_steps: gradients of all parameters are added up unsharded, {size:,.1f} GiB; {avoids}")
    if exposed > 0.2:
        wider = "" if job.distributed.shard_size else "; distributed.shard_size = the GPUs of a node sends less between nodes"
        lines.append(f"{exposed:.0%} of a step waits for communication: more rows for each process would hide it{wider}")
    return lines
