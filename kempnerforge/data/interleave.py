"""Where the images of a text stand among its tokens, and the columns of a row that follow from it.

A, text tokens of one text; P, positions of one image; S, positions of a row; M, placements of an image in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kempnerforge.data.batch import IGNORE, Kind

# rows of a table of columns
INPUT_IDS, LABELS, POSITIONS, TEXT_IDS, KINDS = range(5)
# rows of a table of placements
IMAGES, STARTS, TEXTS = range(3)


@dataclass(frozen=True)
class Layout:
    """What the data must know of the model.

    Attributes:
        image_tokens: positions that one image takes in the row; 0 where images stay out of the residual stream.
        image_size: pixels of a side; 0: the job has no images, and those of the samples are left out.
        max_text_len: text tokens of a row at most; images inside the texts do not count.
        seq_len: positions of a row at most.
        pad_to: length of a row with ``data.batching = "pad"``.
    """

    image_tokens: int
    image_size: int
    max_text_len: int
    seq_len: int
    pad_to: int


class Prompt(NamedTuple):
    """What stands before an answer.

    Attributes:
        ids: tokens of the text.
        image_at: for each image the offset in ``ids`` before which it stands; 0 is in front of everything.
    """

    ids: list[int]
    image_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Words:
    """One text without its images, and where they belong.

    Attributes:
        table: (5, A) int64 as in ``Encoded.table``, with positions from 0 and text id 1.
        image_at: as in ``Prompt``; empty if the text says nothing of images.
        lead: how many of them come before anything else of the text.
    """

    table: np.ndarray
    image_at: tuple[int, ...] = ()
    lead: int = 0

    @classmethod
    def of(cls, ids: Sequence[int], trained: np.ndarray, image_at: tuple[int, ...] = (), lead: int = 0) -> Words:
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

    def spread(self, skip: int, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The text with its images in it, but for the first ``skip``.

        Args:
            image_tokens: P.

        Returns:
            Table (5, A + n * P), and the starts of the n images in it.
        """
        at = np.asarray(self.image_at[skip:], dtype=np.int64)
        if not len(at) or not image_tokens:
            return self.table, at
        length = self.table.shape[1]
        before = np.searchsorted(at, np.arange(length), side="right")  # images that come before each token
        columns = np.arange(length) + image_tokens * before
        table = np.zeros((5, length + image_tokens * len(at)), dtype=np.int64)
        table[KINDS] = Kind.IMAGE
        table[:, columns] = self.table
        table[LABELS] = _labels(self.table[INPUT_IDS], self.table[KINDS] == Kind.ANSWER, columns, table.shape[1])
        table[POSITIONS] = np.arange(table.shape[1])
        table[TEXT_IDS] = 1
        return table, at + image_tokens * np.arange(len(at))


def _labels(ids: np.ndarray, trained: np.ndarray, columns: np.ndarray, length: int) -> np.ndarray:
    """(length,) labels: each trained token is that of the position before it."""
    labels = np.full(length, IGNORE, dtype=np.int64)
    labels[columns[trained] - 1] = ids[trained]
    return labels


def lay_out(texts: Sequence[Words], shared: int, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """One row: the images that all texts share, then the texts.

    Args:
        texts: those that the row holds.
        shared: images in front.
        image_tokens: P.

    Returns:
        Columns (5, S), and placements (3, M): number of the image, first position, text.
    """
    front = shared * image_tokens
    images = np.zeros((5, front), dtype=np.int64)
    images[LABELS], images[KINDS], images[POSITIONS] = IGNORE, Kind.IMAGE, np.arange(front)
    spread = [text.spread(shared, image_tokens) for text in texts]
    lengths = [table.shape[1] for table, _ in spread]
    columns = np.concatenate([images, *(table for table, _ in spread)], axis=1)  # (5, S)
    columns[TEXT_IDS, front:] = np.repeat(np.arange(1, len(texts) + 1), lengths)
    columns[POSITIONS, front:] += front
    placements = [np.stack([np.arange(shared), np.arange(shared) * image_tokens, np.zeros(shared, np.int64)])]
    begin = front
    for number, (table, starts) in enumerate(spread, start=1):
        if len(starts):
            placements.append(np.stack([shared + np.arange(len(starts)), begin + starts, np.full(len(starts), number)]))
        begin += table.shape[1]
    return columns, np.concatenate(placements, axis=1)  # (3, M)
