"""Retrieval: whether an image finds its texts among all held-out ones, and a text its images."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kempnerforge.config import registry
from kempnerforge.eval.embeddings import embed, one_image
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.mode import mode
from kempnerforge.eval.questions import Question
from kempnerforge.eval.task import Found, ReportCurve, ReportRow, Task, percent
from kempnerforge.report.facts import Facts
from kempnerforge.util.errors import InputError

DEPTHS = (1, 5, 10)
ROWS = 1024
"""Queries that are compared with the gallery at once."""


@registry.register_task("retrieval")
@dataclass
class Retrieval(Task):
    """Recall at 1, 5 and 10 (Karpathy and Fei-Fei 2015, section 4.2): the share of images with one of their
    texts among the k nearest of all texts, ``eval/retrieval_text_r1``, ``_r5``, ``_r10``; the share of texts
    with one of their images among the k nearest images, ``eval/retrieval_image_r1`` and so on.

    ``eval/retrieval`` is the mean of the two at 1. A text is all up to a question and an answer to it; all
    given answers are texts of the image. The same text of several images is one text, and each of these
    images is right. A wrong one that is as near as the nearest right one is before it, so that a model that
    gives one embedding to all finds nothing. Chance depends on ``_images`` and ``_texts``, how many there
    are; ``_unreadable`` could not be read.
    """

    title: ClassVar[str] = "Retrieval"
    needs: ClassVar[str] = "embeddings"

    def question(self, question: Question) -> Question | None:
        return one_image(question)

    def measure(self, exam: Exam) -> Found | None:
        if exam.held_out is None or not (asked := exam.held_out.draw(exam.limit, exam.encoder.seed, self.question)):
            return None
        pairs = [replace(question, truth=text, references=()) for question in asked.values() for text in dict.fromkeys(question.given)]
        embedded, failed = embed_all(exam, pairs)
        if not embedded:
            raise InputError(f"eval: none of {len(pairs)} held-out pairs can be read; the first: {failed[min(failed)]}")
        images, texts = dict[Hashable, Tensor](), dict[Hashable, Tensor]()  # each once, in the order of the questions
        ends = list[tuple[Hashable, Hashable]]()
        for number in sorted(embedded):
            question, (image, text) = pairs[number], embedded[number]
            ends.append((question.images, (question.asked, question.truth, question.part)))
            images.setdefault(ends[-1][0], image)
            texts.setdefault(ends[-1][1], text)
        rows, columns = ({key: at for at, key in enumerate(table)} for table in (images, texts))
        right = torch.tensor([(rows[image], columns[text]) for image, text in ends])  # (pairs, 2)
        of_images, of_texts = torch.stack([*images.values()]), torch.stack([*texts.values()])
        places = {"text": places_of(of_images, of_texts, right), "image": places_of(of_texts, of_images, right.flip(1))}
        values = {f"_{what}_r{k}": float((found < k).double().mean()) for what, found in places.items() for k in DEPTHS}
        values |= {
            "": (values["_text_r1"] + values["_image_r1"]) / 2,
            "_images": len(images),
            "_texts": len(texts),
            "_unreadable": len(failed),
        }
        return Found({f"eval/{self.name}{key}": value for key, value in values.items()})

    def rows(self, facts: Facts) -> list[ReportRow]:
        found = {what: [facts.result(f"{self.name}_{what}_r{k}") for k in DEPTHS] for what in ("text", "image")}
        beside = facts.beside(f"{self.name}_images", "images") + facts.beside(f"{self.name}_texts", "texts")
        beside += facts.beside(f"{self.name}_unreadable", "could not be read")
        titles = {"text": "Text of an image", "image": "Image of a text"}
        depths = f"R@{', '.join(map(str, DEPTHS[1:]))}"
        return [
            ReportRow(f"{titles[what]}, R@1", percent(first), "%", f"{depths}: {', '.join(map(percent, more))} %{beside}")
            for what, values in found.items()
            if len(known := [value for value in values if value is not None]) == len(DEPTHS)
            for first, *more in [known]
        ]

    def curves(self) -> list[ReportCurve]:
        lines = {f"eval/{self.name}_text_r1": "text of an image", f"eval/{self.name}_image_r1": "image of a text"}
        return [ReportCurve("Retrieval, R@1", "over all held-out ones", lines, share=True)]


def embed_all(exam: Exam, pairs: Sequence[Question]) -> tuple[dict[int, Tensor], dict[int, str]]:
    """Embeddings (2, E) of image and text of each of ``pairs`` by its number, shared out over the ranks, and
    why others cannot be read.
    """
    ranks, step = exam.ranks, exam.cfg.batch_size
    mine = list(enumerate(pairs))[ranks.rank :: ranks.size]
    found, failed = dict[Hashable, Tensor](), dict[Hashable, str]()
    with mode(exam.model, training=False):
        for start in range(0, math.ceil(len(pairs) / ranks.size), step):  # as often on all ranks
            ranks.sum([])  # may end the evaluation
            found |= embed(exam, mine[start : start + step], failed)
    every = ranks.gather((found, failed))
    return {n: one for theirs, _ in every for n, one in theirs.items()}, {n: why for _, theirs in every for n, why in theirs.items()}


def places_of(queries: Tensor, gallery: Tensor, right: Tensor) -> Tensor:
    """How many wrong entries of the gallery are as near to each query as its nearest right one, or nearer.

    Args:
        queries: (Q, E) of length 1.
        gallery: (G, E) of length 1.
        right: (R, 2) query and entry; each query has one or more.

    Returns:
        (Q,).
    """
    places = []
    for start in range(0, len(queries), ROWS):
        scores = queries[start : start + ROWS] @ gallery.T
        true = torch.zeros_like(scores, dtype=torch.bool)
        here = right[(right[:, 0] >= start) & (right[:, 0] < start + ROWS)]
        true[here[:, 0] - start, here[:, 1]] = True
        best = scores.masked_fill(~true, -math.inf).amax(1, keepdim=True)
        places.append(((scores >= best) & ~true).sum(1))
    return torch.cat(places)
