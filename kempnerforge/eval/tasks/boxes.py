"""Boxes: accuracy of grounding at an overlap of one half, and mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.codecs import Box, decode_boxes
from kempnerforge.eval.questions import Question
from kempnerforge.eval.task import QuestionTask, Score

OVERLAPS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101)
MOST = 100
"""Boxes of one label in one answer that count, the first ones."""


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 of two without an area."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    both = max(0.0, width) * max(0.0, height)
    union = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b)) - both
    return both / union if union else 0.0


def all_found(predicted: Sequence[Box], true: Sequence[Box], overlap: float) -> bool:
    """Whether there are as many boxes as true ones, and each can be matched to another true box with an
    overlap of at least ``overlap``.
    """
    from scipy.optimize import linear_sum_assignment

    if len(predicted) != len(true):
        return False
    near = [[iou(a, b) >= overlap for b in true] for a in predicted]
    return not predicted or all(near[row][column] for row, column in zip(*linear_sum_assignment(near, maximize=True), strict=True))


def average_precision(predicted: Sequence[Sequence[Box]], true: Sequence[Sequence[Box]], overlap: float) -> float:
    """Area below the curve of precision over recall at 101 recalls, of one label. At least one true box is
    needed.

    Lin et al. 2014, "Microsoft COCO", as its evaluation code computes it; the boxes of an answer are ranked
    by their order in it, as there are no confidences: all first ones, then all second ones.
    """
    ranked: list[tuple[int, bool]] = []
    for boxes, truths in zip(predicted, true, strict=True):
        free = list(range(len(truths)))
        for rank, box in enumerate(boxes[:MOST]):
            score, best = max(((iou(box, truths[k]), k) for k in free), default=(0.0, -1))
            right = score >= overlap - 1e-10
            ranked.append((rank, right))
            if right:
                free.remove(best)
    right = np.array([hit for _, hit in sorted(ranked, key=lambda one: one[0])], dtype=float)  # stable
    found = right.cumsum()
    precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
    at = np.searchsorted(found / sum(map(len, true)), RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())


def mean_average_precision(predicted: Sequence[Sequence[Box]], true: Sequence[Sequence[Box]], overlaps: Sequence[float]) -> float:
    """Mean of ``average_precision`` over ``overlaps`` and the labels of the true boxes."""
    labels = {box.label for boxes in true for box in boxes}
    of = lambda all_boxes, label: [[box for box in boxes if box.label == label] for boxes in all_boxes]
    scores = [average_precision(of(predicted, label), of(true, label), overlap) for label in sorted(labels) for overlap in overlaps]
    return sum(scores) / max(1, len(scores))


@registry.register_task("boxes")
@dataclass
class Boxes(QuestionTask):
    """The share of answers whose boxes are the true ones, each with an overlap (IoU) of at least 0.5; mean
    average precision beside it.

    With one box a question it is the accuracy of referring expressions (Yu et al. 2016, "Modeling Context in
    Referring Expressions"); with several it is Pr@(F1 = 1, IoU >= 0.5) of He et al. 2023, "GREC". Labels do
    not count there. ``_map`` is COCO's AP over overlaps from 0.5 to 0.95, ``_map50`` at 0.5, by the labels of
    the boxes (Lin et al. 2014). Boxes are written as PaliGemma writes them; questions whose true answer has
    none are not asked.
    """

    title: ClassVar[str] = "Boxes, accuracy at IoU 0.5"

    def question(self, question: Question) -> Question | None:
        return question if decode_boxes(question.truth) else None

    def points(self, answer: Answer) -> bool:
        return all_found(decode_boxes(answer.text), decode_boxes(answer.question.truth), OVERLAPS[0])

    def further(self, score: Score) -> dict[str, float]:
        predicted = [decode_boxes(answer.text) for answer in score.answers]
        true = [decode_boxes(answer.question.truth) for answer in score.answers]
        precisions = {
            "_map": mean_average_precision(predicted, true, OVERLAPS),
            "_map50": mean_average_precision(predicted, true, OVERLAPS[:1]),
        }
        return super().further(score) | precisions
