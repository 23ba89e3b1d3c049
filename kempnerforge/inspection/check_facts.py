"""What follows from the sizes of all samples: how long texts are, how long rows should be, how much of them
padding would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from kempnerforge.config.training import TrainConfig
from kempnerforge.data.batching.loader import CLASS_POSITIONS, RowClasses
from kempnerforge.data.batching.order import Order, Shuffled
from kempnerforge.data.batching.pack import PackSampler
from kempnerforge.data.batching.sampler import StepSampler
from kempnerforge.data.source import Source
from kempnerforge.data.text.interleave import Layout
from kempnerforge.inspection.read_all import Found

COVERED = 99.5
"""Percent of the samples that recommended limits leave whole."""
MULTIPLE = 64
"""Recommended limits are multiples of this: kernels like round sizes."""
MAX_STEPS = 200
"""Optimizer steps that are laid out at most to measure padding."""
GOOD_SHARE = 0.95
"""Of useful positions in packed rows."""
PERCENTILES = (5.0, 50.0, 90.0, 95.0, 99.0, COVERED)


def distribution(values: np.ndarray) -> dict[str, float]:
    """Mean, percentiles and maximum of ``values``; empty for none."""
    if not len(values):
        return {}
    percentiles = {f"p{percent:g}": float(value) for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    return {"mean": float(values.mean()), **percentiles, "max": float(values.max())}


def histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of whole numbers in at most ``bins`` bins of equal whole width, and their edges, one more. The
    last edge is not reached.
    """
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    width = max(1, -(-(high - low + 1) // bins))
    edges = np.arange(low, high + 1 + width, width)
    return np.histogram(values, edges)[0], edges


@dataclass(frozen=True)
class RowLimits:
    """Limits of a row, and what they would do to the samples that were read.

    Attributes:
        too_long: samples with a text that does not fit at all: they are refused, or cut where
            ``data.truncate`` says so.
        shortened: samples of which not all texts fit into one row.
    """

    max_text_len: int
    seq_len: int
    too_long: int
    shortened: int


def row_limits(found: Found, max_text_len: int, seq_len: int) -> RowLimits:
    """What these limits would do."""
    sized = found.has_size
    too_long = sized & ((found.column("longest") > max_text_len) | (found.column("needed") > seq_len))
    whole = (found.column("text_tokens") <= max_text_len) & (found.column("positions") <= seq_len)
    return RowLimits(max_text_len, seq_len, int(too_long.sum()), int((sized & ~too_long & ~whole).sum()))


def recommended(found: Found, layout: Layout) -> RowLimits:
    """The smallest limits, as multiples of ``MULTIPLE``, that leave ``COVERED`` percent of the samples whole;
    a row also has room for one image and a text of full length, which a job must have.
    """
    sized = found.sizes[found.has_size]
    if not len(sized):
        return row_limits(found, layout.max_text_len, layout.seq_len)
    texts, positions = (np.percentile(found.column(name)[found.has_size], COVERED) for name in ("text_tokens", "positions"))
    text = _round_up(texts)
    return row_limits(found, text, max(_round_up(positions), _round_up(layout.image_tokens + text)))


def _round_up(value: float) -> int:
    return int(-(-value // MULTIPLE)) * MULTIPLE


@dataclass(frozen=True)
class Batching:
    """What one mode would make of the samples.

    Attributes:
        seq_len: of packed rows, else 0.
        useful: share of all positions that is no padding.
        trained: share of all positions that has a label.
        row_length: mean length of a row.
    """

    mode: str
    seq_len: int
    useful: float
    trained: float
    row_length: float
    samples_per_row: float

    @property
    def name(self) -> str:
        """The mode, with the row length that it was tried with."""
        return f"{self.mode}, train.seq_len = {self.seq_len}" if self.seq_len else self.mode


class ReadSizes:
    """Sizes of samples from what was read. Those that were refused count as the median of the others, as they
    are replaced.

    Args:
        max_images: views of a row at most; a sample with more is refused. 0 is no limit.
    """

    def __init__(self, found: Found, n: int, max_images: int = 0) -> None:
        rows, views, positions = found.column("row"), found.column("views"), np.maximum(found.column("positions"), 1)
        trained = found.column("trained") * rows // positions  # of the texts that fit
        usable = (rows > 0) & ((views <= max_images) | (not max_images))
        self.usable = bool(usable.any())
        columns = np.stack([rows, views, trained], axis=1)
        self._table = np.zeros((n, 3), dtype=np.int64)
        if self.usable:
            self._table[:] = np.median(columns[usable], axis=0)
            self._table[found.indices[usable]] = columns[usable]

    def __call__(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """(k,) sample numbers -> (k, 2) positions and views."""
        return self._table[np.asarray(indices), :2]

    def trained(self, indices: Sequence[int]) -> int:
        """Labels of these samples."""
        return int(self._table[np.asarray(indices), 2].sum())


def batching_modes(found: Found, source: Source, layout: Layout, train_cfg: TrainConfig, max_images: int) -> list[Batching]:
    """What each batching mode would make of the samples: one epoch as the samplers of training lay it out, or
    ``MAX_STEPS`` steps. Where packed rows of ``layout.seq_len`` stay below ``GOOD_SHARE``, longer ones are
    tried, too.

    Args:
        found: what was read. If that is not all, the modes are laid out over what was, in any order.
        max_images: views of a packed row at most; 0 is no limit.
    """
    sizes = ReadSizes(found, len(source), max_images)
    if not sizes.usable:
        return []
    order = source.order(train_cfg.seed) if len(found.indices) == len(source) else _Chosen(found.indices, train_cfg.seed)
    batch, accum, seed = train_cfg.step_rows, train_cfg.grad_accum_steps, train_cfg.seed
    modes = []
    by_size = lambda indices: sizes(indices)[:, 0] // CLASS_POSITIONS  # a stream is not read again for it
    for mode, classes in (("pad", None), ("group", RowClasses(source, layout) if order.window is None else by_size)):
        sampler = StepSampler(order, batch, accum=accum, seed=seed, lengths=classes)
        tally = _Tally(sizes)
        for rows in islice(sampler, _steps(len(found.indices) / batch) * accum):
            tally.add([[index] for index, _ in rows], layout.pad_to if mode == "pad" else 0)
        modes.append(tally.result(mode))
    total = int(sizes(found.indices)[:, 0].sum())
    packed: list[Batching] = []
    for seq_len in (layout.seq_len << double for double in range(5)):
        sampler = PackSampler(order, sizes, rows=batch, seq_len=seq_len, max_images=max_images, accum=accum, seed=seed)
        tally = _Tally(sizes)
        for rows in islice(sampler, _steps(total / (batch * seq_len)) * accum):
            tally.add([[index for index, _ in row] for row in rows], seq_len)
        packed = [*packed[:1], tally.result("pack", seq_len)]
        if packed[-1].useful >= GOOD_SHARE:
            break
    return [*modes, *packed]


def _steps(epoch: float) -> int:
    return min(MAX_STEPS, max(1, int(epoch)))


class _Chosen(Order):
    """A part of a source, shuffled."""

    def __init__(self, indices: np.ndarray, seed: int) -> None:
        self._indices, self._shuffled = indices, Shuffled(len(indices), seed)

    def indices(self, begin: int, end: int) -> np.ndarray:
        return self._indices[self._shuffled.indices(begin, end)]

    def stretch(self, position: int) -> tuple[int, int]:
        return self._shuffled.stretch(position)


class _Tally:
    """Adds up rows."""

    def __init__(self, sizes: ReadSizes) -> None:
        self._sizes = sizes
        self._rows = self._samples = self._positions = self._useful = self._trained = 0

    def add(self, rows: Sequence[Sequence[int]], length: int) -> None:
        """A micro-batch of ``rows``, padded to ``length`` or its longest row."""
        lengths = [int(self._sizes(row)[:, 0].sum()) for row in rows]
        self._rows += len(rows)
        self._samples += sum(map(len, rows))
        self._positions += len(rows) * max([length, *lengths])
        self._useful += sum(lengths)
        self._trained += sum(self._sizes.trained(row) for row in rows)

    def result(self, mode: str, seq_len: int = 0) -> Batching:
        positions, rows = max(self._positions, 1), max(self._rows, 1)
        return Batching(mode, seq_len, self._useful / positions, self._trained / positions, self._positions / rows, self._samples / rows)
