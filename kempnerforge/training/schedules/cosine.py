"""``scheduler.name = "cosine"``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.config.schedule import SchedulerConfig


@registry.register_schedule
@dataclass
class Cosine(SchedulerConfig):
    """Half a cosine (Loshchilov and Hutter 2017, "SGDR", equation 5, one cycle)."""

    name: str = "cosine"

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))
