"""The order of samples: an endless stream of sample numbers, a pure function of the seed, to be read at any
position.

The samplers decide which process reads which part of the stream; an order knows nothing of ranks, workers and
batches.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import gcd, lcm
from typing import Any

import numpy as np

from kempnerforge.util.errors import InputError

ENDLESS = sys.maxsize


class Order(ABC):
    """An endless stream of sample numbers.

    Attributes:
        window: neighbours in the source are at most this far apart in the stream. None: they may be anywhere,
            as any sample costs the same to read.
        phase_steps: optimizer steps at which the stream changes and whose positions are not known yet, see
            ``at``.
    """

    window: int | None = None
    phase_steps: tuple[int, ...] = ()

    @abstractmethod
    def indices(self, begin: int, end: int) -> np.ndarray:
        """(end - begin,) int64: ``stream[begin:end]``."""

    @abstractmethod
    def stretch(self, position: int) -> tuple[int, int]:
        """The begin and end of the part of the stream around ``position`` inside which a sampler may sort and
        pack as it likes: an epoch, a phase. The end may be ``ENDLESS``.
        """

    def at(self, step: int, position: int) -> Order:
        """This order, where the phases that are due at optimizer step ``step`` and did not begin yet begin at
        ``position``.
        """
        return self


class CachedCalls:
    """``make`` with a cache of its last ``size`` results. A pickled copy begins with an empty cache."""

    def __init__(self, make: Callable[..., Any], size: int) -> None:
        self._make, self._size = make, size
        self._call = lru_cache(maxsize=size)(make)

    def __call__(self, *numbers: int) -> Any:
        return self._call(*numbers)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return CachedCalls, (self._make, self._size)


class Shuffled(Order):
    """The permutations of all epochs in a row.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise InputError("data: no samples")
        self.n, self.seed = n, seed
        self._cached = CachedCalls(self._permute, 3)

    def indices(self, begin: int, end: int) -> np.ndarray:
        parts = []
        while begin < end:
            part = self._from(begin)[: end - begin]
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def stretch(self, position: int) -> tuple[int, int]:
        epoch = position // self.n
        return epoch * self.n, (epoch + 1) * self.n

    def _from(self, position: int) -> np.ndarray:
        """The stream from ``position`` to the end of what is shuffled together with it."""
        epoch, offset = divmod(position, self.n)
        return self._cached(epoch)[offset:]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, 0, epoch)).permutation(self.n)


def drawn(n: int, limit: int, seed: int) -> list[int]:
    """At most ``limit`` of ``n`` numbers, each once, ascending; 0 takes all. They are the first of a seeded
    permutation: the same at each call, a smaller limit draws a part of what a larger one draws, and no
    pattern in the source (the second text of each picture) can be met.
    """
    if not limit or limit >= n:
        return list(range(n))
    return np.sort(Shuffled(n, seed).indices(0, limit)).tolist()


