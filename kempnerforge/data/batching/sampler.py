"""Which samples make which optimizer step: a pure function of (seed, step), the same for any number of ranks
and workers.

Elastic determinism, as in MosaicML Streaming: the only state is the step. The samples form one endless stream
(``order.py``); step s takes ``stream[s * G : (s + 1) * G]`` for a global batch of G.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np

from kempnerforge.data.batching.order import CachedCalls, Order, Shuffled
from kempnerforge.util.errors import InputError

T = TypeVar("T")

WINDOW = 32
"""Global batches that are sorted by length together: enough to fill rows evenly, few enough to leave the
order random.
"""
MEASURED_WINDOW = 4096
"""Samples of a window at least, where lengths are exact: a heavy tail of long rows needs so many."""

Lengths = Callable[[np.ndarray], np.ndarray]
"""(k,) sample numbers -> (k,) sizes."""


def check_cut(size: int, world: int, accum: int) -> None:
    """Raises:
    InputError: the ``size`` items of a step cannot be cut evenly into ``world * accum`` micro-batches.
    """
    if size % (world * accum):
        raise InputError(f"train.batch_size = {size}: must be a multiple of processes x train.grad_accum_steps = {world} x {accum}")


class RankSampler(ABC, Generic[T]):
    """Yields one rank's share of every optimizer step, micro-batch by micro-batch, without end.

    The items of a step are cut into ``world * accum`` micro-batches; micro-batch m of rank r is cut ``m *
    world + r``.

    Args:
        size: items of one optimizer step, over all ranks.
        accum: micro-batches of one step on each rank.
        seed: of what is shuffled here.

    Raises:
        ValueError: the items of a step cannot be cut evenly.
    """

    def __init__(self, size: int, rank: int, world: int, accum: int, seed: int, start_step: int) -> None:
        assert 0 <= rank < world and start_step >= 0
        check_cut(size, world, accum)
        self.size, self.rank, self.world, self.accum, self.seed, self.start_step = size, rank, world, accum, seed, start_step

    def __iter__(self) -> Iterator[list[T]]:
        step = self.start_step
        while True:
            for micro in range(self.accum):
                yield self.micro_batch(step, micro)
            step += 1

    @abstractmethod
    def cut(self, step: int, begin: int, end: int) -> list[T]:
        """Items ``begin`` to ``end`` of ``step``."""

    def batch(self, step: int) -> list[T]:
        """This rank's items of all micro-batches of ``step``, in order."""
        return [item for micro in range(self.accum) for item in self.micro_batch(step, micro)]

    def micro_batch(self, step: int, micro: int) -> list[T]:
        """This rank's items of micro-batch ``micro`` of ``step``."""
        size = self.size // (self.world * self.accum)
        first = (micro * self.world + self.rank) * size
        return self.cut(step, first, first + size)


class StepSampler(RankSampler[tuple[int, int]]):
    """Yields micro-batches of ``(index, step)`` for one rank, without end; the step seeds what is random
    about a sample.

    A dataset smaller than a global batch fills it with its next epochs.

    Args:
        order: of the samples; a number: so many samples, shuffled. Its phases begin exactly with their steps.
        rank, world, accum, seed, start_step: as in ``RankSampler``.
        lengths: puts samples of like length together: runs of ``together`` global batches (fewer where the
            order's window holds fewer, so that a stream need not be read far ahead) are sorted by length,
            cut, and the cuts shuffled. None leaves the order alone.

    Raises:
        ValueError: no samples, or the global batch cannot be cut evenly.
    """

    def __init__(
        self,
        order: Order | int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        seed: int = 0,
        start_step: int = 0,
        lengths: Lengths | None = None,
        together: int = WINDOW,
    ) -> None:
        super().__init__(global_batch, rank, world, accum, seed, start_step)
        self.order = Shuffled(order, seed) if isinstance(order, int) else order
        for step in self.order.phase_steps:
            self.order = self.order.at(step, step * global_batch)
        self.lengths, self.together = lengths, together
        self._window = CachedCalls(self._group, 2)

    def cut(self, step: int, begin: int, end: int) -> list[tuple[int, int]]:
        return [(int(index), step) for index in self.global_indices(step)[begin:end]]

    def global_indices(self, step: int) -> np.ndarray:
        """(G,) indices of ``step`` over all ranks."""
        size = self.size
        if self.lengths is None:
            return self.order.indices(step * size, (step + 1) * size)
        # the steps whose first sample lies in this stretch; windows do not reach over its end
        begin, end = (-(-position // size) for position in self.order.stretch(step * size))
        steps = self.together if self.order.window is None else min(self.together, max(1, self.order.window // size))
        first = begin + (step - begin) // steps * steps
        return self._window(first, min(first + steps, end))[step - first]

    def _group(self, first: int, last: int) -> np.ndarray:
        """Steps ``first <= s < last``, grouped by length: (steps, G)."""
        assert self.lengths is not None
        stream = self.order.indices(first * self.size, last * self.size)
        stream = stream[np.argsort(self.lengths(stream), kind="stable")].reshape(last - first, self.size)
        return stream[np.random.default_rng((self.seed, 1, first)).permutation(last - first)]
