"""What a cell costs, and how long, in which batches or how wide it has to be to cost what it is asked to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from kempnerforge.config import JobConfig, to_toml
from kempnerforge.config.build import MAX_INT, build_record, known_key
from kempnerforge.config.training import AUTO, CheckpointConfig, EvalConfig, MetricsConfig, RunConfig
from kempnerforge.data.batching.sampler import check_cut
from kempnerforge.inspection.plan import check_start
from kempnerforge.study.cells import Row, job_of, override
from kempnerforge.study.config import MatchConfig, Study
from kempnerforge.study.timing import step_seconds
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.util.digest import digest
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text
from kempnerforge.util.numbers import format_number
from kempnerforge.util.reading import read_object
from kempnerforge.util.version import __version__

MEASURED_STEPS = 128
"""Steps of each stage at most whose batches are read to learn what a step costs: four windows that were
sorted by length.
"""
TOLERANCE = 0.01
"""Share by which a budget may be missed without a warning."""


@dataclass(frozen=True)
class StageCost:
    """One stage.

    Attributes:
        name: of the stage.
        steps: optimizer steps.
        samples, trained_tokens, flops: of one step, on average over its first ``MEASURED_STEPS``.
        seconds: of one step; 0 unless it was timed.
    """

    name: str
    steps: int
    samples: float
    trained_tokens: float
    flops: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What a cell costs.

    Attributes:
        params: of the whole model.
        trainable: of them, those that train in any stage.
    """

    params: int
    trainable: int
    stages: list[StageCost]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> float:
        return sum(stage.steps * stage.samples for stage in self.stages)

    @property
    def trained_tokens(self) -> float:
        return sum(stage.steps * stage.trained_tokens for stage in self.stages)

    @property
    def train_flops(self) -> float:
        return sum(stage.steps * stage.flops for stage in self.stages)

    @property
    def wall_clock(self) -> float:
        return sum(stage.steps * stage.seconds for stage in self.stages)

    def timed(self, seconds: Sequence[float]) -> Budget:
        """The same with the ``seconds`` of a step of each stage."""
        return replace(self, stages=[replace(stage, seconds=s) for stage, s in zip(self.stages, seconds, strict=True)]) if seconds else self

    def of(self, quantity: str) -> float:
        """The amount of one of ``QUANTITIES``."""
        return float(getattr(self, quantity))


@dataclass(frozen=True)
class Planned:
    """A row with its budget.

    Attributes:
        job: as it is run, but for seed and directory.
        quantity, asked: what is matched, and the amount; empty and None where nothing is.
    """

    row: Row
    job: JobConfig
    budget: Budget
    quantity: str = ""
    asked: float | None = None

    @property
    def miss(self) -> float:
        """The share by which the plan is above what was asked; negative: below."""
        return self.budget.of(self.quantity) / self.asked - 1 if self.asked else 0.0


# ---- what a job costs ----------------------------------------------------------------------------


def measure(job: JobConfig, steps: int = MEASURED_STEPS) -> Budget:
    """Counts ``job``: reads the data of the first ``steps`` steps of each stage, and runs their shapes on the
    meta device.

    Raises:
        InputError: it could not be trained.
    """
    assembly = assemble(job, device="meta")
    assembly.data.check_held_out()
    check_start(assembly)
    sizes = {name: parameter.numel() for name, parameter in assembly.model.named_parameters()}
    trains = {stage.index: assembly.freeze.trainable(stage.start) for stage in assembly.stages}
    flops = TrainingFlops(assembly.job)
    stages = [_measure_stage(assembly, position, trains[stage.index], flops, steps) for position, stage in enumerate(assembly.stages)]
    ever = frozenset().union(*trains.values())
    return Budget(sum(sizes.values()), sum(sizes[name] for name in ever), stages)