class Windowed(Shuffled):
    """For sources that are read from front to back: each epoch in the order of the source, shuffled only
    inside consecutive windows.

    Args:
        window: samples that are shuffled together; 1 leaves the order of the source. A source that has no
            more than one window of samples is taken to have them all in memory.
    """

    def __init__(self, n: int, seed: int, window: int) -> None:
        assert window > 0
        super().__init__(n, seed)
        self._window = min(window, n)
        self.window = window if window < n else None
        self._windows = -(-n // self._window)  # of an epoch

    def _from(self, position: int) -> np.ndarray:
        epoch, offset = divmod(position, self.n)
        number, offset = divmod(offset, self._window)
        return self._cached(epoch * self._windows + number)[offset:]

    def _permute(self, epoch: int) -> np.ndarray:
        """Here of window ``epoch``, counted over all epochs."""
        begin = epoch % self._windows * self._window
        size = min(self._window, self.n - begin)
        return begin + np.random.default_rng((self.seed, 0, epoch)).permutation(size)


MAX_PERIOD = 2**18
"""Samples after which the pattern of a mixture repeats, about, where its shares are no ratio of small
numbers.
"""


class Cycle:
    """The periodic sequence of parts in which part i has, in every prefix of n, more than ``share_i * n - 1``
    and fewer than ``share_i * n + 1`` places.

    The j-th visit to a part must fall between the places where its share reaches j and j + 1; that can be
    done for all parts at once, and taking the visit whose end is nearest does it: Tijdeman 1980, "The
    chairman assignment problem"; as an algorithm, Baruah et al. 1996, "Proportionate progress".

    Args:
        weights: of the parts, none below 0, not all 0. Shares are weights over their sum; they are exact if
            the parts together can have a period of ``MAX_PERIOD`` at most (.5, .3, .2 have one of 10), else
            rounded to about one in ``MAX_PERIOD``, and to one at least.

    Attributes:
        quotas: (parts,) places of each part in a period.
        parts: (period,) the part that has each place.
        ranks: (period,) how many earlier places of the period that part has.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = np.array(_quotas(weights), dtype=np.int64)
        self.parts = _earliest_deadline_first(self.quotas.tolist())
        self.ranks = np.empty_like(self.parts)
        for part, quota in enumerate(self.quotas):
            self.ranks[self.parts == part] = np.arange(quota)

    @property
    def period(self) -> int:
        return len(self.parts)

    def counts(self, n: int) -> np.ndarray:
        """(parts,) places of each part among the first ``n``."""
        periods, rest = divmod(n, self.period)
        return periods * self.quotas + np.bincount(self.parts[:rest], minlength=len(self.quotas))

    def places(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(end - begin,) the part that has each place ``begin <= k < end``, and (end - begin,) how many
        earlier ones it has.
        """
        periods, offsets = np.divmod(np.arange(begin, end), self.period)
        parts = self.parts[offsets]
        return parts, periods * self.quotas[parts] + self.ranks[offsets]


class Mixed(Order):
    """Several orders interleaved by weight. Each goes on with its own stream from phase to phase; one that is
    used up begins its next epoch.

    Args:
        offsets: what is added to the sample numbers of each part.
        phases: (optimizer step, weights of the parts): the mixture from that step on. Steps increase; the
            first is 0.
        begins: the stream positions at which the phases begin, of the first ones that are known. They
            increase and begin with 0.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        offsets: Sequence[int],
        phases: Sequence[tuple[int, Sequence[float]]],
        begins: tuple[int, ...] = (0,),
    ) -> None:
        assert len(orders) == len(offsets) and phases[0][0] == 0 and begins[0] == 0
        assert all(a < b for (a, _), (b, _) in pairwise(phases)) and all(a <= b for a, b in pairwise(begins))
        self.orders, self.offsets, self.phases, self.begins = orders, offsets, phases, begins
        self.window = min((order.window for order in orders if order.window), default=None)
        self.phase_steps = tuple(step for step, _ in phases[len(begins) :])
        self._cycles = [Cycle(weights) for _, weights in phases[: len(begins)]]
        self._before = [np.zeros(len(orders), dtype=np.int64)]  # visits to each part before each phase
        for cycle, (begin, end) in zip(self._cycles, pairwise(begins), strict=False):
            self._before.append(self._before[-1] + cycle.counts(end - begin))

    def at(self, step: int, position: int) -> Mixed:
        due = sum(start <= step for start in self.phase_steps)
        if not due:
            return self
        return Mixed(self.orders, self.offsets, self.phases, self.begins + (position,) * due)

    def stretch(self, position: int) -> tuple[int, int]:
        phase = self._phase(position)
        return self.begins[phase], (*self.begins, ENDLESS)[phase + 1]

    def indices(self, begin: int, end: int) -> np.ndarray:
        found = np.empty(end - begin, dtype=np.int64)
        at = begin
        while at < end:
            phase = self._phase(at)
            first, last = self.stretch(at)
            upto = min(last, end)
            parts, visits = self._cycles[phase].places(at - first, upto - first)
            visits += self._before[phase][parts]
            piece = found[at - begin : upto - begin]
            for part in np.unique(parts):
                mine = parts == part
                visits_of_part = visits[mine]  # consecutive
                piece[mine] = self.offsets[part] + self.orders[part].indices(int(visits_of_part[0]), int(visits_of_part[-1]) + 1)
            at = upto
        return found

    def _phase(self, position: int) -> int:
        """The phase that ``position`` is in; of several that begin at one place the last."""
        return max(k for k, begin in enumerate(self.begins) if begin <= position)


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of ``weights``, as near as ``MAX_PERIOD`` allows."""
    assert min(weights) >= 0 and sum(weights) > 0, weights
    near = [Fraction(weight).limit_denominator(MAX_PERIOD) for weight in weights]
    whole = lcm(*(fraction.denominator for fraction in near))
    exact = [int(fraction * whole) for fraction in near]
    if [float(fraction) for fraction in near] != [float(weight) for weight in weights] or sum(exact) // gcd(*exact) > MAX_PERIOD:
        exact = [max(1, round(weight / sum(weights) * MAX_PERIOD)) if weight else 0 for weight in weights]
    return [quota // gcd(*exact) for quota in exact]


def _earliest_deadline_first(quotas: Sequence[int]) -> np.ndarray:
    """(sum of quotas,) the part of each place, see ``Cycle``."""
    period, done = sum(quotas), [0] * len(quotas)
    waiting = [(0, part) for part, quota in enumerate(quotas) if quota]  # (first place that the next visit may have, part)
    heapify(waiting)
    ready: list[tuple[int, int]] = []  # (the place that the next visit must be before, part)
    places = np.empty(period, dtype=np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            part = heappop(waiting)[1]
            heappush(ready, (-(-(done[part] + 1) * period // quotas[part]), part))
        part = heappop(ready)[1]
        places[place] = part
        done[part] += 1
        if done[part] < quotas[part]:
            heappush(waiting, (done[part] * period // quotas[part], part))
    return places
