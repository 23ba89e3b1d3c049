"""Source -> encoder -> batches, in this process or in workers; the stream is the same either way."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from kempnerforge.config.data import DataConfig
from kempnerforge.config.training import TrainConfig
from kempnerforge.data.batching.batch import IGNORE, Batch
from kempnerforge.data.batching.pack import WINDOW_ROWS, Pack, PackedRow, PackSampler
from kempnerforge.data.batching.rows import DataError, EncodedSamples, collate_rows
from kempnerforge.data.batching.sampler import MEASURED_WINDOW, WINDOW, StepSampler
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoded, Encoder, Layout
from kempnerforge.data.text.interleave import LABELS
from kempnerforge.util.errors import InputError
from kempnerforge.util.process import STOPS, end_with

CHARACTERS_PER_TOKEN = 4
CLASS_POSITIONS = 16
"""Positions by which rows of one length class differ at most, about."""
CANDIDATES = 4
"""Of ``heavy_rows``."""


@contextmanager
def _workers_starting() -> Iterator[None]:
    """Processes that are started meanwhile never see the signals that ask a run to stop, as a blocked signal
    stays so in a child: they are sent to whole groups, and the workers go on so that the step can be
    finished.

    NOTE: Python ends the processes that are left at its exit with SIGTERM, which these do not see, and waits
    for them. So they are killed first.
    NOTE: what is there already is frozen, so that a child never collects it as garbage: the end of an object
    with threads or children of this process (groups of ranks, loaders of earlier stages) can crash a child.
    """
    before, others = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS), multiprocessing.active_children()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in multiprocessing.active_children():
            if worker not in others:
                atexit.register(_kill, worker)


def _kill(worker: BaseProcess) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler makes an error of it
    worker.kill()


def _begin_worker(number: int, parent: int) -> None:
    """A worker ends with the process that started it, however that ends; where that is not Linux, torch's own
    watchdog sees it within seconds.
    """
    end_with(parent, signal.SIGKILL)


def lost_worker(error: RuntimeError) -> str:
    """What to say where ``error`` is torch's that a data worker has died; empty if it is another one.

    NOTE: it is raised by the handler of a signal, so anywhere in the main process.
    """
    found = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\w, ]+)\) (.*)", str(error))
    if found is None:
        return ""
    why = found[2].rstrip(". ").partition(". ")[0]
    likely = "; the system ends processes so when memory runs out: use fewer data.num_workers, or less data.image_cache_mib"
    return f"data worker {found[1]} {why}{likely if why.endswith(('Killed', 'unexpectedly')) else ''}"


class Loader:
    """Batches without end. Each iteration begins at the first step anew.

    Args:
        inner: what makes them; an item may be an error to raise here.
        workers: processes that ``inner`` starts.
    """

    def __init__(self, inner: Iterable[Batch | DataError], workers: int = 0) -> None:
        self._inner, self._workers = inner, workers

    def __iter__(self) -> Iterator[Batch]:
        with _workers_starting():
            items = iter(self._inner)
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (EOFError, OSError) as error:  # on the way from a worker, unless it says that the worker caught it
                if not self._workers or str(error).startswith("Caught "):
                    raise
                raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error
            if isinstance(item, DataError):
                raise item
            yield item


class RowClasses:
    """Roughly how long the rows of single samples are, in steps of ``CLASS_POSITIONS``: rows of one class may
    be in one batch. Each is found when it is first asked for: nothing is read ahead of training.

    NOTE: the steps are coarse on purpose. Sorted by exact length, captions of one text ("red circle") fill
    whole batches, and a model that sees one text at a time learns far more slowly: 94.4 % against 99.5 % in
    one pair of quickstart runs.
    """

    def __init__(self, source: Source, layout: Layout) -> None:
        self._source, self._image = source, layout.image_tokens if layout.image_size else 0
        self._known = np.full(len(source), -1, dtype=np.int32)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """(k,) sample numbers -> (k,) classes."""
        source = self._source
        for k in np.unique(indices[self._known[indices] < 0]).tolist():  # in the order of the source
            self._known[k] = (self._image * source.num_images(k) + source.length(k) // CHARACTERS_PER_TOKEN) // CLASS_POSITIONS
        return self._known[indices]


def heavy_rows(source: Source, encoder: Encoder, cfg: DataConfig, layout: Layout, train_cfg: TrainConfig) -> list[Encoded | PackedRow]:
    """The rows with most positions, most views and most trained tokens among the first of the stream. How long
    rows are is measured; only ``CANDIDATES`` of each kind are read whole.

    Args:
        layout, train_cfg: as in ``build_loader``.

    Raises:
        ValueError: no samples; the data cannot be used.
    """
    order, samples = source.order(train_cfg.seed), EncodedSamples(source, encoder, train_cfg.seed)
    if cfg.batching == "pack":
        place = {"seed": train_cfg.seed}
        sampler = PackSampler(order, samples.sizes, max(train_cfg.step_rows, WINDOW_ROWS), layout.seq_len, cfg.max_images_per_row, **place)
        keys: Sequence[tuple[int, int] | Pack] = sampler.cut(0, 0, sampler.size)
        sizes = np.stack([samples.sizes(np.array([index for index, _ in row])).sum(0) for row in sampler.cut(0, 0, sampler.size)])
    else:
        indices = order.indices(0, min(len(source), order.window or MEASURED_WINDOW, MEASURED_WINDOW))
        keys, sizes = [(int(index), 0) for index in indices], samples.sizes(indices)  # (k, 2)
    chosen = dict.fromkeys(np.argsort(-sizes, axis=0, kind="stable")[:CANDIDATES].flatten().tolist())
    rows: list[Encoded | PackedRow] = []
    for row in (samples[keys[k]] for k in chosen):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    weights = (lambda row: row.table.shape[1], lambda row: len(row.images), lambda row: int((row.table[LABELS] != IGNORE).sum()))
    return list({id(row): row for row in (max(rows, key=weight) for weight in weights)}.values())


def padded_length(cfg: DataConfig, layout: Layout) -> int | None:
    """Positions that rows are padded to; None: to the longest of a micro-batch."""
    return None if cfg.batching == "group" else layout.seq_len if cfg.batching == "pack" else layout.pad_to


def build_loader(
    source: Source,
    encoder: Encoder,
    *,
    cfg: DataConfig,
    layout: Layout,
    train_cfg: TrainConfig,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> Loader:
    """Batches without end, ``train_cfg.grad_accum_steps`` of them for each optimizer step, beginning with
    ``start_step``.

    Iterating leaves torch's global random state alone. The position is the step, so nothing else has to be
    saved.

    Args:
        layout: row length of ``batching = "pad"`` and "pack".
        train_cfg: batch size (of "pack" in rows), accumulation, seed.

    Raises:
        ValueError: no samples, a batch size that cannot be shared out, or a stream that is shuffled in
            windows too small for it; ``DataError`` while iterating.
    """
    group, pack, size = cfg.batching == "group", cfg.batching == "pack", train_cfg.step_rows
    order, samples = source.order(train_cfg.seed), EncodedSamples(source, encoder, train_cfg.seed)
    place = {"rank": rank, "world": world, "accum": train_cfg.grad_accum_steps, "seed": train_cfg.seed, "start_step": start_step}
    if pack:
        sampler = PackSampler(order, samples.sizes, size, layout.seq_len, cfg.max_images_per_row, **place)
    else:
        exact = cfg.group_by == "positions"
        lengths = samples.sizes.positions if exact else RowClasses(source, layout)
        together = max(WINDOW, MEASURED_WINDOW // size) if exact else WINDOW
        sampler = StepSampler(order, size, lengths=lengths if group else None, together=together, **place)
    if order.window is not None and (group or pack):
        together = sampler.window_size if isinstance(sampler, PackSampler) else size
        if together > 2 * order.window:
            raise InputError(
                f"data.shuffle_buffer = {order.window}: batching = {cfg.batching!r} rearranges {together} samples at once; "
                f"use at least {-(-together // 2)}"
            )
    pad_to = padded_length(cfg, layout)
    if cfg.num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else its threads warn about the fork
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
        inner = StatefulDataLoader(
            samples,
            batch_sampler=sampler,
            num_workers=cfg.num_workers,
            collate_fn=partial(collate_rows, pad_id=encoder.tokenizer.pad_id, pad_to=pad_to),
            generator=torch.Generator().manual_seed(train_cfg.seed),
            worker_init_fn=partial(_begin_worker, parent=os.getpid()),
            snapshot_every_n_steps=2**30,  # the step says it all: no states of workers
        )
    return Loader(inner, cfg.num_workers)
