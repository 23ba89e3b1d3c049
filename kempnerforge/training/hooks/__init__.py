"""Everything periodic, one file each. ``default_hooks`` is the order in which they run."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.config import registry
from kempnerforge.training.hooks.bad_samples import BadSamples
from kempnerforge.training.hooks.checkpoints import Checkpoints
from kempnerforge.training.hooks.console import ConsoleProgress
from kempnerforge.training.hooks.diagnosis import Diagnosis
from kempnerforge.training.hooks.evaluation import Evaluation
from kempnerforge.training.hooks.metrics import Metrics
from kempnerforge.training.hooks.report import Report
from kempnerforge.training.hooks.signals import Signals
from kempnerforge.training.hooks.tracking import Tracking
from kempnerforge.training.setup import Assembly
from kempnerforge.training.trainer import Hook


def default_hooks(assembly: Assembly, run_dir: Path, ends_process: bool = False) -> tuple[list[Hook], Checkpoints]:
    """The hooks of a run, and among them the one that restores it.

    A step is recorded, then evaluated, then saved: a checkpoint is never ahead of its metrics.

    Args:
        ends_process: see ``Signals``.
    """
    job = assembly.job
    checkpoints, evaluation = Checkpoints(job.checkpoint, run_dir), Evaluation(job.eval)
    hooks = [
        Signals(run_dir, ends_process),
        ConsoleProgress(),
        Metrics(job.metrics, run_dir),
        BadSamples(run_dir),
        Tracking(job.metrics, run_dir),
        *([Diagnosis(job.metrics)] if job.metrics.diagnosis else []),
        evaluation,
        *(registry.hooks.get(table.type)(table, run_dir) for table in job.hooks),
        checkpoints,
        Report(run_dir, evaluation, checkpoints),
    ]
    return hooks, checkpoints
