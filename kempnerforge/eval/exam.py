"""A model under evaluation and what it is evaluated on: what every task gets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kempnerforge.config import EvalConfig
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.plain_text import PlainText
from kempnerforge.eval.questions import HeldOut, Question

BLANK = 128
"""The value of a blank image: mid-grey, which is 0 after the usual normalisation."""


class Ranks(Protocol):
    """The processes of an evaluation. ``sum`` is called for each token and each batch; an exception that it
    raises on all ranks ends the evaluation.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, values: Sequence[float]) -> list[float]: ...

    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class OneProcess:
    """The ranks of a process that is alone."""

    rank: int = 0
    size: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass
class Exam:
    """One evaluation of a model.

    Attributes:
        model: called on all ranks equally often.
        encoder: of the stage that is evaluated.
        cfg: ``[eval]``.
        held_out: what is known of the held-out data; None: there are none.
        plain_text: read without any image; None: there is none.
        rows: samples that a rank takes at once for a loss.
        limit: questions, samples and windows at most, drawn by the seed of ``encoder``; 0: all.
        answered: what has been asked so far (see ``answers.ask``): tasks that ask the same share the answers.
    """

    model: torch.nn.Module
    encoder: Encoder
    cfg: EvalConfig
    device: torch.device
    ranks: Ranks = field(default_factory=OneProcess)
    held_out: HeldOut | None = None
    plain_text: PlainText | None = None
    rows: int = 1
    limit: int = 0
    answered: dict[Hashable, Any] = field(default_factory=dict)

    def draw(self, wording: Callable[[Question], Question | None]) -> dict[int, Question]:
        """The held-out questions that are asked, by their number among all.

        Args:
            wording: a question as it is asked; None: it is not.
        """
        found = enumerate(self.held_out.questions if self.held_out is not None else ())
        fitting = [(number, said) for number, question in found if (said := wording(question)) is not None]
        return dict(fitting[at] for at in drawn(len(fitting), self.limit, self.encoder.seed))
