"""Where the images of a text are among its tokens, and the columns of a row that follow from it.

An image is in a row as a block: its views, and tokens that say which view follows. Most images are one view
and no such token.

A, text tokens of one text; P, positions of one view; L, of one block; S, of a row; M, placements of a view in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from kempnerforge.data.batching.batch import IGNORE, Kind, Part

# rows of a table of columns
INPUT_IDS, LABELS, POSITIONS, TEXT_IDS, KINDS = range(5)
# rows of a table of placements
IMAGES, STARTS, TEXTS = range(3)
VIEW = -1
"""The value in place of a token id at the positions of a view."""
NO_POSITIONS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """What the data must know of the model.

    Attributes:
        image_tokens: positions that one view takes in the row; 0 where images stay out of the residual
            stream.
        image_size: pixels of a view's side; 0: the job has no images, and images of samples are left out.
        max_text_len: text tokens of a row at most; images inside the texts do not count.
        seq_len: positions of a row at most.
        pad_to: length of a row with ``data.batching = "pad"``.
        image_mean: of the encoder's normalisation, in [0, 1]: the colour where a view holds nothing of its
            image.
        token_side: tokens along a side of a view, if they are a grid; else 0.
        cell: pixels along a side of a token, where a view may have fewer tokens than ``image_tokens``; else 0.
        any_shape: whether a view may have its tokens in a grid that is longer than its side.
        codes: ids that are codes of a written picture.
        view_limits, reads_padding: as of ``AdapterConfig``.
    """

    image_tokens: int
    image_size: int
    max_text_len: int
    seq_len: int
    pad_to: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    token_side: int = 0
    cell: int = 0
    any_shape: bool = False
    codes: range = range(0)
    view_limits: tuple[int, int] | None = None
    reads_padding: bool = False


class ImageBlock(NamedTuple):
    """What one image is in a row.

    Attributes:
        ids: L of them: tokens of the vocabulary, and ``VIEW`` at the positions of views.
        starts: for each view its first position in the block. Where views take no position: the position of
            the token before it in the block, which is the first to see it; without one 0, the position of the
            token after the block.
        parts: what of each view is in the row; empty: all. Views that are read together have a single start.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...] = (0,)
    parts: tuple[Part, ...] = ()

    @property
    def views(self) -> int:
        """How many there are."""
        return len(self.parts or self.starts)

    def parts_of(self, image: int) -> tuple[Part, ...]:
        """``parts`` of a block that is number ``image`` of its sample."""
        return tuple(part if part.image < 0 else part._replace(image=image) for part in self.parts)

    def with_contents(self, contents: Sequence[tuple[int, ...]], side: int) -> ImageBlock:
        """With the ``content`` of each view, which has ``side`` tokens along a side."""
        parts = self.parts or (Part(side, side, alone=False),) * len(self.starts)
        return self._replace(parts=tuple(part._replace(content=content) for part, content in zip(parts, contents, strict=True)))

    @classmethod
    def together(cls, views: int, first: tuple[int, ...] = ()) -> ImageBlock:
        """So many views that are read together and take no position, and the tokens before them."""
        return cls(first, (max(0, len(first) - 1),), tuple(Part(0, 0, alone=False, image=0, view=view) for view in range(views)))

    @classmethod
    def of(cls, markers: Sequence[Sequence[int]], image_tokens: int, parts: tuple[Part, ...] = ()) -> ImageBlock:
        """Views one after the other.

        Args:
            markers: for each view the tokens that are before it.
            image_tokens: P, where there are no ``parts``.
        """
        ids: list[int] = []
        starts: list[int] = []
        for view, tokens in enumerate(markers):
            ids += tokens
            starts.append(len(ids) if image_tokens else max(0, len(ids) - 1))
            ids += [VIEW] * (parts[view].rows * parts[view].columns if parts else image_tokens)
        return cls(tuple(ids), tuple(starts), parts)

    @classmethod
    def in_rows(cls, whole: Part | None, tiles: Sequence[Sequence[Part]], tokens: Sequence[int], first: Sequence[int] = ()) -> ImageBlock:
        """A view of the whole image, then the tiles' tokens in rows across the image, each row with a token at
        its end; without tiles that token is after the view.

        Args:
            whole: None: there is no such view.
            tiles: what is shown of each, row by row of tiles; in a row of them all have as many rows.
            tokens: the one at the end of a row; and, if the rows of ``whole`` end with it as well, those
                before and after it and before and after the tiles.
            first: tokens before everything.
        """
        ids, starts, parts = [*first], list[int](), list[Part]()
        newline, *around = tokens
        if whole is not None and not around:
            starts.append(len(ids))
            parts.append(whole)
            ids += [VIEW] * (whole.rows * whole.columns) + ([] if tiles else [newline])
        for group in ([[whole]] if whole is not None and around else [], tiles):
            ids += around[:1] if group else []
            for across in group:
                width = sum(tile.columns for tile in across)
                for number, tile in enumerate(across):
                    starts.append(len(ids) + sum(before.columns for before in across[:number]))
                    parts.append(tile._replace(step=width + 1))
                ids += ([VIEW] * width + [newline]) * across[0].rows
            ids += around[1:] if group else []
        return cls(tuple(ids), tuple(starts), tuple(parts))


