"""Hands what is recorded to the trackers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from kempnerforge.config import MetricsConfig, registry
from kempnerforge.training.trackers.tracker import Tracker
from kempnerforge.training.trainer import Hook, Trainer


class Tracking(Hook):
    def __init__(self, cfg: MetricsConfig, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.trackers: list[Tracker] = [registry.trackers.get(each.type)(each) for each in cfg.all_trackers()]
        self._started = ExitStack()

    def start(self, trainer: Trainer) -> None:
        for tracker in self.trackers if trainer.world.is_main else ():
            tracker.start(trainer.job, self.run_dir, trainer.step)
            self._started.callback(tracker.finish)

    def record(self, trainer: Trainer, values: dict[str, float]) -> None:
        for tracker in self.trackers if trainer.world.is_main else ():
            tracker.log(trainer.step, values)

    def close(self) -> None:
        self._started.close()
