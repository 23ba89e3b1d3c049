"""``scheduler.name = "constant"``."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.config.schedule import SchedulerConfig


@registry.register_schedule
@dataclass
class Constant(SchedulerConfig):
    """The peak, from the end of the warm-up to the end of the stage."""

    name: str = "constant"

    def decay(self, progress: float) -> float:
        return 1.0
