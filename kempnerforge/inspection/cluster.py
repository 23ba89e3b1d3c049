"""What one process of a cluster would hold and send, and how long a step would take: state and traffic are
counted, as ``fully_shard`` cuts and sends them; time follows from a stated model.

The model of time: products reach ``EFFICIENCY`` of a GPU's peak. Gathers overlap with computing and are
exposed where they take longer, in the forward and in the backward pass each, and the first unit's always.
Links have their full rate. Nothing else costs time: no waiting for data, no evaluation, no saving.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kempnerforge.config import JobConfig, Stage
from kempnerforge.inspection.plan import Plan, StagePlan
from kempnerforge.training.batch_size import Chooser, numbers
from kempnerforge.training.memory import REDUCED, Passes, State
from kempnerforge.util.errors import InputError
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


def on_cluster(found: Plan, processes: int, gpu: Gpu) -> list[ClusterStage]:
    """The stages of ``found`` on ``processes`` devices.

    Raises:
        InputError: a batch cannot be divided among them.
    """
    chooser = Chooser(found.assembly, found.dtype, on_cpu=False)
    stages = []
    for plan in found.stages:
        stage = plan.stage
        if stage.index in found.choices:
            choice = chooser.choose(stage, processes, int(gpu.memory))
            stage = replace(stage, train=numbers(stage.train, choice.accumulated))
        stages.append(_stage(found, plan, stage, chooser.passes, processes, gpu))
    return stages


def _stage(found: Plan, plan: StagePlan, stage: Stage, passes: Passes, processes: int, gpu: Gpu) -> ClusterStage:
    """``stage`` is the one of ``plan``, with the micro-batches that these devices take."""
    job, assembly, counted, tokens_a_row = found.assembly.job, found.assembly, plan.cost, plan.useful * plan.row_length
    accumulated, batch = stage.train.grad_accum_steps, stage.train.step_rows
    rows, rest = divmod(batch, accumulated * processes)
    if rest or not rows:
        raise InputError(
            f"stage {stage.name!r}: train.batch_size = {batch}: {processes} processes with grad_accum_steps = {accumulated} need a multiple "
            f"of {accumulated * processes}"
        )
    trainable = assembly.freeze.trainable(stage.start)
    state = State(assembly, stage, trainable, found.dtype, processes)
    shared, copies, shards, trained = state.shared, state.copies, state.shards, state.trained
    width, reshard = state.width, state.reshard
    reductions = accumulated if state.at_once else 1
    first = next(assembly.data.batches(plan.stage, plan.stage.start))
    in_row = passes.run(first, trainable).peak / first.input_ids.shape[0]  # bytes of one row
    memory = state.bytes(accumulated) | {"activations": round(in_row * rows)}
    free = gpu.memory - (sum(memory.values()) - memory["activations"])
    largest = max(0, int(free / in_row)) if in_row else rows

    sizes = [shards.received(unit) for unit in shards.units]
    learns = {module.name for module in counted.modules if module.backward_flops}  # parts that a backward pass goes through
    first = next((k for k, unit in enumerate(shards.units) if part_of(unit[0]) in learns), len(sizes))
    forth, back = sum(sizes), sum(sizes[max(0, first - 1) :]) if reshard else 0  # the unit before them is fetched ahead, and not used
    gathered = accumulated * width * (forth + back + shards.received(shards.root))
    reduced = reductions * REDUCED * sum(shards.received([name]) for name in trained)
    copied = round(reductions * REDUCED * 2 * shards.part(trained) * (copies - 1) / copies)

    speed = EFFICIENCY * gpu.flops * processes / batch
    again = counted.forward_flops if job.train.activation_checkpointing else 0.0
    forward, backward = counted.forward_flops / speed, (counted.backward_flops + again) / speed
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
