"""CIDEr-D, the metric of captions: words that the references share, weighted by how rare they are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.task import QuestionTask

MOST, SIGMA = 4, 6.0
WORDS = re.compile(r"\w+(?:['’-]\w+)*")

NGram = tuple[str, ...]
Counts = list[Counter[NGram]]
"""How often each n-gram is in a text, for n = 1 to ``MOST``."""


def ngrams(words: Sequence[str]) -> Counts:
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, MOST + 1)]


def cider_d(answers: Sequence[Sequence[str]], given: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each answer, from 0 to 10.

    Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", equations 1 to 3, with the
    clipping and the length penalty of section 6 (CIDEr-D), which the COCO evaluation uses.

    Args:
        answers: the words of each answer.
        given: for each answer, the words of its references. How rare an n-gram is, is counted over all of
            them.
    """
    references = [[ngrams(words) for words in each] for each in given]
    seen = Counter(gram for each in references for gram in {gram for counts in each for of_n in counts for gram in of_n})
    rare = {gram: math.log(len(given)) - math.log(times) for gram, times in seen.items()}
    unseen = math.log(max(1, len(given)))

    def vector(counts: Counter[NGram]) -> tuple[dict[NGram, float], float]:
        weights = {gram: times * rare.get(gram, unseen) for gram, times in counts.items()}
        return weights, math.sqrt(sum(weight**2 for weight in weights.values()))

    def similar(one: Counts, other: Counts) -> float:
        """Mean over n of the clipped cosine, less the further apart the lengths are."""
        total = 0.0
        for counts, other_counts in zip(one, other, strict=True):
            (a, length_a), (b, length_b) = vector(counts), vector(other_counts)
            if length_a and length_b:
                total += sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b) / (length_a * length_b)
        apart = sum(one[0].values()) - sum(other[0].values())
        return total / MOST * math.exp(-(apart**2) / (2 * SIGMA**2))

    candidates = [ngrams(words) for words in answers]
    pairs = zip(candidates, references, strict=True)
    return [10 * sum(similar(one, other) for other in each) / len(each) for one, each in pairs]


@registry.register_task("cider")
@dataclass
class CIDEr(QuestionTask):
    """The mean of ``cider_d``. Words are in lower case, without punctuation; the COCO evaluation splits words
    by the Penn Treebank's rules.

    All given answers of a question are its references. A mixture of few captions says little: with one
    question every score is 0.
    """

    title: ClassVar[str] = "CIDEr-D"
    share: ClassVar[bool] = False

    def all_points(self, answers: Sequence[Answer]) -> Sequence[float]:
        words = lambda text: WORDS.findall(text.lower())
        return cider_d([words(answer.text) for answer in answers], [[words(text) for text in answer.question.given] for answer in answers])
