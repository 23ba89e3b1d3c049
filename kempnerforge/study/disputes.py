"""Held-out questions that the rows of a study answer differently, with their pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from kempnerforge.config import JobConfig
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sources import build_source
from kempnerforge.eval.questions import questions
from kempnerforge.report.html import picture
from kempnerforge.study.results import Answered, Result, answered
from kempnerforge.util.errors import InputError

MOST = 6
"""Questions that are shown."""
SIDE = 160
"""Pixels of a picture."""


class RowAnswer(NamedTuple):
    """What the cells of a row answered: most often, and the mean of their points."""

    row: str
    text: str
    points: float


@dataclass
class Dispute:
    """A question, each row's answer to it, and its pictures."""

    prompt: str
    truth: str
    answers: list[RowAnswer]
    pictures: list[Markup] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """How far the points of the rows are apart."""
        points = [one.points for one in self.answers]
        return max(points) - min(points)


def disputes(by_row: dict[str, list[Result]], key: str) -> list[Dispute]:
    """The questions on which the mean points of the rows differ most, one of each sample; all of them that
    count for ``key`` are considered.

    Args:
        by_row: the finished cells.
        key: a score, as "eval/exact_match".
    """
    found: dict[tuple[str, str, str], dict[str, list[Answered]]] = defaultdict(lambda: defaultdict(list))
    for row, cells in by_row.items():
        for cell in cells:
            for one in answered(cell, key):
                found[one.question][row].append(one)
    asked = {
        question: Dispute(question[1], question[2], [_row_answer(row, given) for row, given in of.items()])
        for question, of in found.items()
        if len(of) > 1
    }
    ranked = sorted((item for item in asked.items() if item[1].spread), key=lambda item: (-item[1].spread, item[0]))
    chosen: dict[str, tuple[tuple[str, str, str], Dispute]] = {}
    for question, one in ranked:
        chosen.setdefault(question[0], (question, one))
    first = list(chosen.values())[:MOST]
    if first:
        _add_pictures(dict(first), next(cells[0] for cells in by_row.values() if cells).cell.job)
    return [one for _, one in first]


def _row_answer(row: str, given: Sequence[Answered]) -> RowAnswer:
    text, _ = Counter(one.answer for one in given).most_common(1)[0]
    return RowAnswer(row, text, sum(one.points for one in given) / len(given))


def _add_pictures(found: dict[tuple[str, str, str], Dispute], job: JobConfig) -> None:
    """Reads the held-out data of ``job`` again. Questions whose pictures are gone are shown without them."""
    try:
        source = build_source(job.resolved_stages()[-1].data, "test")
        asked = questions(source)[0] if source is not None else []
    except InputError:
        return
    for question in asked:
        one = found.get((question.sample_id, question.prompt, question.truth))
        if one is not None and not one.pictures:
            try:
                one.pictures = [picture(load_image(image, SIDE), question.sample_id) for image in question.images]
            except InputError:
                continue
