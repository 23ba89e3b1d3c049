"""The one batch that every arch and every batching mode uses.

Shapes: B rows, S positions, N images, M placements of an image in a row, T trained positions, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from kempnerforge.data.batching.known_features import KnownFeatures
from kempnerforge.model.transfer import moved

IGNORE = -100
"""The label of a position that is not trained."""


class Kind(IntEnum):
    """What is at a position. ``ANSWER`` includes the EOS after it."""

    PAD = 0
    IMAGE = 1
    PROMPT = 2
    ANSWER = 3


class Part(NamedTuple):
    """The tokens of a view that are in the stream: a rectangle of the view's grid, row by row.

    Attributes:
        rows, columns: its size; with 0 of them nothing of the view is in the stream. If one is more than the
            view's grid has, they are the grid's first tokens, row by row.
        top, left: rows above and columns left of it.
        step: positions from one row of it to the next, if others are between them; 0: ``columns``.
        alone: the encoder sees nothing else of the view.
        image, view: which image of its sample it is of, and which view of that, for adapters that read the
            views of an image together (``AdapterConfig.view_limits``); -1: not told.
        content: first row, first column, and those after the last ones, of the view's pixels that show the
            image, for adapters that read it (``reads_padding``); empty: all, or not told.
    """

    rows: int
    columns: int
    top: int = 0
    left: int = 0
    step: int = 0
    alone: bool = True
    image: int = -1
    view: int = 0
    content: tuple[int, ...] = ()


@dataclass
class Batch:
    """Rows of samples.

    Attributes:
        input_ids: (B, S) int64; positions of images and padding hold the pad id.
        labels: (B, S) int64, shifted: ``labels[b, t]`` is token t + 1 of the row if that token is trained,
            else ``IGNORE``.
        positions: (B, S) int64 for RoPE; each sample begins at 0, each text restarts after the shared part of
            its sample; 0 on padding.
        sample_ids: (B, S) int64; which sample of the row, from 0 in the order of the stream; -1 is padding.
        text_ids: (B, S) int64; 0 is the shared part (images) and padding, k the k-th text of the sample. A
            token sees its text and the shared part of its sample.
        kinds: (B, S) uint8, ``Kind``.
        targets: (T,) int64, flat positions ``b * S + s`` that have a label.
        images: (N, 3, H, W) uint8, or None where the job has no images; N may be 0.
        image_index: (M,) int64, which image is at each placement. One image may be at several.
        image_rows: (M,) int64, its row.
        image_starts: (M,) int64, its first position in that row. Where images take no position: the token
            after it, or the length of the row if there is none; either way an image comes before the token at
            q if its start is at most q.
        image_text_ids: (M,) int64, the text that it is in; 0 is the shared part.
        image_sample_ids: (M,) int64, its sample.
        image_slots: (M,) int64, its number within the row, from 0 in the order of the stream.
        has_documents: False: a causal mask alone is right (one text a row, padded on the right). True: the
            ids matter.
        row_images: placements in the row that has most.
        row_words: positions of the row that has most, images, codes and padding not counted.
        row_codes: positions that are codes of a written picture (``ModelConfig.codes``), of the row that has
            most; in generation at most.
        leading_images: n if every row begins, in its first column, with exactly n images and holds no other;
            else 0. Always 0 where images take no position.
        skipped: (sample id, reason) of samples that could not be used and were replaced.
        sample_names: ids of the samples in the rows, row by row, in the order of ``sample_ids``.
        known_features: features of the images that are known already, see ``training/feature_cache.py``.
        texts_left_out: texts of these samples that did not fit into their rows; other visits take others.
        parts: which section of ``[data]`` each of them is from (``Sample.part``).
        documents: where a row holds several samples: for each row the (positions, texts) of its samples from
            the first column on. Else ().
        pair_images: (P,) int64, the image of each pair: a text with exactly one image in it or shared by its
            sample, in the order of the stream.
        image_parts: N of them, or empty: all tokens of each image are in the stream, one after the other.
        row_image_tokens: positions of images in the row that has most.
        pair_ids: (B, S) int64, the pair that each word belongs to; -1: none.
        target_weights: (T,) fp32, how much each trained token counts in the loss that is sent backward; None:
            all alike.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    sample_ids: Tensor
    text_ids: Tensor
    kinds: Tensor
    targets: Tensor
    images: Tensor | None
    image_index: Tensor
    image_rows: Tensor
    image_starts: Tensor
    image_text_ids: Tensor
    image_sample_ids: Tensor
    image_slots: Tensor
    has_documents: bool
    row_images: int
    row_words: int
    leading_images: int
    row_codes: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    sample_names: list[str] = field(default_factory=list)
    texts_left_out: int = 0
    known_features: KnownFeatures | None = None
    parts: list[int] = field(default_factory=list)
    documents: tuple[tuple[tuple[int, int], ...], ...] = ()
    image_parts: tuple[Part, ...] = ()
    row_image_tokens: int = 0
    pair_images: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    pair_ids: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    target_weights: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Trained positions, T."""
        return len(self.targets)

    @property
    def weight(self) -> float:
        """The sum of the weights of trained tokens."""
        return self.num_targets if self.target_weights is None else float(self.target_weights.double().sum())

    def weighted(self, weights: Sequence[float]) -> Batch:
        """The batch with the weight of its section for each trained token.

        Args:
            weights: by section, see ``parts``; empty: all alike.
        """
        if not weights:
            return self
        counts = self.sample_ids.amax(dim=1) + 1  # (B,) samples of each row
        samples = (counts.cumsum(0) - counts)[:, None] + self.sample_ids  # (B, S) numbers in ``parts``
        of_samples = torch.tensor([weights[part] for part in self.parts])
        return replace(self, target_weights=of_samples[samples.flatten()[self.targets]])

    @property
    def num_pairs(self) -> int:
        """Texts with exactly one image, P."""
        return len(self.pair_images)

    @property
    def useful_tokens(self) -> int:
        """Positions that are not padding. Reads ``kinds``: ask before the batch moves to an accelerator."""
        return int(torch.count_nonzero(self.kinds))

    @property
    def num_images(self) -> int:
        """Images, N."""
        return 0 if self.images is None else len(self.images)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all tensors on ``device``."""
        there = {f.name: moved(value, device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **there)
