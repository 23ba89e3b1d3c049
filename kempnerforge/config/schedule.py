"""``[scheduler]``: the learning rate as a function of the step. ``training/schedules`` has a file for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from kempnerforge.config.checks import at_least, fraction
from kempnerforge.util.errors import PluginError
from kempnerforge.util.plugin_returns import check_returns, finite_number, gives

ROUNDING = 1e-6
"""By so much a factor may be outside [0, 1]."""


@dataclass
class SchedulerConfig(ABC):
    """A factor in [0, 1] on the peak ``optimizer.lr`` over one stage.

    Subclasses register with ``@registry.register_schedule``.

    Step t (from 0) of T, with W steps of warm-up, or one if there are none, has the factor ``(t + 1) / W`` up
    to 1 at t = W - 1. The decay begins at step B, which is W unless the schedule says otherwise, and ends at
    the last step, t = T - 1, at ``min_lr_ratio``::

        progress = (t + 1 - B) / (T - B)
        factor = min_lr_ratio + (1 - min_lr_ratio) * decay(progress)

    These are transformers' closed forms at t + 1: there the first step has a rate of 0 and moves nothing, and
    the last one ends before ``min_lr_ratio``.

    Attributes:
        name: "cosine", "linear", "wsd" (warm-up, stable, decay), "constant", or a plugin's name.
        warmup_steps: of the linear warm-up; the last of them has the peak.
        min_lr_ratio: the factor at the last step of the stage.
        decay_fraction: share of the stage that "wsd" decays in, at its end.
    """

    name: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, factor=_not_a_factor, decay_start=finite_number)

    def __post_init__(self) -> None:
        at_least(self, 0, "warmup_steps")
        fraction(self, "min_lr_ratio", "decay_fraction")

    @abstractmethod
    def decay(self, progress: float) -> float:
        """From 1 at ``progress`` 0 to 0 at 1; never outside of that."""

    def decay_start(self, steps: int, warmup: int) -> int:
        """B: how many of ``steps`` are done when the decay begins."""
        return warmup

    def factor(self, step: int, steps: int, warmup_steps: int | None = None) -> float:
        """The factor at ``step`` (from 0) of a stage of ``steps``. If all of them warm up, there is no decay.

        Args:
            warmup_steps: in place of the section's.

        Raises:
            PluginError: ``decay`` gives no number in [0, 1].
        """
        warmup = max(1, self.warmup_steps if warmup_steps is None else warmup_steps)
        done = step + 1
        if done < warmup:
            return done / warmup
        start = self.decay_start(steps, warmup)
        progress = min(1.0, max(0.0, (done - start) / max(1, steps - start)))
        decay = self.decay(progress)
        if wrong := _not_a_factor(decay):
            raise PluginError(f"{type(self).__name__}.decay({progress:.6g}) at step {step} of {steps}, counted from 0: {wrong}")
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * decay


def _not_a_factor(value: Any, *_: Any, **__: Any) -> str:
    right = isinstance(value, float | int) and -ROUNDING <= value <= 1 + ROUNDING
    return "" if right else gives(value, "a number from 0 to 1")
