"""The masks of a stream with images in it, as the structure of ``Segments``.

Shapes: B rows, S positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kempnerforge.data.batching.batch import Batch, Kind

SEES_PROMPT = ("prefix", "image_sees_prompt")
"""Masks under which an image knows the prompt."""


class MaskStructure(NamedTuple):
    """``text_ids``, ``groups`` and ``ahead`` of ``Segments``, (B, S) each."""

    text_ids: Tensor
    groups: Tensor | None
    ahead: Tensor | None


def mask_structure(kind: str, batch: Batch) -> MaskStructure:
    """The structure of the mask called ``kind``."""
    text_ids = batch.text_ids
    if kind in SEES_PROMPT:  # unless there are several texts, which must not see each other through the image
        text_ids = text_ids * (_texts_of_sample(batch) > 1)
    return MaskStructure(text_ids, *_groups(kind, batch, text_ids))


def _texts_of_sample(batch: Batch) -> Tensor:
    """(B, S): how many texts the sample at each position has."""
    samples = batch.sample_ids.clamp(min=0)  # padding has text 0, so it adds nothing to the first one
    return torch.zeros_like(batch.text_ids).scatter_reduce(1, samples, batch.text_ids, "amax").gather(1, samples)


def _groups(kind: str, batch: Batch, text_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``Segments.groups`` and ``Segments.ahead``, (B, S) each, of a mask."""
    if kind == "causal":
        return None, None
    image = batch.kinds == Kind.IMAGE
    if kind == "bidirectional":
        return (batch.kinds > Kind.IMAGE).long(), None
    if kind in SEES_PROMPT:
        prompt, texts = batch.kinds == Kind.PROMPT, ~_after_an_answer(batch) * (1 + text_ids)
        return ((image | prompt) * texts, None) if kind == "prefix" else (prompt * texts, image * texts)
    starts = torch.zeros_like(text_ids)
    starts[batch.image_rows, batch.image_starts] = 1
    return starts.cumsum(1) * image, None  # the n-th image of a row is group n


def _after_an_answer(batch: Batch) -> Tensor:
    """(B, S) bool: positions after a word of an answer of the same text. An image there knows what the prompt
    must not.
    """
    answers = (batch.kinds == Kind.ANSWER).long()
    before = answers.cumsum(1) - answers  # (B, S): words of answers in the row so far
    begins = torch.ones_like(before, dtype=torch.bool)
    owner = torch.stack([batch.sample_ids, batch.text_ids], dim=-1)
    begins[:, 1:] = (owner[:, 1:] != owner[:, :-1]).any(-1)
    return before > (before * begins).cummax(1).values
