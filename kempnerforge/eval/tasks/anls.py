"""Average normalised Levenshtein similarity, the metric of questions about documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.questions import plain
from kempnerforge.eval.task import QuestionTask
from kempnerforge.util.errors import InputError


def distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements that make ``a`` into ``b`` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


@registry.register_task("anls")
@dataclass
class ANLS(QuestionTask):
    """1 minus the edit distance to the nearest given answer, as a share of the longer length; 0 where that
    share is the threshold or more.

    Biten et al. 2019, "Scene Text Visual Question Answering", equations 1 and 2. Letters are compared in
    lower case, white space normalised, as in the evaluation of DocVQA.

    Attributes:
        threshold: shares from this one on count as wrong.
    """

    title: ClassVar[str] = "ANLS"

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold = {self.threshold}: must lie in (0, 1]")

    def points(self, answer: Answer) -> float:
        predicted = plain(answer.text.lower())
        truths = [plain(given.lower()) for given in answer.question.given]
        shares = [distance(predicted, truth) / max(len(predicted), len(truth)) for truth in truths if truth]
        return max((1 - share for share in shares if share < self.threshold), default=0.0)
