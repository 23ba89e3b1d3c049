"""Zero-shot classification: the class whose texts are nearest to the image; nothing is generated."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer, Answers, answers_of, spread
from kempnerforge.eval.embeddings import embed, one_image
from kempnerforge.eval.exam import BLANK, Exam
from kempnerforge.eval.mode import mode
from kempnerforge.eval.questions import Question, plain
from kempnerforge.eval.task import Found, QuestionTask
from kempnerforge.util.errors import InputError


@registry.register_task("zero_shot")
@dataclass
class ZeroShot(QuestionTask):
    """The share of images whose true class has the nearest text.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section
    3.1.4: a class is the mean of the embeddings of its texts, one for each template, each of length 1. A text
    takes the place of the answer to the question that is asked. Questions with several images are not asked.
    ``_classes`` is how many classes there are.

    Attributes:
        classes: their names; empty: all different answers of the held-out questions. A question is asked if
            its true answer is one of them, or one of the texts that the templates make of it.
        templates: texts about a class, "{}" is its name.
    """

    title: ClassVar[str] = "Zero-shot classification"
    takes_examples: ClassVar[bool] = False
    needs: ClassVar[str] = "embeddings"

    classes: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["{}"])

    def __post_init__(self) -> None:
        if len(self.classes) == 1 or len(set(map(plain, self.classes))) < len(self.classes):
            raise InputError(f"classes = {self.classes}: must be none, or two or more different ones")
        if wrong := [template for template in self.templates or [""] if template.count("{}") != 1]:
            raise InputError(f"templates = {self.templates}: {wrong[0]!r} must hold {{}}, the place of the name, once")

    def question(self, question: Question) -> Question | None:
        right = not self.classes or any(self._is(question, name) for name in self.classes)
        return one_image(question) if right else None

    def points(self, answer: Answer) -> bool:
        return self._is(answer.question, answer.text)

    def answers(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Answers:
        names = self._all_classes(exam)
        classes: dict[Hashable, Tensor] = exam.answered.setdefault((self.name, *names), {})  # the same blind
        with mode(exam.model, training=False):  # prompts come in the same order on all ranks
            for key, like in {_prompt(question): question for question in asked.values()}.items():
                if key not in classes:
                    classes[key] = self._embed_classes(exam, like, names)

        def nearest(chunk: Sequence[tuple[Hashable, Question]], failed: dict[Hashable, str]) -> dict[Hashable, str]:
            prompts = {key: _prompt(question) for key, question in chunk}
            found = embed(exam, chunk, failed, blind=blind)
            return {key: names[int((classes[prompts[key]] @ both[0]).argmax())] for key, both in found.items()}

        return answers_of(asked, spread(exam, asked, nearest, exam.cfg.max_new_tokens))

    def _all_classes(self, exam: Exam) -> list[str]:
        assert exam.held_out is not None
        return self.classes or sorted({plain(each.truth) for each in exam.held_out.questions if self.question(each) is not None})

    def _texts(self, name: str) -> list[str]:
        return [template.replace("{}", name) for template in self.templates]

    def _is(self, question: Question, name: str) -> bool:
        """Whether a true answer is the class ``name``."""
        return not {plain(text) for text in (name, *self._texts(name))}.isdisjoint(map(plain, question.given))

    def _embed_classes(self, exam: Exam, like: Question, names: Sequence[str]) -> Tensor:
        """(C, E) of length 1, of the texts as answers to the prompt of ``like``."""
        grey = _grey(exam)
        asked = [replace(like, images=(grey,), truth=text, references=()) for name in names for text in self._texts(name)]
        step, failed, found = exam.cfg.batch_size, dict[Hashable, str](), list[Tensor]()
        for start in range(0, len(asked), step):
            chunk = list(enumerate(asked[start : start + step]))
            found += [both[1] for both in embed(exam, chunk, failed, blind=True).values()]
            if failed:
                raise InputError(f"eval.options.{self.name}: a text about a class cannot be read: {next(iter(failed.values()))}")
        texts = torch.stack(found).unflatten(0, (len(names), -1))  # (C, templates, E)
        return F.normalize(texts.mean(1), dim=-1)

    def measure(self, exam: Exam) -> Found | None:
        found = super().measure(exam)
        if found is None:
            return None
        return replace(found, values={**found.values, f"eval/{self.name}_classes": len(self._all_classes(exam))})


def _prompt(question: Question) -> Hashable:
    """What the texts of two questions have in common."""
    return question.asked, question.part


def _grey(exam: Exam) -> bytes:
    """A blank image, as every text needs one beside it."""
    side, buffer = exam.encoder.layout.image_size, io.BytesIO()
    Image.new("RGB", (side, side), (BLANK, BLANK, BLANK)).save(buffer, "PNG")
    return buffer.getvalue()
