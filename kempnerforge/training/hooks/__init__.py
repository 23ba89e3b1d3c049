"""Everything periodic, one file each. ``default_hooks`` is the order in which they run."""

from __future__ import annotations

from pathlib import Path

from kempnerforge.config import registry
from kempnerforge.training.hooks.bad_samples import BadSamples
from kempnerforge.training.hooks.checkpoints import Checkpoints
from kempnerforge.training.hooks.console import ConsoleProgress
from kempnerforge.training.hooks.evaluation import Evaluation
from kempnerforge.training.hooks.metrics import Metrics
from kempnerforge.training.hooks.report import Report
from kempnerforge.training.hooks.signals import Signals
from kempnerforge.training.hooks.tracking import Tracking
from kempnerforge.training.setup import Assembly
from kempnerforge.training.trainer import Hook


def default_hooks(assembly: Assembly, run_dir: Path, leaving: bool = False) -> tuple[list[Hook], Checkpoints]:
    """The hooks of a run, and among them the one that restores it. A step is recorded, then evaluated, then
    saved: a checkpoint never lies ahead of its metrics. ``leaving``: as in ``Signals``.
    """
    job = assembly.job
    checkpoints, evaluation = Checkpoints(job.checkpoint, run_dir), Evaluation(job.eval)
    recording = [Metrics(job.metrics, run_dir), BadSamples(run_dir), Tracking(job.metrics, run_dir)]
    own = [registry.hooks.get(each.type)(each, run_dir) for each in job.hooks]
    return [
        Signals(run_dir, leaving),
        ConsoleProgress(),
        *recording,
        evaluation,
        *own,
        checkpoints,
        Report(run_dir, evaluation),
    ], checkpoints
