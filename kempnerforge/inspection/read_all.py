"""Reading a whole source before training does: every sample's size, every image decoded, everything unusable
listed with its reason.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np

from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.images.decode import ImageError
from kempnerforge.data.sample import Sample, SampleError
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import LABELS
from kempnerforge.data.traces import KINDS, SampleDigests, Traces, image_digest, joined
from kempnerforge.inspection.remarks import Remarks, merged
from kempnerforge.util.errors import InputError

UNLIMITED = 2**30
CHUNK = 32
"""Samples that a worker takes at once."""
ALONE_S = 4.0
"""Starting a worker takes a few seconds."""
COLUMNS = ("positions", "row", "text_tokens", "longest", "needed", "trained", "texts", "images", "views")


@dataclass(frozen=True)
class Bad:
    """A sample that cannot be used.

    Attributes:
        kind: "row" (the source cannot read it), "image", "text", "length" (a text that does not fit into a
            row, or too many images), or "crash": not refused as unusable, but with an exception that would
            end training.
    """

    index: int
    id: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        indices: (n,) the samples read.
        sizes: (n, len(COLUMNS)) int64. ``positions``: of a row with all of a sample's texts and images;
            ``row``: of its row under the limits of the job, 0 if it is refused; ``text_tokens``: of all
            texts; ``longest``: of one text; ``needed``: positions of a row with the longest text alone;
            ``trained``: labels; ``texts``; ``images``; ``views``. All 0 where a sample has no size.
        marks: of the usable samples by kind, see ``traces``.
        remarks: on the usable samples.
    """

    indices: np.ndarray
    sizes: np.ndarray
    bad: list[Bad]
    marks: dict[str, SampleDigests]
    remarks: Remarks

    def column(self, name: str) -> np.ndarray:
        """(n,) one of ``COLUMNS``."""
        return self.sizes[:, COLUMNS.index(name)]

    @property
    def has_size(self) -> np.ndarray:
        """(n,) bool: samples that can be read, if only with more room."""
        return self.column("positions") > 0

    @property
    def distinct_images(self) -> int:
        """Images of different content."""
        return len(np.unique(self.marks["image"].digests))


class SampleReader:
    """Reads samples of one source.

    Args:
        images: decode them, and take digests of their content.
    """

    def __init__(self, source: Source, encoder: Encoder, images: bool) -> None:
        self.source, self.encoder = source, encoder
        self.images = images and encoder.layout.image_size > 0
        layout = replace(encoder.layout, max_text_len=UNLIMITED, seq_len=UNLIMITED)
        self.roomy = Encoder(encoder.tokenizer, encoder.cfg, layout, encoder.seed)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # without what its caches hold
        return SampleReader, (self.source, self.encoder, self.images)

    def read(self, indices: Sequence[int]) -> Found:
        """Reads the samples ``indices``."""
        sizes = np.zeros((len(indices), len(COLUMNS)), dtype=np.int64)
        bad: list[Bad] = []
        traces, remarks = Traces(len(self.source)), Remarks()
        for number, index in enumerate(indices):
            name = f"{self.source.cfg.source}/{self.source.split}[{index}]"
            kind = "row"
            try:
                sample = self.source[index]
                name = sample.id
                kind = "text"
                self._size(sample, sizes[number])
                if self.images:
                    kind = "image"
                    self.roomy.views(sample)
                traces.add(index, sample, [image_digest(image) for image in (*sample.images, *sample.shows)] if self.images else [])
                remarks.add(sample, self.source.asks(index))
            except SampleError as error:
                of_image = isinstance(error, ImageError) or isinstance(error.__context__, ImageError)
                bad.append(Bad(index, name, "image" if of_image else kind, str(error)))
                sizes[number] = 0
            except Exception as error:
                bad.append(Bad(index, name, "crash", f"{type(error).__name__}: {error}"))
                sizes[number] = 0
            else:
                if reason := self._too_long(sizes[number]):
                    bad.append(Bad(index, name, "length", reason))
        taken = np.asarray(indices, dtype=np.int64)
        return Found(taken, sizes, bad, traces.marks(), remarks)

    def _size(self, sample: Sample, sizes: np.ndarray) -> None:
        """Fills in one row of ``Found.sizes``; raises SampleError if the sample cannot be encoded, however
        much room there is.
        """
        positions, views = self.roomy.measure(sample)
        if not positions:
            positions = self.roomy.encode(sample, 0).table.shape[1]  # says what is wrong
        words = [self.roomy.texts[sample.part].encode(text).table for text in sample.texts]
        lengths = [table.shape[1] for table in words]  # of (5, A)
        longest = int(np.argmax(lengths))
        needed = positions
        if len(words) > 1:
            needed, _ = self.roomy.measure(replace(sample, texts=(sample.texts[longest],)))
        layout = self.encoder.layout
        fits = positions <= layout.seq_len and (sum(lengths) <= layout.max_text_len or len(lengths) == 1)
        sizes[:] = (
            positions,
            positions if fits and lengths[longest] <= layout.max_text_len else self.encoder.measure(sample)[0],
            sum(lengths),
            lengths[longest],
            needed,
            sum(int((table[LABELS] != IGNORE).sum()) for table in words),
            len(words),
            len(sample.images),
            views,
        )

    def _too_long(self, sizes: np.ndarray) -> str:
        """Why the sample does not fit into a row; empty if it does."""
        positions, row, _, longest, needed, *_, views = sizes.tolist()
        most = self.encoder.cfg.max_images_per_row
        if most and views > most:
            return f"{views} images or tiles, data.max_images_per_row = {most}"
        if row or not positions:
            return ""
        layout = self.encoder.layout
        if needed > layout.seq_len:
            return f"the longest text takes {needed} positions with the images, train.seq_len = {layout.seq_len}"
        return f"the longest text has {longest} tokens, vlm.max_text_len = {layout.max_text_len}"