def _measure_stage(assembly: Assembly, position: int, trainable: frozenset[str], flops: TrainingFlops, most: int) -> StageCost:
    stage = assembly.stages[position]
    steps = min(stage.steps, most)
    samples, tokens, total = 0, 0, 0
    for batch in islice(assembly.data.batches(stage, stage.start), steps * stage.train.grad_accum_steps):
        samples += len(batch.sample_names)
        tokens += batch.num_targets
        total += flops.count(batch, trainable)
    return StageCost(stage.name, stage.steps, samples / steps, tokens / steps, total / steps)


def measured(job: JobConfig, folder: Path, steps: int = MEASURED_STEPS) -> Budget:
    """As ``measure``; what was counted is kept in ``folder`` and read from there the next time."""
    plain = replace(job, run=RunConfig(init_from=job.run.init_from), metrics=MetricsConfig(), checkpoint=CheckpointConfig(), hooks=[])
    stages = [replace(stage, optimizer={}, scheduler={}) for stage in job.stages]
    plain = replace(plain, stages=stages, eval=EvalConfig(), optimizer=type(job.optimizer)(), scheduler=type(job.scheduler)())
    path = folder / f"{digest(to_toml(plain), __version__)}{'' if steps == MEASURED_STEPS else f'-{steps}'}.json"
    if not path.is_file():
        write_text(path, json.dumps(asdict(measure(job, steps)), indent=1) + "\n")
    found: Budget = build_record(Budget, "budget", read_object(path), str(path))
    return found


# ---- rows that cost the same ---------------------------------------------------------------------


def plan_rows(study: Study, rows: Sequence[Row]) -> list[Planned]:
    """Every row with the budget that the study asks for.

    Raises:
        InputError: a row cannot get it.
    """
    asked, planned = None, []
    for row in rows:
        planned.append(found := plan_row(study, row, asked))
        asked = found.asked
    return planned


def plan_row(study: Study, row: Row, asked: float | None, more: Sequence[str] = ()) -> Planned:
    """``row`` with the budget ``asked``; None: the budget of the study, or else what the row costs as it is
    written.

    Args:
        more: overrides, of tuning.
    """
    folder, match = study.dir / "budgets", study.cfg.match
    job = job_of(study, row, more)
    job = replace(job, train=replace(job.train, seed=study.cfg.seeds[0]))
    try:
        budget = measured(job, folder)
    except InputError as error:
        raise InputError(f"row {row.name!r}: {error}") from None
    if match is None:
        _check_ranks(row, job, study.cfg.ranks)
        return Planned(row, job, budget)
    seconds = step_seconds(job, study.cfg, folder) if match.quantity == "wall_clock" else []
    budget = budget.timed(seconds)
    asked = asked or match.amount or budget.of(match.quantity)
    if budget.of(match.quantity) != asked:
        try:
            job = _moved(study, row, job, budget, match, asked, more)
        except InputError as error:
            raise InputError(f"row {row.name!r}: {match.quantity} = {format_number(asked)} by {match.by}: {error}") from None
        budget = measured(job, folder).timed(seconds)
    _check_ranks(row, job, study.cfg.ranks)
    return Planned(row, job, budget, match.quantity, asked)


def _check_ranks(row: Row, job: JobConfig, ranks: int) -> None:
    """Raises:
    InputError: the batches of ``job`` cannot be cut evenly for ``ranks`` processes.
    """
    for stage in job.resolved_stages():
        try:
            check_cut(stage.train.step_rows, ranks, stage.train.grad_accum_steps)
        except InputError as error:
            raise InputError(f"row {row.name!r}: [study] ranks = {ranks}: {error}") from None


