"""A model under evaluation and what it is evaluated on: what every task gets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kempnerforge.config import EvalConfig
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.plain_text import PlainText
from kempnerforge.eval.questions import HeldOut
from kempnerforge.eval.shots import Shots

BLANK = 128
"""The value of a blank image: mid-grey, which is 0 after the usual normalisation."""


class Ranks:
    """The processes of an evaluation: here one alone. ``sum`` is called for each token and each batch; what
    it raises on all ranks ends the evaluation.
    """

    rank, size = 0, 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on each."""
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
        gives: what tasks may read of the model, see ``Task.needs``.
        shots: chooses examples for the questions that are answered in words; None: there are none.
        answered: what has been asked so far (see ``answers.ask``): tasks that ask the same share the answers.
    """

    model: torch.nn.Module
    encoder: Encoder
    cfg: EvalConfig
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
    held_out: HeldOut | None = None
    plain_text: PlainText | None = None
    rows: int = 1
    limit: int = 0
    shots: Shots | None = None
    answered: dict[Hashable, Any] = field(default_factory=dict)
    gives: frozenset[str] = frozenset({"words"})