def read_all(
    reader: SampleReader, indices: Sequence[int], workers: int, done: Callable[[int], object] = int, alone_s: float = ALONE_S
) -> Found:
    """Reads ``indices``, in ``workers`` processes when it takes long.

    Args:
        reader: of the source. It is sent to each worker, so its source must be picklable, as for a loader.
        workers: processes; 1 reads all in this one.
        done: told how many more are read, again and again.
        alone_s: seconds that this process reads by itself before it starts others.

    Raises:
        ValueError: a worker died.
    """
    chunks = [indices[at : at + CHUNK] for at in range(0, len(indices), CHUNK)]
    parts: list[Found] = []
    begin = time.monotonic()
    while len(parts) < len(chunks) and (workers < 2 or time.monotonic() - begin < alone_s):
        parts.append(reader.read(chunks[len(parts)]))
        done(len(parts[-1].indices))
    rest = chunks[len(parts) :]
    results = _in_pool(reader, rest, min(workers, len(rest))) if rest else ()
    for part in results:
        parts.append(part)
        done(len(part.indices))
    return Found(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        [bad for part in parts for bad in part.bad],
        {kind: joined([part.marks[kind] for part in parts]) for kind in KINDS},
        merged([part.remarks for part in parts]),
    )


_reader: SampleReader | None = None  # of a worker process


def _start_worker(reader: SampleReader) -> None:
    global _reader
    _reader = reader


def _read_in_worker(indices: Sequence[int]) -> Found:
    assert _reader is not None
    return _reader.read(indices)


def _in_pool(reader: SampleReader, chunks: Sequence[Sequence[int]], workers: int) -> Iterator[Found]:
    """The chunks in order. Workers start afresh: a copy of this process would share its open files and locks."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one thread for each process
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (reader,))
    read = 0
    try:
        for part in pool.map(_read_in_worker, chunks):
            read += 1
            yield part
    except BrokenProcessPool:
        first, last = chunks[read][0], chunks[min(read + workers, len(chunks) - 1)][-1]
        raise InputError(
            f"a process died while it read samples {first} to {last}: out of memory, or a file that crashes its decoder;"
            " --workers 1 reads them one after another in this process"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def spread(source: Source, limit: int, seed: int) -> list[int]:
    """``limit`` samples of ``source``, and of each part of a mixture, drawn by ``seed``; the first ones of a
    stream. All of them for 0.
    """
    n = len(source)
    if not limit:
        return list(range(n))
    if is_stream(source):
        return list(range(min(n, limit)))
    part_of = np.fromiter((source.part(index) for index in range(n)), dtype=np.int64, count=n)
    groups = (np.flatnonzero(part_of == part) for part in np.unique(part_of))
    return sorted(int(group[at]) for group in groups for at in drawn(len(group), limit, seed))


def is_stream(source: Source) -> bool:
    """Whether ``source`` is read from front to back."""
    return source.order(0).window is not None