def _moved(study: Study, row: Row, job: JobConfig, budget: Budget, match: MatchConfig, asked: float, more: Sequence[str]) -> JobConfig:
    if match.by == "steps":
        return _with_steps(job, budget, match.quantity, asked)
    if match.by == "batch_size":
        return _with_batches(job, asked / budget.of(match.quantity), study.cfg.ranks)
    if not known_key(match.by):
        raise InputError("no such key")
    seeded = ["--train.seed=" + str(study.cfg.seeds[0])]
    made = lambda value: job_of(study, row, [*more, *seeded, override(match.by, value)])
    section, key = match.by.split(".", 1)
    now = getattr(getattr(job, section), key, None)
    if type(now) is not int:
        raise InputError(f"{match.by} = {now!r}: is no whole number")
    cost = lambda value: measured(made(value), study.dir / "budgets", steps=4).of(match.quantity)
    return made(nearest_multiple(cost, now, match.multiple_of, asked))


def _with_steps(job: JobConfig, budget: Budget, quantity: str, asked: float) -> JobConfig:
    """``job`` with as many steps as ``asked`` costs. Stages keep their proportions, but for rounding."""
    if job.stages and job.train.max_steps:
        raise InputError(f"train.max_steps = {job.train.max_steps}: cuts the stages short; leave it out")
    cost = lambda stage: getattr(stage, {"train_flops": "flops", "wall_clock": "seconds"}.get(quantity, quantity))
    factor = asked / budget.of(quantity)
    steps = [round(stage.steps * factor) for stage in budget.stages]
    longest = max(range(len(steps)), key=lambda k: steps[k])
    rest = asked - sum(count * cost(stage) for count, stage in zip(steps, budget.stages, strict=True))
    steps[longest] += round(rest / cost(budget.stages[longest]))
    if min(steps) < 1:
        short = budget.stages[steps.index(min(steps))].name
        raise InputError(f"too little: stage {short!r} would have no step")
    if max(steps) > MAX_INT:
        raise InputError(f"too much: it needs {max(steps):.3g} steps; a stage has at most {MAX_INT:,}")
    if not job.stages:
        made = replace(job, train=replace(job.train, max_steps=steps[0], total_samples=0))
    else:
        made = replace(job, stages=[replace(stage, steps=count) for stage, count in zip(job.stages, steps, strict=True)])
    made.validate()
    return made


def _with_batches(job: JobConfig, factor: float, ranks: int) -> JobConfig:
    """``job`` with batches that are ``factor`` times as large."""

    def scaled(size: int, accum: int) -> int:
        unit = accum * ranks
        if (found := round(size * factor / unit) * unit) < unit:
            raise InputError(f"too little: train.batch_size = {size} would become {size * factor:.3g}")
        return found

    accum = job.train.grad_accum_steps
    stages = []
    for stage in job.stages:
        sizes = {key: stage.train[key] for key in ("batch_size", "rows_per_step") if type(stage.train.get(key)) is int}
        scaled_sizes = {key: scaled(size, stage.train.get("grad_accum_steps", accum)) for key, size in sizes.items()}
        stages.append(replace(stage, train=stage.train | scaled_sizes))
    key = "rows_per_step" if job.train.batch_size == AUTO else "batch_size"
    made = replace(job, train=replace(job.train, **{key: scaled(job.train.step_rows, accum)}), stages=stages)
    made.validate()
    return made


def nearest_multiple(cost: Callable[[int], float], start: int, unit: int, asked: float) -> int:
    """The multiple of ``unit`` whose ``cost``, which grows with it, is nearest to ``asked``.

    Args:
        start: where to begin.

    Raises:
        InputError: the smallest multiple costs more than twice as much; or the cost does not grow.
    """
    known: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in known:
            known[k] = cost(k * unit)
        return known[k]

    low, high = 0, max(1, start // unit)
    while at(high) < asked:
        if high * unit > 1 << 20 or (low and at(high) <= at(low)):
            raise InputError("it does not grow with this key")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < asked else (low, middle)
    if not low and at(high) > 2 * asked:
        raise InputError(f"too little: the smallest value, {unit}, has {format_number(at(high))}")
    return min((k for k in (low, high) if k), key=lambda k: abs(at(k) - asked)) * unit
