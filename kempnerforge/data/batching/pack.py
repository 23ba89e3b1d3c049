"""``data.batching = "pack"``: several samples in one row, which do not see each other.

What a row holds is decided from the sizes of the samples, before any image is decoded. The stream of samples
(``order.py``) is cut into windows of a fixed number of samples; each window is packed for itself, its rows
are shuffled, and the rows of all windows form one endless list, of which every optimizer step takes the next
``train.batch_size``.

R, rows of an optimizer step; S, positions of a row; M, placements of a view in it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kempnerforge.data.batching.batch import Part
from kempnerforge.data.batching.order import CachedCalls, Order
from kempnerforge.data.batching.sampler import RankSampler
from kempnerforge.data.sample import SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoded, Encoder
from kempnerforge.data.text.interleave import IMAGES, STARTS

WINDOW_ROWS = 64
"""Rows that a window fills, about. Its last row is seldom full, so half a row in so many is lost; four steps'
worth if that is more.
"""
MAX_WINDOW = 16384
"""Samples of a window at most: they are measured before its first row is there, in about a second."""
PROBE = 256
"""Samples whose mean length says how many fill a window."""

SizesOf = Callable[[np.ndarray], np.ndarray]
"""(k,) sample numbers -> (k, 2) positions and views; (0, 0) for a sample that cannot be used."""
Pack = tuple[tuple[int, int], ...]
"""The (index, step) of the samples of one row."""


# after the rows of ``Encoded.table`` and ``Encoded.placements``
SAMPLE_IDS, SAMPLES = 5, 3


@dataclass
class PackedRow:
    """One or several samples in one row.

    Attributes:
        table: (6, S) int64: as ``Encoded.table``, and which sample each position belongs to, from 0.
        images: n arrays of (H, W, 3) uint8, the views of all samples.
        placements: (4, M) int64: as ``Encoded.placements``, and the sample.
        image_size: H and W; 0: no images in this job.
        names, parts: id and section of each sample.
        documents: (positions, texts) of each sample.
        left_out: texts of the samples that did not fit.
        codes: as in ``Layout``.
        skipped: (sample id, reason) of samples that could not be used.
        image_parts: as of ``Encoded``.
    """

    table: np.ndarray
    images: list[np.ndarray]
    placements: np.ndarray
    image_size: int
    names: list[str]
    parts: list[int]
    documents: tuple[tuple[int, int], ...]
    left_out: int = 0
    codes: range = range(0)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    image_parts: tuple[Part, ...] = ()


def join(encoded: Sequence[Encoded]) -> PackedRow:
    """One row of samples, one after the other. Each keeps the positions and the numbers of texts that it has
    alone.
    """
    lengths = [e.table.shape[1] for e in encoded]
    table = np.empty((6, sum(lengths)), dtype=np.int64)
    placements = np.empty((4, sum(e.placements.shape[1] for e in encoded)), dtype=np.int64)
    start = place = image = 0
    for number, e in enumerate(encoded):
        end, last = start + lengths[number], place + e.placements.shape[1]
        table[:SAMPLE_IDS, start:end], table[SAMPLE_IDS, start:end] = e.table, number
        placed = placements[:, place:last]
        placed[:SAMPLES], placed[SAMPLES] = e.placements, number
        placed[STARTS] += start
        placed[IMAGES] += image
        start, place, image = end, last, image + len(e.images)
    return PackedRow(
        table,
        [image for e in encoded for image in e.images],
        placements,
        encoded[0].image_size,
        [e.id for e in encoded],
        [e.part for e in encoded],
        tuple(zip(lengths, (e.num_texts for e in encoded), strict=True)),
        sum(e.left_out for e in encoded),
        encoded[0].codes,
        [bad for e in encoded for bad in e.skipped],
        tuple(part for e in encoded for part in e.image_parts),
    )


def knapsack(sizes: np.ndarray, capacity: int, max_images: int = 0) -> list[list[int]]:
    """Puts samples into as few rows as it can, with about as many images in each.

    Vector bin packing by the dot product of a sample's size and a row's free space (Panigrahy et al. 2011,
    "Heuristics for vector bin packing"), large samples first. The capacity for images is the mean number of
    images in a row, so that the vision encoder takes about the same time for each row; a row may exceed it at
    a cost, but never exceeds ``max_images``. As many rows as are certainly needed are open from the start.
    The same sizes give the same rows.

    Args:
        sizes: (n, 2) positions and images of each sample.
        max_images: of a row; 0 is no limit.

    Returns:
        Indices into ``sizes``, each once, by row; no row is empty.
    """
    limit = max_images or int(sizes[:, 1].sum())
    assert not len(sizes) or (sizes[:, 0].max() <= capacity and sizes[:, 1].max() <= limit), "a sample fits into an empty row"
    positions, images = (int(total) for total in sizes.sum(axis=0))
    count = -(-positions // capacity)
    count = max(1, count, -(-images // limit) if limit else 0)
    share = max(1.0, images / count)
    need = sizes / (capacity, share)  # (n, 2)
    room, left = np.full(count + len(sizes), capacity), np.full(count + len(sizes), limit)
    unused = np.ones((count + len(sizes), 2))  # of capacity and share
    rows: list[list[int]] = [[] for _ in range(count)]
    for sample in np.argsort(-need.sum(axis=1), kind="stable").tolist():
        length, views = sizes[sample].tolist()
        fits = (room[:count] >= length) & (left[:count] >= views)
        best = int(np.where(fits, unused[:count] @ need[sample], -np.inf).argmax())
        if not fits[best]:
            best, count = count, count + 1
            rows.append([])
        rows[best].append(sample)
        room[best] -= length
        left[best] -= views
        unused[best] -= need[sample]
    return [row for row in rows if row]


class Sizes:
    """Sizes of a source's samples, each measured when it is first asked for.

    Args:
        encoder: measures them; samples with more than ``data.max_images_per_row`` views cannot be used.
    """

    def __init__(self, source: Source, encoder: Encoder) -> None:
        self.source, self.encoder = source, encoder
        self._known = np.zeros((len(source), 2), dtype=np.int32)  # one more than the size, so that memory is taken where it is written

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return Sizes, (self.source, self.encoder)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """(k,) sample numbers -> (k, 2) positions and views; (0, 0) for a sample that cannot be used."""
        for index in np.unique(indices[self._known[indices, 0] == 0]).tolist():  # in the order of the source
            positions, views = self.measure(index)
            self._known[index] = positions + 1, views + 1
        return self._known[indices].astype(np.int64) - 1

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """(k,) sample numbers -> (k,) positions."""
        return self(indices)[:, 0]

    def measure(self, index: int) -> tuple[int, int]:
        """Positions and views of one sample."""
        try:
            positions, views = self.encoder.measure(self.source[index])
        except SampleError:
            return 0, 0
        most = self.encoder.cfg.max_images_per_row
        return (0, 0) if most and views > most else (positions, views)


@dataclass(frozen=True)
class Window:
    """A stretch of the stream that is packed for itself: its first row in the list of all rows, its first
    sample in the stream, and the order of the samples there.
    """

    first_row: int
    begin: int
    order: Order


class PackSampler(RankSampler[Pack]):
    """Yields micro-batches of packed rows for one rank, without end: a pure function of (seed, step), as
    ``StepSampler`` is.

    A row is a tuple of ``(index, step)``. A phase of the order begins with the first window that begins at or
    after the step of the phase.

    NOTE: which window a step is in is known from the number of rows in all windows before it. So a run that
    is resumed late measures the samples of all steps before once more, each of them once in all epochs, and
    packs them: 10 to 60 us and 6 us a sample on one core, half a minute for a million captions. Every rank
    does that for all samples of the job. ``benchmarks/packing.py`` measures it.

    Args:
        rows: R.
        max_images: views of a row at most; 0 is no limit.
        rank, world, accum, seed, start_step: as in ``RankSampler``.

    Raises:
        ValueError: the rows of a step cannot be cut evenly.
    """

    def __init__(
        self,
        order: Order,
        sizes: SizesOf,
        rows: int,
        seq_len: int,
        max_images: int = 0,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        super().__init__(rows, rank, world, accum, seed, start_step)
        self.sizes, self.seq_len, self.max_images = sizes, seq_len, max_images
        self._windows = [Window(0, 0, order.at(0, 0))]
        self._packed, self._order = CachedCalls(self._pack, 3), order

    def cut(self, step: int, begin: int, end: int) -> list[Pack]:
        return [tuple((index, step) for index in row) for row in self.global_rows(step)[begin:end]]

    def global_rows(self, step: int) -> list[list[int]]:
        """The R rows of ``step`` over all ranks, as sample numbers."""
        found: list[list[int]] = []
        for row in range(step * self.size, (step + 1) * self.size):
            while row >= self._windows[-1].first_row:  # the rows of the last window are not counted yet
                self._extend()
            number = bisect_right(self._windows, row, key=lambda window: window.first_row) - 1
            found.append(self._packed(number)[row - self._windows[number].first_row])
        return found

    @cached_property
    def window_size(self) -> int:
        """Samples of a window: as many as fill about ``WINDOW_ROWS`` rows, judged by the first ones of the
        stream.
        """
        lengths = self.sizes(self._order.indices(0, PROBE))[:, 0]
        per_row = self.seq_len / lengths[lengths > 0].mean() if lengths.any() else 1
        size = min(MAX_WINDOW, round(per_row * max(WINDOW_ROWS, 4 * self.size)))
        if self._order.window is not None:  # a stream is not read further ahead than it has to be
            size = min(size, max(self._order.window, round(per_row * self.size)))
        return max(1, size)

    def _extend(self) -> None:
        """Packs the last window; the next one begins after it."""
        last = self._windows[-1]
        first_row, begin = last.first_row + len(self._packed(len(self._windows) - 1)), last.begin + self.window_size
        self._windows.append(Window(first_row, begin, last.order.at(first_row // self.size, begin)))

    def _pack(self, number: int) -> list[list[int]]:
        """The rows of a window, in random order; the samples of a row in the order of the stream."""
        window = self._windows[number]
        indices = window.order.indices(window.begin, window.begin + self.window_size)
        sizes = self.sizes(indices)
        usable = sizes[:, 0] > 0
        # the replacement of an unusable sample finds room for a sample of mean size
        sizes[~usable] = sizes[usable].mean(axis=0) if usable.any() else (self.seq_len, 0)
        rows = knapsack(sizes, self.seq_len, self.max_images)
        shuffled = np.random.default_rng((self.seed, 2, number)).permutation(len(rows))
        return [indices[sorted(rows[k])].tolist() for k in shuffled]
