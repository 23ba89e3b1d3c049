"""VQA accuracy: the answers of ten people, and how many of them agree with the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.task import QuestionTask

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # as in the official code, where `<=` was meant to be a lookbehind
DIGITS_COMMA = re.compile(r"\d,\d")
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0"} | {
    word: str(value) for value, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """The table of the official code: a word in which one apostrophe is missing -> with all of them."""
    missing = {word[:at] + word[at + 1 :]: word for word in CONTRACTED.split() for at, char in enumerate(word) if char == "'"}
    return missing | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def normalised(text: str) -> str:
    """``text`` as the official evaluation compares it: without punctuation and articles, numbers as digits,
    lower case.
    """
    found = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:
        joined = f"{mark} " in text or f" {mark}" in text or DIGITS_COMMA.search(text)
        found = found.replace(mark, "" if joined else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", found).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@registry.register_task("vqa_accuracy")
@dataclass
class VQAAccuracy(QuestionTask):
    """The mean over all annotators of min(1, agreeing annotators among the others / 3).

    Antol et al. 2015, "VQA: Visual Question Answering", section 3, in the form of the official code
    (VQA/PythonEvaluationTools), which leaves each annotator out once. Both sides are normalised as there.
    With ten annotators n that agree give min(1, 0.3 n). A row has all answers as a list in its answer column,
    repeated ones repeated; one answer alone is scored by equality.
    """

    title: ClassVar[str] = "VQA accuracy"

    def points(self, answer: Answer) -> float:
        predicted = normalised(answer.text)
        agree = [normalised(given) == predicted for given in answer.question.given]
        if len(agree) == 1:
            return float(agree[0])
        return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)