class Prompt(NamedTuple):
    """What is before an answer.

    Attributes:
        image_at: for each image the offset in ``ids`` of the token after it; 0 is in front of everything.
        blocks: what each image is in the row; empty: each is one view and nothing else.
    """

    ids: list[int]
    image_at: tuple[int, ...] = ()
    blocks: tuple[ImageBlock, ...] = ()

    def blocks_of(self, image_tokens: int) -> Sequence[ImageBlock]:
        """``blocks``, those that are left out as well."""
        return self.blocks or [ImageBlock.of([()], image_tokens)] * len(self.image_at)

    def length(self, image_tokens: int) -> int:
        """Positions that the prompt takes in a row."""
        return len(self.ids) + sum(len(block.ids) for block in self.blocks_of(image_tokens))


@dataclass(frozen=True)
class TextTokens:
    """One text without its images, and where they belong.

    Attributes:
        table: (5, A) int64 as in ``Encoded.table``, with positions from 0 and text id 1.
        image_at: as in ``Prompt``; empty if the text says nothing of images.
        lead: how many of them come before anything else of the text.
    """

    table: np.ndarray
    image_at: tuple[int, ...] = ()
    lead: int = 0

    @property
    def length(self) -> int:
        """A."""
        return self.table.shape[1]

    @classmethod
    def of(cls, ids: Sequence[int], trained: np.ndarray, image_at: tuple[int, ...] = (), lead: int = 0) -> TextTokens:
        """
        Args:
            ids: A tokens.
            trained: (A,) bool; never the first.
        """
        table = np.empty((5, len(ids)), dtype=np.int64)
        table[INPUT_IDS] = ids
        table[LABELS] = _labels(table[INPUT_IDS], trained, np.arange(len(ids)), len(ids))
        table[POSITIONS] = np.arange(len(ids))
        table[TEXT_IDS] = 1
        table[KINDS] = np.where(trained, Kind.ANSWER, Kind.PROMPT)
        return cls(table, image_at, lead)

    def spread(self, skip: int, blocks: Sequence[ImageBlock]) -> tuple[np.ndarray, np.ndarray]:
        """The text with its images in it, but for the first ``skip``.

        Returns:
            Table (5, A + the sum of L over the n images in it), and where the n blocks begin.
        """
        if len(self.image_at) <= skip:
            return self.table, NO_POSITIONS
        at = np.asarray(self.image_at[skip:], dtype=np.int64)
        room = np.asarray([0, *accumulate(len(block.ids) for block in blocks[skip : skip + len(at)])])
        if not room[-1]:
            return self.table, at
        length = self.table.shape[1]
        columns = np.arange(length) + room[np.searchsorted(at, np.arange(length), side="right")]  # after the blocks before each token
        begins = at + room[:-1]
        table = np.empty((5, length + room[-1]), dtype=np.int64)
        for block, begin in zip(blocks[skip:], begins, strict=True):
            _fill(table[:, begin : begin + len(block.ids)], block)
        table[:, columns] = self.table
        table[LABELS] = _labels(self.table[INPUT_IDS], self.table[KINDS] == Kind.ANSWER, columns, table.shape[1])
        table[POSITIONS] = np.arange(table.shape[1])
        table[TEXT_IDS] = 1
        return table, begins


def _fill(table: np.ndarray, block: ImageBlock) -> None:
    """Ids and kinds of ``block``: (5, L)."""
    if max(block.ids, default=VIEW) == VIEW:  # nothing but views
        table[INPUT_IDS], table[KINDS] = 0, Kind.IMAGE
        return
    ids = np.asarray(block.ids, dtype=np.int64)
    table[INPUT_IDS] = np.maximum(ids, 0)
    table[KINDS] = np.where(ids == VIEW, Kind.IMAGE, Kind.PROMPT)


def _labels(ids: np.ndarray, trained: np.ndarray, columns: np.ndarray, length: int) -> np.ndarray:
    """(length,) labels: each trained token is the label of the position before it."""
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[columns[trained] - 1] = ids[trained]
    return labels


def lay_out(texts: Sequence[TextTokens], shared: int, blocks: Sequence[ImageBlock]) -> tuple[np.ndarray, np.ndarray]:
    """One row: the images that all texts share, then the texts.

    Args:
        shared: images in front.

    Returns:
        Columns (5, S), and placements (3, M): number of the view over all images, first position, text.
    """
    *begins, front = accumulate((len(block.ids) for block in blocks[:shared]), initial=0)
    images = np.zeros((5, front), dtype=np.int64)
    images[LABELS], images[POSITIONS] = IGNORE, np.arange(front)
    for block, begin in zip(blocks, begins, strict=False):
        _fill(images[:, begin : begin + len(block.ids)], block)
    spread = [text.spread(shared, blocks) for text in texts]
    sizes = [table.shape[1] for table, _ in spread]
    columns = np.concatenate([images, *(table for table, _ in spread)], axis=1)  # (5, S)
    columns[TEXT_IDS, front:] = np.repeat(np.arange(1, len(texts) + 1), sizes)
    columns[POSITIONS, front:] += front
    firsts = list(accumulate((block.views for block in blocks), initial=0))  # the number of each image's first view
    placements = _place(0, begins, blocks, firsts)
    begin = front
    for number, ((_, inside), size) in enumerate(zip(spread, sizes, strict=True), start=1):
        if len(inside):
            placements += _place(number, (begin + inside).tolist(), blocks[shared:], firsts[shared:])
        begin += size
    return columns, np.asarray(placements, dtype=np.int64).reshape(-1, 3).T  # (3, M)


def _place(text: int, begins: Sequence[int], blocks: Sequence[ImageBlock], firsts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(number of the view, first position, text) of all views of the images that begin at ``begins``."""
    return [
        (first + view, begin + start, text)
        for begin, block, first in zip(begins, blocks, firsts, strict=False)
        for view, start in enumerate(block.starts)
    ]
