"""A task: a metric with its questions and its part of the report. ``docs/extend/task.md`` has an example."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer, Answers, ask
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import Question
from kempnerforge.report.facts import Facts


@dataclass(frozen=True)
class Score(Answers):
    """Answers and what each is worth.

    Attributes:
        points: of each answer, in their order; of tasks that call an answer right or wrong True and False.
    """

    points: Sequence[float] = ()

    @property
    def right(self) -> float:
        """The sum of all points."""
        return sum(self.points)

    @property
    def mean(self) -> float:
        return self.right / max(1, self.total)

    @cached_property
    def by_truth(self) -> dict[str, tuple[float, int]]:
        """(points, total) of the questions with this answer, as the tokenizer writes it."""
        return self._by(lambda answer: answer.truth.text)

    @cached_property
    def by_kind(self) -> dict[str, tuple[float, int]]:
        """(points, total) of the questions of this kind, where they have one."""
        return {kind: counts for kind, counts in self._by(lambda answer: answer.question.kind).items() if kind}

    def _by(self, key: Callable[[Answer], str]) -> dict[str, tuple[float, int]]:
        groups: dict[str, list[float]] = defaultdict(list)
        for answer, points in zip(self.answers, self.points, strict=True):
            groups[key(answer)].append(points)
        return {name: (sum(points), len(points)) for name, points in sorted(groups.items())}


@dataclass(frozen=True)
class Found:
    """What a task has measured.

    Attributes:
        values: numbers by the key under which they are recorded.
        seeing, blind: the answers with the images and without; None where no question was asked.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    seeing: Score | None = None
    blind: Score | None = None


# ---- the report -----------------------------------------------------------------------------------------


class ReportRow(NamedTuple):
    """A score in the report; all plain text.

    Attributes:
        about: the line below it.
        lead: it is what a reader looks for first.
    """

    title: str
    value: str
    unit: str = ""
    about: str = ""
    lead: bool = False


class ReportCurve(NamedTuple):
    """A chart over the steps.

    Attributes:
        lines: what a curve is called, by the key of its values.
        share: values lie between 0 and 1 and are shown as percent.
        baseline: show what answers without looking reach, too.
    """

    title: str
    label: str
    lines: Mapping[str, str]
    share: bool = False
    baseline: bool = False


def percent(share: float) -> str:
    """In percent; two decimals near the upper end, where they matter."""
    return f"{100 * share:.{2 if 0.98 <= share < 1 else 1}f}"


# ---- tasks ----------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A metric. The fields of a subclass are its keys in a TOML file, under ``[eval.options.NAME]``.

    Attributes:
        title: in the report.
        reads_held_out: False: it reads plain text alone, and is measured before the others.
    """

    title: ClassVar[str] = ""
    reads_held_out: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """That it is registered under."""
        return registry.tasks.name_of(type(self)) or type(self).__name__

    def measure(self, exam: Exam) -> Found | None:
        """What is found, the same on all ranks; None: there is nothing to measure."""
        raise NotImplementedError

    def rows(self, facts: Facts) -> list[ReportRow]:
        """Its scores in the report."""
        return []

    def curves(self) -> list[ReportCurve]:
        """Its charts in the report."""
        return []


@dataclass
class QuestionTask(Task):
    """A task that scores answers to held-out questions. A subclass says what one answer is worth: ``points``.

    It records ``eval/NAME``, the mean; ``eval/NAME_questions``, ``_unreadable`` and ``_too_long``: the
    questions asked, those that could not be, and those whose true answer is longer than the model may write;
    ``eval/NAME/KIND`` by kind of question. With ``eval.blind`` the same questions are asked with blank
    images: ``eval/NAME_blind``.

    Attributes:
        max_new_tokens: of one answer; 0: ``eval.max_new_tokens``.
        share: the mean is a share, shown as percent.
        counts: what the keys of the counts begin with; None: NAME and "_".
    """

    share: ClassVar[bool] = True
    counts: ClassVar[str | None] = None

    max_new_tokens: int = 0

    def points(self, answer: Answer) -> float:
        """What one answer is worth."""
        raise NotImplementedError

    def all_points(self, answers: Sequence[Answer]) -> Sequence[float]:
        """What each of all answers is worth, for metrics that compare them with each other."""
        return [self.points(answer) for answer in answers]

    def question(self, question: Question) -> Question | None:
        """A held-out question as this task asks it; None: it does not."""
        return question

    def answers(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Answers:
        """The model's answers. By default it generates them, once for all tasks that ask the same."""
        return ask(exam, asked, blind=blind, max_new_tokens=self.max_new_tokens)

    def further(self, score: Score) -> dict[str, float]:
        """Values besides the mean, by what follows NAME in their keys: by kind of question."""
        return {f"/{kind}": points / total for kind, (points, total) in score.by_kind.items()}

    def measure(self, exam: Exam) -> Found | None:
        if exam.held_out is None or not (asked := exam.held_out.draw(exam.limit, exam.encoder.seed, self.question)):
            return None
        key, count = f"eval/{self.name}", f"eval/{self._counts}"
        seeing = self._score(exam, asked, blind=False)
        unreadable = len(exam.held_out.skipped) + len(seeing.unreadable)
        values = {
            key: seeing.mean,
            f"{count}questions": seeing.total,
            f"{count}unreadable": unreadable,
            f"{count}too_long": seeing.too_long,
        }
        values |= {key + suffix: value for suffix, value in self.further(seeing).items()}
        if not (exam.cfg.blind and exam.encoder.layout.image_size):
            return Found(values, seeing)
        same = {answer.number: answer.question for answer in seeing.answers}  # so that the two can be compared
        blind = self._score(exam, same, blind=True)
        values |= {f"{key}_blind": blind.mean, **{f"{key}_blind{suffix}": value for suffix, value in self.further(blind).items()}}
        return Found(values, seeing, blind)

    def rows(self, facts: Facts) -> list[ReportRow]:
        seen, blind = facts.result(self.name), facts.result(f"{self.name}_blind")
        if seen is None:
            return []
        shown = (lambda value: percent(value)) if self.share else (lambda value: f"{value:.4g}")
        unit, title = "%" if self.share else "", self.title or self.name
        rows = [ReportRow(title, shown(seen), unit, self.beside(facts).removeprefix("; "))]
        return rows if blind is None else [*rows, ReportRow(f"Blind {title}", shown(blind), unit, "image blanked: the same questions")]

    def curves(self) -> list[ReportCurve]:
        key, title = f"eval/{self.name}", self.title or self.name
        return [ReportCurve(title, "mean over questions", {key: title, f"{key}_blind": "image blanked"}, self.share)]

    def beside(self, facts: Facts) -> str:
        """What has to be known of the questions, each part after a semicolon."""
        asked = "" if self.counts == "" else facts.beside(f"{self._counts}questions", "questions")
        cut = facts.beside(f"{self._counts}too_long", f"cannot be written in {'' if self.max_new_tokens else 'eval.'}max_new_tokens")
        return asked + facts.beside(f"{self._counts}unreadable", "could not be asked") + cut

    @property
    def _counts(self) -> str:
        return f"{self.name}_" if self.counts is None else self.counts

    def _score(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Score:
        said = self.answers(exam, asked, blind)
        return Score(said.asked, said.answers, said.unreadable, self.all_points(said.answers))
