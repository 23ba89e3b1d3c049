"""Pointing: F1 of points that are matched one to one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.codecs import NO_POINTS, Point, decode_points
from kempnerforge.eval.questions import Question
from kempnerforge.eval.task import QuestionTask, Score
from kempnerforge.util.errors import InputError


class PointCounts(NamedTuple):
    """Points of an answer, or of all: those that are right, those that the model wrote, the true ones."""

    right: int
    predicted: int
    true: int


def hits(predicted: Sequence[Point], true: Sequence[Point], within: float) -> int:
    """Points that are matched in the assignment with most pairs not further apart than ``within`` (Kuhn 1955,
    the Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    if not predicted or not true:
        return 0
    near = [[math.hypot(a.x - b.x, a.y - b.y) <= within for b in true] for a in predicted]
    rows, columns = linear_sum_assignment(near, maximize=True)
    return sum(near[row][column] for row, column in zip(rows, columns, strict=True))


@registry.register_task("points")
@dataclass
class Points(QuestionTask):
    """F1 of the points in each answer, its mean over questions; beside it precision and recall over all
    points.

    Deitke et al. 2024, "Molmo and PixMo", whose evaluation of pointing matches points one to one and counts
    those in the object's mask. Here a point is right within a distance of the true one, as rows hold points
    and no masks. Where nothing is to be pointed at, an answer without points scores 1. Questions whose true
    answer has no points, and is not "There are none.", are not asked.

    Attributes:
        within: the distance, as a share of the image's side.
    """

    title: ClassVar[str] = "Points, F1"

    within: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.within <= 1:
            raise InputError(f"within = {self.within}: must lie in (0, 1]")

    def question(self, question: Question) -> Question | None:
        return question if decode_points(question.truth) or question.truth.strip() == NO_POINTS else None

    def points(self, answer: Answer) -> float:
        found = self._counted(answer)
        both = found.predicted + found.true
        return 2 * found.right / both if both else 1.0

    def further(self, score: Score) -> dict[str, float]:
        found = PointCounts(*(sum(column) for column in zip(*map(self._counted, score.answers), strict=True)))
        return super().further(score) | {"_precision": found.right / max(1, found.predicted), "_recall": found.right / max(1, found.true)}

    def _counted(self, answer: Answer) -> PointCounts:
        predicted, true = decode_points(answer.text), decode_points(answer.question.truth)
        return PointCounts(hits(predicted, true, self.within), len(predicted), len(true))
