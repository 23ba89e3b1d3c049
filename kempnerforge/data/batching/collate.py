"""Encoded rows -> one batch, padded on the right to train, on the left to generate.

B rows, S positions, N images, M placements, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kempnerforge.data.batching.batch import IGNORE, Batch, Kind, Part
from kempnerforge.data.batching.pack import SAMPLE_IDS, SAMPLES, PackedRow, join
from kempnerforge.data.text.encode import Encoded
from kempnerforge.data.text.interleave import (
    IMAGES,
    INPUT_IDS,
    KINDS,
    LABELS,
    POSITIONS,
    STARTS,
    TEXT_IDS,
    TEXTS,
    ImageBlock,
    Layout,
    Prompt,
    TextTokens,
    lay_out,
)


def collate(encoded: Sequence[Encoded | PackedRow], pad_id: int, pad_to: int | None) -> Batch:
    """Rows to a batch, padded on the right.

    Args:
        encoded: B rows; a single sample is one.
        pad_id: the id on padding and on positions of images.
        pad_to: row length; None pads to the longest. A row that is longer is kept whole.
    """
    rows = [join([row]) if isinstance(row, Encoded) else row for row in encoded]
    length = max([row.table.shape[1] for row in rows] + [pad_to or 0])
    firsts = np.cumsum([0] + [len(row.images) for row in rows])  # the number of each row's first image in the batch
    packed, side = any(len(row.documents) > 1 for row in rows), rows[0].image_size
    views = [view for row in rows for view in row.images]
    return _batch(
        [(row.table, row.placements) for row in rows],
        [first + row.placements[IMAGES] for first, row in zip(firsts, rows, strict=False)],
        [0] * len(rows),
        length,
        pad_id,
        rows[0].codes,
        images=stack_views(views, side).contiguous() if side else None,
        image_parts=tuple(part for row in rows for part in row.image_parts),
        has_documents=packed or any(texts > 1 for row in rows for _, texts in row.documents),
        skipped=[bad for row in rows for bad in row.skipped],
        sample_names=[name for row in rows for name in row.names],
        texts_left_out=sum(row.left_out for row in rows),
        parts=[part for row in rows for part in row.parts],
        documents=tuple(row.documents for row in rows) if packed else (),
    )


def prompt_batch(
    prompts: Sequence[Prompt],
    images: torch.Tensor | None,
    image_of_row: Sequence[int | Sequence[int]] | None,
    layout: Layout,
    pad_id: int,
) -> Batch:
    """Prompts to generate from, padded on the left so that all answers start at the same position. Nothing is
    trained.

    Args:
        prompts: B of them, as from ``Encoder.encode_prompt``.
        images: (N, 3, H, W) uint8, or None where the job has none.
        image_of_row: which image (or images: the views of the prompt, in order) each row has, so that rows
            can share one; None: row b has image b.
        pad_id: the id on padding and on positions of images.
    """
    chosen = range(len(prompts)) if image_of_row is None else image_of_row
    rows, indices, together = [], [], dict[tuple[int, ...], tuple[int, tuple[Part, ...]]]()
    side = math.isqrt(layout.image_tokens)
    shown = [Part(side, side)] * (0 if images is None else len(images))
    for prompt, which in zip(prompts, chosen, strict=True):
        numbers = [] if images is None else [which] if isinstance(which, int) else list(which)
        blocks = prompt.blocks_of(layout.image_tokens)
        views = sum(block.views for block in blocks)
        assert len(numbers) == views and len(blocks) == len(prompt.image_at), f"{views} views in the prompt, {len(numbers)} given"
        lead = sum(at == 0 for at in prompt.image_at)
        words = TextTokens.of(prompt.ids, np.zeros(len(prompt.ids), dtype=bool), prompt.image_at, lead)
        table, placements = lay_out([words], lead, blocks)
        row = join([Encoded("", table, [], placements, 0)])
        rows.append((row.table, row.placements))
        if layout.view_limits is not None:
            numbers = _together(numbers, blocks, together)
        indices.append(np.asarray(numbers, dtype=np.int64))
        for number, part in zip(numbers, [part for block in blocks for part in block.parts], strict=False):
            shown[number] = part
    lengths = [table.shape[1] for table, _ in rows]
    begins = [max(lengths) - length for length in lengths]
    names = [str(row) for row in range(len(rows))]
    others = {"images": images, "has_documents": any(begins), "sample_names": names}
    if side**2 == layout.image_tokens and set(shown) - {Part(side, side)}:
        others["image_parts"] = tuple(shown)
    if layout.view_limits is not None and images is not None:
        order = [view for _, *views in together for view in views]
        others |= {"images": images[order], "image_parts": tuple(part for _, parts in together.values() for part in parts)}
    return _batch(rows, indices, begins, max(lengths), pad_id, layout.codes, **others)


def _together(views: Sequence[int], blocks: Sequence[ImageBlock], order: dict[tuple[int, ...], tuple[int, tuple[Part, ...]]]) -> list[int]:
    """For each image of a prompt the place of its first view in ``order``, where its views follow one another.

    Args:
        views: of all images, one after the other.
        order: (number of an image in its prompt, its views) -> that place, and what of its views is shown; images
            that are not there are added.
    """
    firsts = []
    for image, (block, end) in enumerate(zip(blocks, accumulate(block.views for block in blocks), strict=True)):
        place = sum(len(parts) for _, parts in order.values())
        parts = (block if block.parts else ImageBlock.together(1)).parts_of(image)
        firsts.append(order.setdefault((image, *views[end - block.views : end]), (place, parts))[0])
    return firsts


def _batch(
    rows: list[tuple[np.ndarray, np.ndarray]],
    indices: list[np.ndarray],
    begins: list[int],
    length: int,
    pad_id: int,
    codes: range,
    **others: Any,
) -> Batch:
    """``rows`` (table and placements of each, as in ``PackedRow``) from the columns ``begins`` on;
    ``indices``: which image of the batch is at each placement, row by row.
    """
    table = np.zeros((6, len(rows), length), dtype=np.int64)  # (6, B, S)
    table[INPUT_IDS], table[LABELS], table[SAMPLE_IDS] = pad_id, IGNORE, -1
    for row, ((columns, _), begin) in enumerate(zip(rows, begins, strict=True)):
        table[:, row, begin : begin + columns.shape[1]] = columns
    table[INPUT_IDS][table[KINDS] == Kind.IMAGE] = pad_id
    counts = [placed.shape[1] for _, placed in rows]
    placements = np.concatenate([placed for _, placed in rows], axis=1)  # (4, M)
    columns = torch.from_numpy(table)
    image_index, image_rows = np.concatenate(indices), np.repeat(np.arange(len(rows)), counts)
    pair_images, pair_ids = _pairs(table, placements, image_rows, image_index)
    return Batch(
        input_ids=columns[INPUT_IDS],
        labels=columns[LABELS],
        positions=columns[POSITIONS],
        sample_ids=columns[SAMPLE_IDS],
        text_ids=columns[TEXT_IDS],
        kinds=columns[KINDS].to(torch.uint8),
        targets=torch.from_numpy(np.flatnonzero(table[LABELS] != IGNORE)),
        image_index=torch.from_numpy(image_index),
        image_rows=torch.from_numpy(image_rows),
        image_starts=torch.from_numpy(placements[STARTS] + np.repeat(np.asarray(begins), counts)),
        image_text_ids=torch.from_numpy(placements[TEXTS]),
        image_sample_ids=torch.from_numpy(placements[SAMPLES]),
        image_slots=torch.from_numpy(np.concatenate([np.arange(count) for count in counts])),
        pair_images=torch.from_numpy(pair_images),
        pair_ids=torch.from_numpy(pair_ids),
        **_row_facts(table[INPUT_IDS], table[KINDS], counts, codes),
        **others,
    )


def _pairs(table: np.ndarray, placements: np.ndarray, rows: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``pair_images`` (P,) and ``pair_ids`` (B, S) of a ``Batch``.

    Args:
        table: (6, B, S).
        placements: (4, M) as in ``PackedRow``; ``rows`` and ``images``, (M,): which row and image each is.
    """
    samples, texts = table[SAMPLE_IDS], table[TEXT_IDS]
    per_row, per_sample = 1 + max(0, int(samples.max(initial=0))), 1 + int(texts.max(initial=0))
    owner = (np.arange(len(samples))[:, None] * per_row + samples) * per_sample + texts  # (B, S), a number for each text
    placed = (rows * per_row + placements[SAMPLES]) * per_sample  # (M,), the number of the sample's shared part
    shape = len(samples) * per_row, per_sample
    size = shape[0] * shape[1]
    found = [np.bincount(placed + placements[TEXTS], weight, size).reshape(shape) for weight in (None, images)]
    count, total = (each + np.where(np.arange(per_sample) > 0, each[:, :1], 0) for each in found)  # shared images belong to all texts
    words = (table[KINDS] > Kind.IMAGE) & (texts > 0)
    alone = np.zeros(size, dtype=bool)
    alone[owner[words]] = True
    alone &= count.flatten() == 1
    numbers = np.where(alone, np.cumsum(alone) - 1, -1)  # of one image alone the sum of the numbers is its number
    return total.flatten()[alone].astype(np.int64), np.where(words, numbers[np.where(words, owner, 0)], -1)


