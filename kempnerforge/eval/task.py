"""A task: a metric with its questions and its part of the report. ``docs/extend/task.md`` has an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from kempnerforge.config import registry
from kempnerforge.data.sample import ImageSource
from kempnerforge.eval.answers import Answer, Answers, ask
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import Question
from kempnerforge.report.facts import Facts
from kempnerforge.util.plugin_returns import check_returns, finite_number, gives, instance, not_numbers, sequence_of


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
        groups: dict[str, list[float]] = defaultdict(list)
        for answer, points in zip(self.answers, self.points, strict=True):
            groups[answer.truth.text].append(points)
        return {name: (sum(points), len(points)) for name, points in sorted(groups.items())}

    def kinds(self) -> dict[str, Score]:
        """The part of each kind of question, where they have one."""
        groups: dict[str, list[int]] = defaultdict(list)
        for at, answer in enumerate(self.answers):
            groups[answer.question.kind].append(at)
        return {kind: self._part(groups[kind]) for kind in sorted(groups) if kind}

    def _part(self, places: Sequence[int]) -> Score:
        return replace(self, answers=[self.answers[at] for at in places], points=[self.points[at] for at in places])


@dataclass(frozen=True)
class Found:
    """The results of a task.

    Attributes:
        values: numbers by the key under which they are recorded.
        seeing, blind: the answers with the images and with blank ones; None where no question was asked.
        shuffled: with the images of other questions.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    seeing: Score | None = None
    blind: Score | None = None
    shuffled: Score | None = None


# ---- the report ----------------------------------------------------------------------------------


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


# ---- tasks ---------------------------------------------------------------------------------------


def _not_found(value: Any, *_: Any, **__: Any) -> str:
    return not_numbers(value.values, what="values") if isinstance(value, Found) else "" if value is None else gives(value, "Found, or None")


@dataclass
class Task(ABC):
    """A metric. The fields of a subclass are its keys in a TOML file, under ``[eval.options.NAME]``.

    Attributes:
        title: in the report.
        reads_held_out: False: it reads plain text alone, and is measured before the others.
        needs: what it reads of the model: its "words", which it writes and scores, or its "embeddings" of
            images and texts. Few models give both.
        takes_examples: whether ``eval.shots`` are in front of its questions.
    """

    title: ClassVar[str] = ""
    reads_held_out: ClassVar[bool] = True
    needs: ClassVar[str] = "words"
    takes_examples: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(
            cls,
            measure=_not_found,
            question=instance(Question | None, "a Question, or None"),
            rows=sequence_of(ReportRow, "a list of ReportRow"),
            curves=sequence_of(ReportCurve, "a list of ReportCurve"),
        )

    @property
    def name(self) -> str:
        """That it is registered under."""
        return registry.tasks.name_of(type(self)) or type(self).__name__

    @abstractmethod
    def measure(self, exam: Exam) -> Found | None:
        """What is found, the same on all ranks; None: there is nothing to measure."""

    def question(self, question: Question) -> Question | None:
        """A held-out question as this task asks it; None: it does not."""
        return question

    def rows(self, facts: Facts) -> list[ReportRow]:
        """Its scores in the report."""
        return []

    def curves(self) -> list[ReportCurve]:
        """Its charts in the report."""
        return []


