"""Relaxed accuracy, the metric of questions about charts: numbers may be a few percent off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.task import QuestionTask
from kempnerforge.util.errors import InputError


def number(text: str) -> float | None:
    """``text`` as a number, percent as a share of one; None: it is no finite number."""
    try:
        found = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


@registry.register_task("relaxed_accuracy")
@dataclass
class RelaxedAccuracy(QuestionTask):
    """The share of answers that are within 5 % of a true number, or equal to a true text in any case of
    letters.

    Methani et al. 2020, "PlotQA", section 5; Masry et al. 2022, "ChartQA", section 5.1. A true 0 has to be
    met as a text.

    Attributes:
        tolerance: of a number, as a share of the true one.
    """

    title: ClassVar[str] = "Relaxed accuracy"

    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance = {self.tolerance}: must lie in [0, 1)")

    def points(self, answer: Answer) -> bool:
        return any(self._near(answer.text.strip(), given.strip()) for given in answer.question.given)

    def _near(self, predicted: str, truth: str) -> bool:
        claimed, true = number(predicted), number(truth)
        if claimed is not None and true:
            return abs(claimed - true) / abs(true) <= self.tolerance
        return predicted.lower() == truth.lower()
