"""Learning rate as a pure function of the step: a factor in [0, 1] on the peak, over one stage.

Step t (from 0) of T, with W steps of warm-up, or one if there are none, has the factor ``(t + 1) / W`` up to 1 at t = W - 1, where the decay
begins; at the last step, t = T - 1, it has arrived at ``min_lr_ratio``. "wsd" stays at 1 until its last D steps::

    progress = (t + 1 - W) / (T - W)        cosine, linear
    progress = (t + 1 - (T - D)) / D        wsd
    factor = min_lr_ratio + (1 - min_lr_ratio) * decay(progress)

These are transformers' closed forms at t + 1: there the first step has a rate of 0 and moves nothing, and the last one ends before the foot.
"""

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
    """The factor at ``step`` (from 0) of a stage of ``steps``. Where the warm-up takes all of them there is no decay.

    Args:
        warmup_steps: in place of the scheduler's.
    """
    warmup = max(1, cfg.warmup_steps if warmup_steps is None else warmup_steps)
    done = step + 1
    if done < warmup:
        return done / warmup
    falls_from = steps - cfg.decay_steps(steps) if cfg.name == "wsd" else warmup
    progress = min(1.0, max(0.0, (done - falls_from) / max(1, steps - falls_from)))
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * DECAYS[cfg.name](progress)
