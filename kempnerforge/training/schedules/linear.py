"""``scheduler.name = "linear"``."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.config.schedule import SchedulerConfig


@registry.register_schedule
@dataclass
class Linear(SchedulerConfig):
    """A straight line from the peak to ``min_lr_ratio``."""

    name: str = "linear"

    def decay(self, progress: float) -> float:
        return 1 - progress
