"""Exact match, with the images and without them: a model that does not look is visible at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.data.sample import SampleError, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import Question, Truths
from kempnerforge.eval.task import Found, QuestionTask, ReportCurve, ReportRow, percent
from kempnerforge.report.facts import Facts
from kempnerforge.util.numbers import format_percent, wilson_interval


@registry.register_task("exact_match")
@dataclass
class ExactMatch(QuestionTask):
    """The share of answers that are the truth, as the tokenizer writes them; see ``eval.exact_match``."""

    title: ClassVar[str] = "Exact match"
    counts: ClassVar[str | None] = ""

    def measure(self, exam: Exam) -> Found | None:
        return super().measure(exam) if exam.cfg.exact_match else None

    def points(self, answer: Answer) -> bool:
        return answer.right

    def rows(self, facts: Facts) -> list[ReportRow]:
        seen, blind, base = facts.result("exact_match"), facts.result("exact_match_blind"), facts.baseline()
        total = int(facts.result("questions") or 0)
        rows = []
        if seen is not None:
            about = "generated answer equals the truth"
            if total:
                low, high = wilson_interval(seen * total, total)
                about = f"{round(seen * total):,} of {total:,} right; 95\u00a0% interval {100 * low:.1f} to {format_percent(high)}"
                about += self.beside(facts)
            rows.append(ReportRow(self.title, percent(seen), "%", about, lead=True))
        if blind is not None:
            about = "image blanked" + (f"; {base[1]}: {format_percent(base[0])}" if base else ": the same questions")
            rows.append(ReportRow("Blind exact match", percent(blind), "%", about))
        if (other := facts.result("exact_match_shuffled")) is not None:
            rows.append(ReportRow("Shuffled exact match", percent(other), "%", "images of other questions"))
        if seen is not None and blind is not None:
            points = f"{100 * (seen - blind):+.1f}".replace("-", "−")
            rows.append(ReportRow("What the image adds", points, "points", "difference of the two"))
        return rows

    def curves(self) -> list[ReportCurve]:
        lines = {"eval/exact_match": "exact match", "eval/exact_match_blind": "image blanked"}
        lines |= {"eval/exact_match_shuffled": "images of other questions"}
        return [ReportCurve("Accuracy", "share of answers that match", lines, share=True, baseline=True)]


def question_only_prior(train: Sequence[Question], asked: Sequence[Question], encoder: Encoder) -> float:
    """Exact match of the best guess without an image: for each prompt (and number of images) its most
    frequent answer in training, else the most frequent of all, as the tokenizer writes them.
    """
    truths, overall = Truths(encoder), Counter[str]()
    by_prompt: dict[tuple[str | Text, int, int], Counter[str]] = defaultdict(Counter)
    for question in train:
        with suppress(SampleError):  # nor is it trained on
            truth = truths.of(question).text
            by_prompt[question.unseen][truth] += 1
            overall[truth] += 1
    if not overall or not asked:
        return 0.0
    guess = {prompt: answers.most_common(1)[0][0] for prompt, answers in by_prompt.items()}
    fallback = overall.most_common(1)[0][0]
    return sum(guess.get(q.unseen, fallback) == truths.of(q).text for q in asked) / len(asked)
