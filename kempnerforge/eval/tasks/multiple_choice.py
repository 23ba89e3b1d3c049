"""Multiple choice by letter: what the model writes is read as one of the letters in the question."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.questions import Question, plain
from kempnerforge.eval.task import QuestionTask, Score

OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s+(\S.*?)\s*$", re.MULTILINE)
LETTER = re.compile(r"\(?([A-Z])(?:[).:,]|\s*$)")
NAMED = re.compile(r"\b(?i:answer|option)(?:\s+(?i:is))?\s*:?\s*\(?([A-Z])\b")


def options_of(prompt: str) -> dict[str, str]:
    """The options of a question, by their letters: lines such as "A. red", "(A) red" or "A) red", from A on
    without a gap.

    Empty: there are fewer than two.
    """
    found = dict[str, str]()
    for letter, text in OPTION.findall(prompt):
        if letter != chr(ord("A") + len(found)):
            return {}
        found[letter] = text
    return found if len(found) > 1 else {}


def letter_of(text: str, options: dict[str, str]) -> str:
    """Which of ``options`` a text names; empty: none that is certain.

    In this order: it is the text of an option; it begins with a letter that is followed by a bracket, a
    point, a colon, a comma or its end; it has "answer is B", "answer: B" or "option B".
    """
    text = plain(text)
    for letter, option in options.items():
        if plain(option).lower().rstrip(".") == text.lower().rstrip("."):
            return letter
    found = LETTER.match(text) or NAMED.search(text)
    return found[1] if found and found[1] in options else ""


@registry.register_task("multiple_choice")
@dataclass
class MultipleChoice(QuestionTask):
    """The share of answers that name the right letter.

    As in Lu et al. 2022 (ScienceQA) and Yue et al. 2023 (MMMU, appendix), but an answer that names no option
    is wrong, where MMMU draws one at random: their share is ``_no_letter``. Questions without options in
    their prompt, or whose true answer is none of them, are not asked.
    """

    title: ClassVar[str] = "Multiple choice"

    def question(self, question: Question) -> Question | None:
        return question if letter_of(question.truth, options_of(question.prompt)) else None

    def points(self, answer: Answer) -> bool:
        options = options_of(answer.question.prompt)
        return letter_of(answer.text, options) == letter_of(answer.question.truth, options)

    def further(self, score: Score) -> dict[str, float]:
        missed = sum(not letter_of(answer.text, options_of(answer.question.prompt)) for answer in score.answers)
        return super().further(score) | {"_no_letter": missed / max(1, score.total)}
