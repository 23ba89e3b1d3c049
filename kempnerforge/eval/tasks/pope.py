"""POPE: yes or no questions about objects that are in an image, or are not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.questions import Question
from kempnerforge.eval.task import QuestionTask, Score


def says_yes(text: str) -> bool:
    """False where the first sentence has the word "no" or "not", as in the official code; every other answer
    is a yes.
    """
    return not {"no", "not"} & set(re.findall(r"[^\s,]+", text.split(".")[0].lower()))


@registry.register_task("pope")
@dataclass
class POPE(QuestionTask):
    """Accuracy, precision, recall and F1 of "yes", and the share of answers that are "yes".

    Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models", section 5. Questions
    whose true answer is not "yes" or "no" are not asked. Its three samplings (random, popular, adversarial)
    are evaluated one after another, each a file.
    """

    title: ClassVar[str] = "POPE accuracy"

    def question(self, question: Question) -> Question | None:
        return question if question.truth.strip().lower() in ("yes", "no") else None

    def points(self, answer: Answer) -> bool:
        return says_yes(answer.text) == says_yes(answer.question.truth)

    def further(self, score: Score) -> dict[str, float]:
        parts = {"": score} | {f"/{kind}": part for kind, part in score.kinds().items()}
        counted = {f"_{key}{kind}": value for kind, part in parts.items() for key, value in _counts(part).items()}
        return super().further(score) | counted


def _counts(score: Score) -> dict[str, float]:
    pairs = [(says_yes(answer.text), says_yes(answer.question.truth)) for answer in score.answers]
    answered_yes, true, both = sum(yes for yes, _ in pairs), sum(yes for _, yes in pairs), sum(yes and right for yes, right in pairs)
    return {
        "precision": both / max(1, answered_yes),
        "recall": both / max(1, true),
        "f1": 2 * both / max(1, answered_yes + true),
        "yes_ratio": answered_yes / max(1, len(pairs)),
    }
