"""Masks: mean intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.codecs import Box, decode_boxes
from kempnerforge.eval.masks import MaskDecoder, load_mask_decoder
from kempnerforge.eval.questions import Question
from kempnerforge.eval.task import QuestionTask
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText

CANVAS = 512
"""Pixels along each side of the square on which masks are compared."""
read = lru_cache(1)(load_mask_decoder)


def mean_overlap(predicted: Sequence[Box], true: Sequence[Box], decoder: MaskDecoder) -> float:
    """Mean IoU of the masks of ``true``, each matched to one of ``predicted`` so that the sum is largest; what
    is left without a partner on either side counts 0.
    """
    from scipy.optimize import linear_sum_assignment

    if not predicted:
        return 0.0
    ours, theirs = ([decoder.on_image(box, CANVAS, CANVAS) for box in boxes] for boxes in (predicted, true))
    overlaps = np.array([[(a & b).sum() / max(1, (a | b).sum()) for b in theirs] for a in ours])
    return float(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum()) / max(overlaps.shape)


@registry.register_task("masks")
@dataclass
class Masks(QuestionTask):
    """Mean IoU of the masks of PaliGemma's ``<seg>`` codes, at their boxes (Beyer et al. 2024).

    Both answers are decoded by the same decoder, so a true answer is as good as its codes. Of one object a
    question it is the mean IoU of referring segmentation (Yu et al. 2016, "Modeling Context in Referring
    Expressions"). Labels do not count. Questions whose true answer has no codes are not asked.

    Attributes:
        decoder: file of the decoder, ``vae-oid.npz`` or safetensors with its names.
    """

    title: ClassVar[str] = "Masks, mean IoU"

    decoder: PathText = ""

    def __post_init__(self) -> None:
        if not self.decoder:
            raise InputError("decoder = '': name the file of the mask decoder, such as vae-oid.npz")

    def question(self, question: Question) -> Question | None:
        read(self.decoder)  # at the start of a run, not at its first evaluation
        return question if _with_codes(question.truth) else None

    def points(self, answer: Answer) -> float:
        return mean_overlap(decode_boxes(answer.text), _with_codes(answer.question.truth), read(self.decoder))


def _with_codes(text: str) -> list[Box]:
    return [box for box in decode_boxes(text) if box.codes]
