"""What ``check`` and ``--dry-run`` show of a job before it trains: modules, what trains, what it costs, and one batch through the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kempnerforge.config import JobConfig, Stage
from kempnerforge.distributed.world import compute_dtype
from kempnerforge.training.accounting import Cost, cost, part_of
from kempnerforge.training.freeze import freeze_boundaries, trainable_names
from kempnerforge.training.optimizer import lr_scales, muon_names
from kempnerforge.training.setup import Assembly, assemble


@dataclass(frozen=True)
class StagePlan:
    """One stage, as it will run.

    Attributes:
        lr_scale: part -> factors on the learning rate in it.
        row_length: positions in a row of the first batch.
        useful: share of its positions that are no padding.
    """

    stage: Stage
    cost: Cost
    lr_scale: dict[str, list[float]]
    row_length: int
    useful: float


@dataclass(frozen=True)
class Plan:
    """A whole job."""

    assembly: Assembly
    dtype: torch.dtype
    stages: list[StagePlan]


def plan(job: JobConfig) -> Plan:
    """Builds the job on the meta device, takes the first batch of every stage and counts.

    Raises:
        ValueError: something does not fit; as training would say.
    """
    assembly = assemble(job, device="meta")
    _check_patterns(assembly)
    dtype = compute_dtype(job.train.mixed_precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Plan(assembly, dtype, [_plan_stage(assembly, stage, dtype) for stage in assembly.stages])


def _check_patterns(assembly: Assembly) -> None:
    """
    Raises:
        ValueError: a pattern of a freeze spec or a learning-rate scale matches nothing, or nothing would train.
    """
    job = assembly.job
    patterns = job.vlm.module_patterns if job.vlm is not None else {}
    names = [name for name, _ in assembly.model.named_parameters()]
    freeze_boundaries(job, names, patterns)
    for stage in assembly.stages:
        lr_scales(names, stage.optimizer, patterns)


def _plan_stage(assembly: Assembly, stage: Stage, dtype: torch.dtype) -> StagePlan:
    job, model = assembly.job, assembly.model
    patterns = job.vlm.module_patterns if job.vlm is not None else {}
    names = [name for name, _ in model.named_parameters()]
    trainable = trainable_names(names, job.freeze_at(stage.start), patterns)
    scales = lr_scales(names, stage.optimizer, patterns)
    to_muon = muon_names(model) if stage.optimizer.name == "muon" else frozenset()
    batch = next(assembly.batches(stage, stage.start))
    counted = cost(model, batch, trainable, {name: 1 if name in to_muon else 2 for name in names}, dtype.itemsize)
    by_part: dict[str, set[float]] = {}
    for name in names:
        by_part.setdefault(part_of(name), set()).add(scales[name])
    positions = batch.input_ids.numel()
    return StagePlan(stage, counted, {k: sorted(v) for k, v in by_part.items()}, batch.input_ids.shape[1], batch.useful_tokens / positions)


def dry_run(job: JobConfig) -> list[str]:
    """Builds everything for real and takes the first batch of every stage through model and loss, writing nothing. Returns lines."""
    assembly = assemble(job)
    _check_patterns(assembly)
    lines = [f"warning: {line}" for line in job.warnings()]
    for stage in assembly.stages:
        batch = next(assembly.batches(stage, stage.start))
        with torch.no_grad():
            loss = float(assembly.model(batch).loss) / max(1, batch.num_targets)
        rows, length = batch.input_ids.shape
        lines.append(
            f"stage {stage.name}: first batch {rows} x {length}, {batch.num_targets} trained tokens, loss {loss:.4f} (fp32, fresh weights)"
        )
    return [*lines, "nothing was written"]
