"""Embeddings of held-out images and texts, of a model that gives them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.data.batching.collate import collate, prompt_batch
from kempnerforge.data.sample import Sample
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.eval.exam import BLANK, Exam
from kempnerforge.eval.loss import any_sample
from kempnerforge.eval.mode import mode
from kempnerforge.eval.pictures import Pictures
from kempnerforge.eval.questions import Question
from kempnerforge.model.transformer import Cache
from kempnerforge.util.errors import InputError

K = TypeVar("K", bound=Hashable)


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
        parts = batch.image_parts[:1]
        batch = replace(batch, images=batch.images[:1].fill_(BLANK), image_index=first[0], pair_images=first[1], image_parts=parts)
    if rows and batch.num_pairs < len(rows):
        raise InputError('data.images.fit = "tiles", or frames: an image of several views has no embedding')
    return dict(zip(rows, exam.model(batch.to(exam.device)).embeddings.float().cpu(), strict=bool(rows)))


@torch.no_grad()
def image_features(exam: Exam, asked: Mapping[K, Question]) -> dict[K, Tensor]:
    """What the vision encoder makes of the images of each question: the mean over all features of all of
    their views, (E,) of length 1, in fp32 on the CPU; by key, without those that have no image that can be
    read. All ranks call it with the same questions, which they share out.
    """
    encoder, ranks, step = exam.encoder, exam.ranks, exam.cfg.batch_size
    tower = exam.model.get_submodule("vision_encoder")
    mine, made, found = [*asked.items()][ranks.rank :: ranks.size], list[Any](), dict[K, Tensor]()
    watch = tower.register_forward_hook(lambda module, inputs, features: made.append(features))
    try:
        with mode(exam.model, training=False):
            for start in range(0, math.ceil(len(asked) / ranks.size), step):  # as often on all ranks
                ranks.sum([])  # may end the evaluation
                views, prompts, pictures = dict[K, list[int]](), list[Prompt](), Pictures(encoder)
                for key, question in mine[start : start + step]:
                    try:
                        blocks = encoder.images[question.part].blocks(question.images)
                        pairs = zip(question.images, blocks, strict=True)
                        places = [place for image, block in pairs for place in pictures.places(image, block, question.part)]
                    except InputError:
                        continue
                    if places:
                        views[key] = places
                        prompts.append(Prompt([encoder.tokenizer.eos_id], (0,) * len(blocks), tuple(blocks)))
                rows = [*views.values()] or [[pictures.blank()]]
                prompts = prompts or [Prompt([encoder.tokenizer.eos_id], (0,))]
                made.clear()
                exam.model(prompt_batch(prompts, pictures.stack(), rows, encoder.layout, encoder.tokenizer.pad_id).to(exam.device), Cache())
                means = made[0].float().mean(1).cpu()  # (N, E)
                found |= {key: F.normalize(means[places].mean(0), dim=-1) for key, places in views.items()}
    finally:
        watch.remove()
    return {key: one for theirs in ranks.gather(found) for key, one in theirs.items()}
