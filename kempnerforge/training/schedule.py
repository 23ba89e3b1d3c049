"""Learning rate as a pure function of the step: a factor in [0, 1] on the peak, over one stage."""

from __future__ import annotations

import math
from collections.abc import Callable

from kempnerforge.config import SchedulerConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def lr_factor(cfg: SchedulerConfig, step: int, steps: int, warmup_steps: int | None = None) -> float:
    """The factor at ``step`` (from 0) of a stage of ``steps``: linear warm-up times a decay to ``min_lr_ratio``.

    Args:
        warmup_steps: in place of the scheduler's.
    """
    rising = cfg.warmup_steps if warmup_steps is None else warmup_steps
    warmup = min(1.0, (step + 1) / rising) if rising else 1.0
    start = steps * (1 - cfg.decay_fraction) if cfg.name == "wsd" else 0
    progress = min(1.0, max(0.0, (step - start) / max(1.0, steps - start)))
    return warmup * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * DECAYS[cfg.name](progress))
