"""Which samples make which optimizer step: a pure function of (seed, step), the same for any number of ranks and workers.

Elastic determinism, as in MosaicML Streaming: the only state is the step. The samples form one endless stream, the permutations of all
epochs in a row; step s takes ``stream[s * G : (s + 1) * G]`` for a global batch of G.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

WINDOW = 32
"""Global batches that are sorted by length together: enough to fill rows evenly, few enough to leave the order random."""


class StepSampler:
    """Yields micro-batches of ``(index, step)`` for one rank, without end; the step seeds what is random about a sample.

    A global batch is cut into ``world * accum`` micro-batches; micro-batch m of rank r is cut ``m * world + r``. A dataset smaller than a
    global batch fills it with its next epochs.

    Args:
        lengths: size of each sample, or their number when nothing is grouped.
        global_batch: samples of one optimizer step.
        rank, world: this process and how many there are.
        accum: micro-batches of one step on each rank.
        seed: of the order.
        start_step: where iteration begins.
        batching: "group" puts samples of like length together: stretches of ``WINDOW`` global batches are sorted by length, cut, and the
            cuts shuffled. Anything else leaves the order alone.

    Raises:
        ValueError: no samples, or the global batch cannot be cut evenly.
    """

    def __init__(
        self,
        lengths: Sequence[int] | int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accum: int = 1,
        seed: int = 0,
        start_step: int = 0,
        batching: str = "pad",
    ) -> None:
        assert 0 <= rank < world and start_step >= 0
        if global_batch % (world * accum):
            raise ValueError(
                f"train.batch_size = {global_batch}: must be a multiple of processes x train.grad_accum_steps = {world} x {accum}"
            )
        self.lengths = None if isinstance(lengths, int) else np.asarray(lengths)
        self.n = lengths if isinstance(lengths, int) else len(lengths)
        if self.n < 1:
            raise ValueError("data: no samples")
        assert batching != "group" or self.lengths is not None, "grouping needs lengths"
        self.global_batch, self.rank, self.world, self.accum = global_batch, rank, world, accum
        self.seed, self.start_step, self.batching = seed, start_step, batching
        self._permutation = lru_cache(maxsize=3)(self._permute)
        self._window = lru_cache(maxsize=2)(self._group)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            for micro in range(self.accum):
                yield self.micro_batch(step, micro)
            step += 1

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        lengths = self.n if self.lengths is None else self.lengths
        return StepSampler, (
            lengths, self.global_batch, self.rank, self.world, self.accum, self.seed, self.start_step, self.batching
        )  # fmt: skip

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's ``(index, step)`` of all micro-batches of ``step``, in order."""
        return [item for micro in range(self.accum) for item in self.micro_batch(step, micro)]

    def micro_batch(self, step: int, micro: int) -> list[tuple[int, int]]:
        """This rank's part of micro-batch ``micro`` of ``step``."""
        size = self.global_batch // (self.world * self.accum)
        first = (micro * self.world + self.rank) * size
        return [(int(index), step) for index in self.global_indices(step)[first : first + size]]

    def global_indices(self, step: int) -> np.ndarray:
        """(G,) indices of ``step`` over all ranks."""
        size = self.global_batch
        if self.batching != "group":
            return self._stream(step * size, (step + 1) * size)
        # the steps whose first sample lies in this epoch; windows do not reach over its end
        epoch = step * size // self.n
        begin, end = -(-epoch * self.n // size), -(-(epoch + 1) * self.n // size)
        first = begin + (step - begin) // WINDOW * WINDOW
        return self._window(first, min(first + WINDOW, end))[step - first]

    def _group(self, first: int, last: int) -> np.ndarray:
        """Steps ``first <= s < last``, grouped by length: (steps, G)."""
        assert self.lengths is not None
        stream = self._stream(first * self.global_batch, last * self.global_batch)
        stream = stream[np.argsort(self.lengths[stream], kind="stable")].reshape(last - first, self.global_batch)
        return stream[np.random.default_rng((self.seed, 1, first)).permutation(last - first)]

    def _stream(self, begin: int, end: int) -> np.ndarray:
        """``stream[begin:end]``."""
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.n)
            part = self._permutation(epoch)[offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(self.n)
