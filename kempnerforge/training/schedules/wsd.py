"""``scheduler.name = "wsd"``."""

from __future__ import annotations

from dataclasses import dataclass

from kempnerforge.config import registry
from kempnerforge.training.schedules.linear import Linear


@registry.register_schedule
@dataclass
class WarmupStableDecay(Linear):
    """Warm-up, stable, decay (Hu et al. 2024, "MiniCPM"): a straight line over the stage's last steps."""

    name: str = "wsd"

    def decay_start(self, steps: int, warmup: int) -> int:
        """One or more steps decay if any do, and never the first, which has the peak."""
        decaying = min(steps - 1, max(1, round(self.decay_fraction * steps))) if self.decay_fraction else 0
        return steps - decaying
