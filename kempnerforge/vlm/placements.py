"""Where the images of a batch are in its rows, which of them a position sees, and the positions by time, row
and column that follow from it.

Shapes: B rows, S positions, M placements of images, K placements of a row with the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.model.transformer import Cache

NOTHING = -2
"""Sample id of a slot that holds no image; no position has it."""
IMAGES = "images_before"
"""Name in the cache: (B, 1), images that each row has."""


def by_slot(batch: Batch, values: Tensor, nothing: int) -> Tensor:
    """``values`` (M,) of placements -> (B, 1, K), ``nothing`` where a row has fewer."""
    table = values.new_full((len(batch.input_ids), max(1, batch.row_images)), nothing)
    return table.index_put((batch.image_rows, batch.image_slots), values)[:, None]


def images_of_text(batch: Batch) -> Tensor:
    """(B, S, K) bool: the images that belong to the text of each position, or are shared by all texts of its
    sample, before the position or after it.
    """
    texts = by_slot(batch, batch.image_text_ids, 0)
    same_sample = by_slot(batch, batch.image_sample_ids, NOTHING) == batch.sample_ids[..., None]
    return same_sample & ((texts == 0) | (texts == batch.text_ids[..., None]))


def visible_images(batch: Batch, latest: bool, group: bool = False) -> Tensor:
    """Which images each position sees: its ``images_of_text`` that are before it.

    Args:
        latest: only the last of them (Flamingo, Alayrac et al. 2022, section 2.3), instead of all.
        group: and those before that one that follow one another within a token each.

    Returns:
        (B, S, K) bool; False everywhere on padding.
    """
    steps = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[:, None]  # (S, 1)
    starts = by_slot(batch, batch.image_starts, 0)  # (B, 1, K)
    seen = images_of_text(batch) & (starts <= steps)  # (B, S, K)
    if latest:
        begins = torch.ones_like(starts)
        if group:
            begins[..., 1:] = starts.diff() > 1
        number = begins.cumsum(-1)  # (B, 1, K), from 1
        seen = seen & (number == (number * seen).amax(-1, keepdim=True))
    return seen


def grid_positions(batch: Batch, cache: Cache | None, side: int) -> Tensor:
    """(3, B, S): time, row and column of each position (M-RoPE: Wang et al. 2024, arXiv 2409.12191, section
    2.1). An image counts as many positions as it has tokens along a side; the words after it go on from
    there.

    Args:
        cache: of the rows that ``batch`` goes on with, if it does.
        side: tokens along a side of an image.
    """
    if cache is not None and IMAGES in cache.kept:
        before = cache.kept[IMAGES]  # words made after the prompt
    else:
        before = visible_images(batch, latest=False).sum(-1)  # (B, S), an image token counts its own
        if cache is not None:
            cache.kept[IMAGES] = before[:, -1:]
    skipped = side**2 - side
    words = batch.positions - before * skipped
    image = batch.kinds == Kind.IMAGE
    step = torch.arange(image.shape[1], device=image.device)[:, None]  # (S, 1)
    starts = by_slot(batch, batch.image_starts, -1)  # (B, 1, K)
    own = torch.where(starts <= step, starts, -1).amax(-1)  # (B, S): where the image of a token begins
    place = step[:, 0] - own
    begin = words + skipped - place
    return torch.stack([torch.where(image, begin + part, words) for part in (0, place // side, place % side)])