def _row_facts(ids: np.ndarray, kinds: np.ndarray, placements: Sequence[int], codes: range) -> dict[str, int]:
    """``row_images``, ``row_image_tokens``, ``row_words``, ``row_codes`` and ``leading_images`` of a ``Batch``; ``ids`` and
    ``kinds`` are (B, S), ``placements`` counts the images of each row.
    """
    words = kinds > Kind.IMAGE
    coded = words & (ids >= codes.start) & (ids < codes.stop)
    images = (kinds == Kind.IMAGE).sum(axis=1)  # (B,) positions
    alike = placements[0] > 0 and len(set(placements)) == 1 and images.min() == images.max() > 0
    leading = alike and bool((kinds[:, : images[0]] == Kind.IMAGE).all())
    return {
        "row_images": max(placements),
        "row_image_tokens": int(images.max()),
        "row_words": int((words & ~coded).sum(axis=1).max()),
        "row_codes": int(coded.sum(axis=1).max()),
        "leading_images": placements[0] if leading else 0,
    }


def stack_views(views: Sequence[np.ndarray], side: int) -> Tensor:
    """N views of ``side`` x ``side`` pixels as one tensor.

    Args:
        views: (H, W, 3) uint8 each.

    Returns:
        (N, 3, H, W) uint8. In memory the channels are last, as in ``views``.
    """
    pixels = np.stack(views) if views else np.zeros((0, side, side, 3), np.uint8)  # (N, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
