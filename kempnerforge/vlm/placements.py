"""Where the images of a batch are in its rows, which of them a position sees, and the positions by time, row
and column that follow from it.

Shapes: B rows, S positions, M placements of images, K placements of a row with the most, F tokens
of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kempnerforge.config import ModelConfig
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.model.transfer import told
from kempnerforge.model.transformer import Cache, Context

NOTHING = -2
"""Sample id of a slot that holds no image; no position has it."""
SKIPPED = "skipped_positions"
"""Name in the cache: (B, 1), positions that the images of each row take and do not count."""


def with_answers(ctx: Context, batch: Batch, cfg: ModelConfig, stored: Callable[[Tensor, Context], Tensor]) -> Context:
    """``ctx``, with ``answers`` if the model needs them; ``stored`` as of the arch."""
    if not cfg.answer_dropout or ctx.cache is not None:
        return ctx
    return replace(ctx, answers=stored(batch.labels != IGNORE, ctx))


def own_targets(ctx: Context, batch: Batch, stored: Callable[[Tensor, Context], Tensor]) -> tuple[Context, Batch]:
    """The targets of ``batch`` that are among the positions that this rank has of its rows, in the context and in
    the batch; ``stored`` as of the arch.

    NOTE: waits for the device, which alone knows how many there are.
    """
    assert ctx.share is not None
    numbers = torch.zeros_like(batch.labels).flatten()  # of each target, from 1
    numbers[batch.targets] = torch.arange(1, 1 + batch.num_targets, device=numbers.device)
    here = (stored(numbers.view_as(batch.labels), ctx) * (ctx.share.own >= 0)).flatten()  # (B * n,)
    scored = here.nonzero()[:, 0]
    of_batch, weights = here[scored] - 1, batch.target_weights
    own = replace(batch, targets=batch.targets[of_batch], target_weights=None if weights is None else weights[of_batch])
    return replace(ctx, share=replace(ctx.share, scored=scored)), own


def told_views(batch: Batch, side: int, size: int) -> dict[str, Any]:
    """What encoder and adapter are told of the views of ``batch``, of ``side`` tokens and ``size`` pixels along a
    side, if they need it: "grids" of those that have fewer tokens, and for adapters with ``view_limits`` or
    ``reads_padding`` "views" and "contents".
    """
    told, parts = dict[str, Any](), batch.image_parts
    grids = [part[:2] if part.alone else (side, side) for part in parts]
    if {*grids} - {(side, side)}:
        told["grids"] = grids
    if any(part.content for part in parts):
        told["contents"] = [(*(part.content or (0, 0, size, size)), size) for part in parts]
    if any(part.image >= 0 for part in parts):
        told["views"] = [(part.image, part.view) for part in parts]
    return told


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


def grid_sizes(batch: Batch, side: int) -> Tensor:
    """(M, 2): rows and columns of tokens of each placement; ``side`` of both where images have all tokens."""
    if not batch.image_parts:
        return torch.full((len(batch.image_index), 2), side, device=batch.image_index.device)
    return _parts(batch)[:, :2]


def _parts(batch: Batch) -> Tensor:
    """(M, 5): ``Part`` of each placement, without ``alone``."""
    shown = [[*part[:4], part.step or part.columns] for part in batch.image_parts]
    return told(shown, batch.image_index.device)[batch.image_index]


def image_columns(batch: Batch, tokens: int, nowhere: int) -> Tensor:
    """(M, F): the column of each of the F ``tokens`` of each placement; ``nowhere`` for tokens that the image
    does not have.
    """
    steps, starts = torch.arange(tokens, device=batch.image_starts.device), batch.image_starts[:, None]
    if not batch.image_parts:
        return starts + steps
    side = math.isqrt(tokens)
    height, width, top, left, step = _parts(batch).T[..., None]  # (M, 1) each
    row, column = steps // side - top, steps % side - left
    shown = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    longer = height.maximum(width) > side
    place, shown = torch.where(longer, steps, row * step + column), torch.where(longer, steps < height * width, shown)
    return torch.where(shown, starts + place, nowhere)


def grid_positions(batch: Batch, cache: Cache | None, side: int) -> Tensor:
    """(3, B, S): time, row and column of each position (M-RoPE: Wang et al. 2024, arXiv 2409.12191, section
    2.1). An image counts as many positions as it has tokens along its longer side; the words after it go on
    from there.

    Args:
        cache: of the rows that ``batch`` goes on with, if it does.
        side: tokens along a side of a whole image.
    """
    sizes = grid_sizes(batch, side)
    skips = by_slot(batch, sizes.prod(-1) - sizes.amax(-1), 0)  # (B, 1, K)
    if cache is not None and SKIPPED in cache.kept:
        before = cache.kept[SKIPPED]  # words made after the prompt
    else:
        before = (visible_images(batch, latest=False) * skips).sum(-1)  # (B, S), an image token counts its own
        if cache is not None:
            cache.kept[SKIPPED] = before[:, -1:]
    words = batch.positions - before
    image = batch.kinds == Kind.IMAGE
    step = torch.arange(image.shape[1], device=image.device)[:, None]  # (S, 1)
    starts, slot = torch.where((starts := by_slot(batch, batch.image_starts, -1)) <= step, starts, -1).max(-1)  # (B, S) of the own image
    own = lambda values: values[:, 0].gather(1, slot)  # (B, 1, K) -> (B, S)
    place, width = step[:, 0] - starts, own(by_slot(batch, sizes[:, 1], 1))
    begin = words + own(skips) - place
    return torch.stack([torch.where(image, begin + part, words) for part in (0, place // width, place % width)])
