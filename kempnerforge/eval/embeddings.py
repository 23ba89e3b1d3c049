"""Embeddings of held-out images and texts, of a model that gives them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from kempnerforge.data.batching.collate import collate
from kempnerforge.data.sample import Sample
from kempnerforge.eval.exam import BLANK, Exam
from kempnerforge.eval.loss import any_sample
from kempnerforge.eval.questions import Question
from kempnerforge.util.errors import InputError


def one_image(question: Question) -> Question | None:
    """``question`` if it is about one image; None: a text has an embedding only beside exactly one."""
    return question if len(question.images) == 1 else None


@torch.no_grad()
def embed(
    exam: Exam, asked: Iterable[tuple[Hashable, Question]], failed: dict[Hashable, str], *, blind: bool = False
) -> dict[Hashable, Tensor]:  # fmt: skip
    """Embeddings of the image of each question and of its text: all up to the question, and the true answer,
    as in training. It calls the model once, without questions as well, so that ranks stay in step.

    Args:
        asked: (key, question about one image).
        failed: gets by key why a question cannot be read.
        blind: all images are the same grey, encoded once.

    Returns:
        By key, (2, E) of length 1: image and text, in fp32 on the CPU.

    Raises:
        InputError: an image is several views.
    """
    assert exam.held_out is not None
    rows = {}
    for key, question in asked:
        try:
            sample = Sample(question.sample_id, tuple(question.images), (question.answered,), question.part)
            rows[key] = exam.encoder.encode(sample, seed=0)
        except InputError as error:
            failed[key] = str(error)
    batch = collate([*rows.values()] or [any_sample(exam.held_out.source, exam.encoder)], exam.encoder.tokenizer.pad_id, None)
    batch = replace(batch, targets=batch.targets[:0])  # no word is predicted
    if blind and batch.images is not None:
        first = torch.zeros_like(batch.image_index), torch.zeros_like(batch.pair_images)
        batch = replace(batch, images=batch.images[:1].fill_(BLANK), image_index=first[0], pair_images=first[1])
    if rows and batch.num_pairs < len(rows):
        raise InputError('data.images.fit = "tiles", or frames: an image of several views has no embedding')
    return dict(zip(rows, exam.model(batch.to(exam.device)).embeddings.float().cpu(), strict=bool(rows)))