@dataclass
class QuestionTask(Task):
    """A task that scores answers to held-out questions. A subclass says what one answer is worth: ``points``.

    It records ``eval/NAME``, the mean of the points; ``eval/NAME_questions``, ``_unreadable``, ``_too_long``
    and ``_cut``: the questions asked, those that could not be asked, those whose true answer is longer than
    the model may write, and the answers that the model did not end; ``eval/NAME/KIND`` by kind of question.
    With ``eval.blind`` the same questions are asked with blank images: ``eval/NAME_blind``; with
    ``eval.shuffled`` with the images of other questions: ``eval/NAME_shuffled``.

    Attributes:
        max_new_tokens: of one answer; 0: ``eval.max_new_tokens``.
        share: the score is a share, shown as percent.
        counts: what the keys of the counts begin with; None: NAME and "_".
    """

    takes_examples: ClassVar[bool] = True
    share: ClassVar[bool] = True
    counts: ClassVar[str | None] = None

    max_new_tokens: int = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(
            cls,
            points=finite_number,
            all_points=_no_points,
            value=instance(float | int, "a number, int or float"),
            further=not_numbers,
            answers=instance(Answers, "Answers"),
        )
        if cls.points is QuestionTask.points and (cls.all_points, cls.measure) != (QuestionTask.all_points, QuestionTask.measure):
            cls.points = _not_called  # so that it need not be there

    @abstractmethod
    def points(self, answer: Answer) -> float:
        """What one answer is worth. A class with ``all_points`` of its own can leave it out."""

    def all_points(self, answers: Sequence[Answer]) -> Sequence[float]:
        """What each of all answers is worth, for metrics that compare them with each other."""
        return [self.points(answer) for answer in answers]

    def value(self, score: Score) -> float:
        """The score of some answers. By default the mean of their points."""
        return score.mean

    def question(self, question: Question) -> Question | None:
        return None if question.asks_picture else question

    def answers(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Answers:
        """The model's answers. By default it generates them, once for all tasks that ask the same."""
        return ask(exam, asked, blind=blind, max_new_tokens=self.max_new_tokens)

    def further(self, score: Score) -> dict[str, float]:
        """Values to record in addition to the score, by the end of their key, which follows ``eval/NAME``: by
        default the score of each kind of question.
        """
        return {f"/{kind}": self.value(part) for kind, part in score.kinds().items()}

    def measure(self, exam: Exam) -> Found | None:
        if exam.held_out is None or not (asked := exam.held_out.draw(exam.limit, exam.encoder.seed, self.question)):
            return None
        count = f"eval/{self._counts}"
        seeing = self._score(exam, asked, blind=False)
        found = Found(
            {
                **self._values(seeing, ""),
                f"{count}questions": seeing.total,
                f"{count}unreadable": len(exam.held_out.skipped) + len(seeing.unreadable),
                f"{count}too_long": seeing.too_long,
                f"{count}cut": seeing.cut,
            },
            seeing,
        )
        if not exam.encoder.layout.image_size:
            return found
        same = {answer.number: answer.question for answer in seeing.answers}  # so that the scores can be compared
        if exam.cfg.blind:
            blind = self._score(exam, same, blind=True)
            found = replace(found, values={**found.values, **self._values(blind, "_blind")}, blind=blind)
        if exam.cfg.shuffled and (others := with_other_images(same)):
            shuffled = self._score(exam, others, blind=False)
            found = replace(found, values={**found.values, **self._values(shuffled, "_shuffled")}, shuffled=shuffled)
        return found

    def rows(self, facts: Facts) -> list[ReportRow]:
        if (seen := facts.result(self.name)) is None:
            return []
        shown = (lambda value: percent(value)) if self.share else (lambda value: f"{value:.4g}")
        unit, title = "%" if self.share else "", self.title or self.name
        rows = [ReportRow(title, shown(seen), unit, self.beside(facts).removeprefix("; "))]
        for name, about in (("Blind", "image blanked: the same questions"), ("Shuffled", "images of other questions: the same questions")):
            if (value := facts.result(f"{self.name}_{name.lower()}")) is not None:
                rows.append(ReportRow(f"{name} {title}", shown(value), unit, about))
        return rows

    def curves(self) -> list[ReportCurve]:
        key, title = f"eval/{self.name}", self.title or self.name
        lines = {key: title, f"{key}_blind": "image blanked", f"{key}_shuffled": "images of other questions"}
        return [ReportCurve(title, "over questions", lines, self.share)]

    def beside(self, facts: Facts) -> str:
        """What has to be known of the questions, each part after a semicolon."""
        asked = "" if self.counts == "" else facts.beside(f"{self._counts}questions", "questions")
        limit = f"{'' if self.max_new_tokens else 'eval.'}max_new_tokens"
        cut = facts.beside(f"{self._counts}too_long", f"cannot be written in {limit}")
        if facts.result(f"{self._counts}cut"):
            cut += facts.beside(f"{self._counts}cut", "answers were cut there")
        return asked + facts.beside(f"{self._counts}unreadable", "could not be asked") + cut

    @property
    def _counts(self) -> str:
        return f"{self.name}_" if self.counts is None else self.counts

    def _values(self, score: Score, suffix: str) -> dict[str, float]:
        key = f"eval/{self.name}{suffix}"
        return {key: self.value(score), **{key + more: value for more, value in self.further(score).items()}}

    def _score(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Score:
        found = self.answers(exam, asked, blind)
        return Score(found.asked, found.answers, found.unreadable, self.all_points(found.answers))


def _no_points(value: Any, task: QuestionTask, answers: Sequence[Answer]) -> str:
    if not isinstance(value, Sequence) or len(value) != len(answers):
        return gives(value, f"a list of {len(answers)} numbers, one for each answer")
    return next(filter(None, map(finite_number, value)), "")


def _not_called(self: QuestionTask, answer: Answer) -> float:
    raise NotImplementedError(f"{type(self).__name__} has no points of one answer")


def with_other_images(asked: Mapping[int, Question]) -> dict[int, Question]:
    """Each question with the images of another question that has as many: if the score does not fall, the
    model does not use the images.

    The other one is half of the list away, as questions about one picture are often neighbours. Questions
    whose images are the only ones of their number are left out.
    """
    by_count: dict[int, dict[Sequence[ImageSource], list[int]]] = defaultdict(dict)
    for number, question in asked.items():
        by_count[len(question.images)].setdefault(question.images, []).append(number)
    found = dict[int, Question]()
    for groups in by_count.values():
        images, half = list(groups), len(groups) // 2
        for images_of_group, other in zip(images, images[half:] + images[:half], strict=True):
            if images_of_group != other and len(images_of_group):
                found |= {number: replace(asked[number], images=other) for number in groups[images_of_group]}
    return dict(sorted(found.items()))
