"""What one process of a cluster would hold and send, and how long a step would take: state and traffic are
counted, as ``fully_shard`` cuts and sends them; time follows from a stated model.

The model of time: products reach ``EFFICIENCY`` of a GPU's peak. Gathers overlap with computing and are
exposed where they take longer, in the forward and in the backward pass each, and the first unit's always; sums
of activations (``distributed.tensor_parallel``) overlap with nothing.
Links have their full rate. Nothing else costs time: no waiting for data, no evaluation, no saving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from kempnerforge.config import JobConfig, Stage
from kempnerforge.distributed.fsdp import recompute_unit
from kempnerforge.distributed.tensor import share_of, shared_parts
from kempnerforge.inspection.plan import Plan, StagePlan
from kempnerforge.model.tensor_plan import Share
from kempnerforge.training.accounting import Cost, cost
from kempnerforge.training.batch_size import Chooser, numbers
from kempnerforge.training.memory import REDUCED, State
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.base import VLM
from kempnerforge.vlm.build import build_model
from kempnerforge.vlm.parts import part_of

EFFICIENCY = 0.6
"""Share of a GPU's peak that a step without communication reaches: 57.8 % were measured of 7 billion parameters
on one H200."""
GIB = 2**30


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
        exchanged: bytes of activations and of what is sent back to them, where processes share layers or rows:
            sums of vectors; keys and values. (Not counted: gradients of norms of heads, a few hundred.)
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
    exchanged: int
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


def on_cluster(found: Plan, processes: int, gpu: Gpu) -> list[ClusterStage]:
    """The stages of ``found`` on ``processes`` devices.

    Raises:
        InputError: a batch cannot be divided among them.
    """
    found.assembly.job.distributed.check_processes(processes)
    chooser = Chooser(found.assembly, found.dtype, on_cpu=False)
    stages = []
    for planned in found.stages:
        stage = planned.stage
        if stage.index in found.choices:
            choice = chooser.choose(stage, processes, int(gpu.memory))
            stage = replace(stage, train=numbers(stage.train, choice.accumulated))
        stages.append(_stage(found, planned, stage, processes, gpu))
    return stages


class Exchanged:
    """Numbers that a process sums with those that it shares layers with, in one pass forth and back.

    Args:
        model: on the meta device; it becomes what one of ``count`` processes has of it.
    """

    def __init__(self, model: VLM, count: int) -> None:
        self.numbers = 0
        self._entered: dict[nn.Module, Tensor] = {}
        for one in shared_parts(model, count) if count > 1 else ():
            for key, parameter in [*one.part.named_parameters()]:
                owner, _, last = key.rpartition(".")
                mine = nn.Parameter(parameter.new_empty(share_of(parameter, one.axis(key), count)))
                one.part.get_submodule(owner).register_parameter(last, mine)
            if one.share is Share.ROWS:
                one.part.register_forward_hook(self._left)
            if one.share is Share.COLUMNS:
                one.part.register_forward_pre_hook(partial(self._enter, one.whole))

    def _add(self, values: Tensor) -> None:
        self.numbers += values.numel()

    def _left(self, _: nn.Module, args: tuple[Tensor], found: Tensor) -> None:
        self._add(found)

    def _enter(self, whole: nn.Module, _: nn.Module, args: tuple[Tensor]) -> None:
        (x,) = args
        if x.requires_grad and self._entered.get(whole) is not x:  # layers that read the same make one sum of what they send back
            x.register_hook(self._add)  # not called for what is recomputed
        self._entered[whole] = x


class OneProcess(NamedTuple):
    """What one process computes of the micro-batch that was counted, which is not divided.

    Attributes:
        again: FLOPs of one sample that activation checkpointing repeats.
        growing, fixed: bytes, in proportion to the rows and not. With activation checkpointing: what enters
            each unit, the outputs that are kept in it, and the rest of one unit while it is recomputed.
        exchanged: numbers.
    """

    cost: Cost
    again: float
    growing: float
    fixed: int
    exchanged: int


class Traffic(NamedTuple):
    """Bytes of weights and gradients that one process receives in a step.

    Attributes:
        one_unit: of the largest unit's weights, once.
        forth, back: of the units' weights, in all forward and in all backward passes.
        root: of the other weights.
        reduced, copied: as of ``ClusterStage``.
    """

    one_unit: int
    forth: int
    back: int
    root: int
    reduced: int
    copied: int


def _rows(job: JobConfig, stage: Stage, processes: int) -> int:
    """Rows of a micro-batch that a process has, or shares with others."""
    group, accumulated, batch = job.distributed.group, stage.train.grad_accum_steps, stage.train.step_rows
    rows, rest = divmod(batch * group, accumulated * processes)
    if rest or not rows:
        shared = f" in groups of {group}" if group > 1 else ""
        raise InputError(
            f"stage {stage.name!r}: train.batch_size = {batch}: {processes} processes{shared} with grad_accum_steps = {accumulated} need a "
            f"multiple of {accumulated * processes // group}"
        )
    return rows


def _stage(found: Plan, planned: StagePlan, stage: Stage, processes: int, gpu: Gpu) -> ClusterStage:
    """``stage`` is the one of ``planned``, with the micro-batches that these devices take."""
    job, accumulated, batch = found.assembly.job, stage.train.grad_accum_steps, stage.train.step_rows
    together, by_row = job.distributed.tensor_parallel, job.distributed.context_parallel
    rows, again = _rows(job, stage, processes), job.train.activation_checkpointing
    model = found.assembly.model if together == 1 else build_model(job, "meta")
    exchanged = Exchanged(model, together)
    state = State(found.assembly, stage, found.assembly.freeze.trainable(stage.start), found.dtype, processes, model)
    one = _one_process(found, planned, model, exchanged, state)

    per_row = 1 / max(1, planned.stage.train.step_rows // planned.stage.train.grad_accum_steps)  # of the batch that was counted
    others = _keys_and_values(job, planned.row_length, state.width)
    in_row = one.growing * per_row / by_row + others * (1 if again else job.model.n_layers)  # bytes of one row
    memory = state.bytes(accumulated) | {"activations": round(in_row * rows) + one.fixed}
    free = gpu.memory - (sum(memory.values()) - round(in_row * rows))
    largest = max(0, int(free / in_row)) if in_row else rows

    weights = _traffic(state, one.cost, accumulated)
    sums = 2 * (together - 1) / together * state.width * one.exchanged * per_row / by_row * rows * accumulated
    keys_and_values = accumulated * rows * others * job.model.n_layers * (3 if again else 2)

    speed = EFFICIENCY * gpu.flops * state.parts / batch
    forward, backward = one.cost.forward_flops / speed, (one.cost.backward_flops + one.again) / speed
    inside, around, link, between = (
        gpu.link if size <= gpu.per_node else gpu.network for size in (together, together * by_row, together * state.shared, processes)
    )
    exposed = weights.one_unit / link + max(0.0, weights.forth / link - forward)
    exposed += max(0.0, (weights.back + weights.reduced) / link + weights.copied / between - backward)
    exposed += sums / inside + keys_and_values / around
    step = forward + backward + exposed
    return ClusterStage(
        stage=stage,
        processes=processes,
        memory=memory,
        rows=rows,
        largest_rows=largest,
        gathered=weights.forth + weights.back + weights.root,
        reduced=weights.reduced,
        copied=weights.copied,
        exchanged=round(sums + keys_and_values),
        compute_s=forward + backward,
        exposed_s=exposed,
        tokens=planned.useful * planned.row_length * batch,
        mfu=planned.cost.flops * batch / (gpu.flops * processes * step),
        warnings=_warnings(job, memory, largest, rows, gpu, exposed / step),
    )


def _one_process(found: Plan, planned: StagePlan, model: VLM, exchanged: Exchanged, state: State) -> OneProcess:
    """What a process computes with ``model``, what it has of it; of what activation checkpointing recomputes
    one unit at a time.
    """
    job, batch = found.assembly.job, next(found.assembly.data.batches(planned.stage, planned.stage.start))
    count = lambda it: cost(it, batch, frozenset(state.trained), state.slots, found.dtype)
    counted = planned.cost if model is found.assembly.model else count(model)
    growing = counted.activation_bytes - counted.fixed_bytes
    if not job.train.activation_checkpointing:
        return OneProcess(counted, 0.0, growing, counted.fixed_bytes, exchanged.numbers)
    again = build_model(job, "meta")
    exchanged, units = Exchanged(again, job.distributed.tensor_parallel), [*again.shard_units()]
    for unit in units:
        recompute_unit(unit, job.train.activation_checkpointing_keeps == "products")
    recomputed = count(again)
    kept = recomputed.activation_bytes - recomputed.fixed_bytes
    growing = kept + max(0, growing - kept) / len(units)
    return OneProcess(counted, recomputed.flops - counted.flops, growing, recomputed.fixed_bytes, exchanged.numbers)


def _traffic(state: State, counted: Cost, accumulated: int) -> Traffic:
    """Of a step of ``accumulated`` micro-batches."""
    shards, passes = state.shards, accumulated * state.width
    units = [shards.received(unit) for unit in shards.units]
    learns = {module.name for module in counted.modules if module.backward_flops}  # parts that a backward pass goes through
    lowest = next((k for k, unit in enumerate(shards.units) if part_of(unit[0]) in learns), len(units))
    fetched = units[max(0, lowest - 1) :] if state.reshard else []  # in the backward pass; the unit before is fetched ahead, and not used
    reductions = REDUCED * (accumulated if state.at_once else 1)
    return Traffic(
        one_unit=state.width * max(units, default=0),
        forth=passes * sum(units),
        back=passes * sum(fetched),
        root=passes * shards.received(shards.root),
        reduced=reductions * sum(shards.received([name]) for name in state.trained),
        copied=round(reductions * 2 * shards.part(state.trained) * (state.copies - 1) / state.copies),
    )


def _keys_and_values(job: JobConfig, length: int, width: int) -> float:
    """Bytes of a row's keys and values in one layer that a process receives from those that it shares the
    row with.
    """
    ranks = job.distributed.context_parallel
    heads = job.model.kv_heads / job.distributed.tensor_parallel
    return 2 * width * heads * job.model.head_width * length * (ranks - 1) / ranks


def _warnings(job: JobConfig, memory: dict[str, int], largest: int, rows: int, gpu: Gpu, exposed: float) -> list[str]:
    lines = []
    if job.distributed.context_parallel > 1 and job.vlm is not None:
        lines.append(
            "distributed.context_parallel: activations and products of the images are counted as if they were shared, too; they are not"
        )
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
