"""TensorBoard event files in ``events/`` of the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.config import JobConfig, TrackerConfig, registry
from kempnerforge.training.trackers.tracker import Tracker


@registry.register_tracker_config
@dataclass
class TensorBoardConfig(TrackerConfig):
    """TensorBoard event files in ``events/``."""

    type: str = "tensorboard"


@registry.register_tracker("tensorboard")
class TensorBoard(Tracker):
    """TensorBoard is imported only when a run starts."""

    def start(self, job: JobConfig, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "events"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self._writer.close()
