"""One evaluation: every task of a job, by the names under which their values are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from kempnerforge.config import EvalConfig, registry
from kempnerforge.config.build import build_record
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.questions import HeldOut
from kempnerforge.eval.task import Found, QuestionTask, Score, Task
from kempnerforge.util.errors import InputError


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        tasks: by name, in the order of ``values``; those that had nothing to measure are left out.
    """

    tasks: Mapping[str, Found] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """All numbers by key."""
        return {key: value for found in self.tasks.values() for key, value in found.values.items()}

    @cached_property
    def first(self) -> Found:
        """Of the first task that asked questions."""
        return next((found for found in self.tasks.values() if found.seeing is not None), Found())

    @property
    def by_answer(self) -> dict[str, tuple[float, int]]:
        """(right, total) by true answer, of the first task if it says right or wrong."""
        seeing: Score | None = self.first.seeing
        return seeing.by_truth if seeing is not None and all(isinstance(points, bool) for points in seeing.points) else {}

    def remarks(self, lr: float) -> list[str]:
        """A line if the model gives one answer to all questions, with and without images, and truths differ.

        Args:
            lr: the learning rate of the training.
        """
        seeing, blind = self.first.seeing, self.first.blind
        if seeing is None or blind is None or len(seeing.by_truth) < 2:
            return []
        answers = {answer.text for score in (seeing, blind) for answer in score.answers}
        if len(answers) > 1:
            return []
        return [
            f"the model gives one answer, {answers.pop()!r}, to all {seeing.total} questions, with the images and without: it has not learned"
            f" to tell them apart. Try another optimizer.lr (it was {lr:g}), more steps, or thaw frozen parts with random weights (vlm.freeze)"
        ]


def tasks_of(cfg: EvalConfig) -> list[Task]:
    """The tasks of ``[eval]``: the built-in ones, which have keys in ``[eval]``, then ``eval.tasks``."""
    return [
        build_record(registry.tasks.get(name), f"eval.options.{name}", cfg.options.get(name, {}), "")
        for name in (*cfg.BUILT_IN, *cfg.tasks)
    ]


def require_tasks(cfg: EvalConfig, held_out: HeldOut | None, gives: frozenset[str]) -> None:
    """Raises InputError if something that ``[eval]`` asks for could not be measured.

    Args:
        gives: as in ``Exam``.
    """
    if "words" not in gives and (key := next((key for key in ("loss", "text_path") if getattr(cfg, key)), "")):
        raise InputError(f"eval.{key} = {getattr(cfg, key)!r}: this model predicts no words, it gives {', '.join(gives)}")
    for task in tasks_of(cfg)[len(cfg.BUILT_IN) :]:
        if task.needs not in gives:
            raise InputError(f"eval.tasks: {task.name!r} needs {task.needs} of the model, which gives {', '.join(sorted(gives))}")
        if cfg.shots and not task.takes_examples:
            raise InputError(f"eval.tasks: {task.name!r} takes no examples; leave it out, or set eval.shots = 0 (it is {cfg.shots})")
        if task.reads_held_out and held_out is None:
            raise InputError(f"eval.tasks: {task.name!r} needs held-out data, and there are none")
        if (
            (isinstance(task, QuestionTask) or task.needs == "embeddings")
            and held_out is not None
            and not held_out.draw(1, 0, task.question)
        ):
            raise InputError(f"eval.tasks: {task.name!r} asks none of the {len(held_out.questions)} held-out questions")


def evaluate(exam: Exam) -> Measured:
    """Measures what ``exam.cfg`` asks for and the model gives, those first that read no held-out data.

    Raises:
        InputError: none of the held-out data can be read.
    """
    tasks = [task for task in tasks_of(exam.cfg) if task.needs in exam.gives]
    found = {task.name: task.measure(exam) for task in sorted(tasks, key=lambda task: task.reads_held_out)}
    return Measured({name: one for name, one in found.items() if one is not None})
