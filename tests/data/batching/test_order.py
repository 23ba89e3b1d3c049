from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data.batching.order import ENDLESS, MAX_PERIOD, Cycle, Mixed, Order, Shuffled, Windowed

WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


@given(n=st.integers(1, 40), seed=st.integers(0, 5), begin=st.integers(0, 200), count=st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_shuffled_is_the_permutations_of_all_epochs_in_a_row(n: int, seed: int, begin: int, count: int) -> None:
    epochs = range((begin + count) // n + 1)
    stream = np.concatenate([np.random.default_rng((seed, 0, epoch)).permutation(n) for epoch in epochs])
    order = Shuffled(n, seed)
    assert order.indices(begin, begin + count).tolist() == stream[begin : begin + count].tolist()
    first, last = order.stretch(begin)
    assert first <= begin < last and sorted(order.indices(first, last)) == list(range(n))


@given(n=st.integers(1, 60), window=st.integers(1, 80), begin=st.integers(0, 200), count=st.integers(0, 150))
@settings(max_examples=60, deadline=None)
def test_windowed_shuffles_inside_windows_alone(n: int, window: int, begin: int, count: int) -> None:
    order = Windowed(n, 4, window)
    epochs = order.indices(0, ((begin + count) // n + 1) * n).reshape(-1, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert (epochs // window == np.arange(n) // window).all()
    assert order.indices(begin, begin + count).tolist() == epochs.ravel()[begin : begin + count].tolist()


def test_windowed_shuffles() -> None:
    order = Windowed(1000, 0, 100)
    epochs = order.indices(0, 2000).reshape(2, 1000)
    assert (epochs[0] != epochs[1]).mean() > 0.9 and (epochs[0] != np.arange(1000)).mean() > 0.9
    assert Windowed(7, 0, 1).indices(0, 7).tolist() == list(range(7))


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Shuffled(0, 1)


# ---- shares -------------------------------------------------------------------------------------------------------------


def largest_distance(cycle: Cycle, shares: np.ndarray, places: int) -> float:
    """From the exact share, over all prefixes and parts."""
    parts = cycle.places(0, places)[0]
    visits = np.cumsum(parts[:, None] == np.arange(len(shares)), axis=0)
    return float(np.abs(visits - np.arange(1, places + 1)[:, None] * shares).max())


@given(weights=WEIGHTS)
@settings(max_examples=150, deadline=None)
def test_every_prefix_has_every_share_within_one_sample(weights: list[int]) -> None:
    cycle = Cycle(weights)
    shares = np.array(weights) / sum(weights)
    assert cycle.period == sum(weights) // np.gcd.reduce(weights)
    assert largest_distance(cycle, shares, 2 * cycle.period + 3) < 1 - 1e-9


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1 / 3, 2 / 3), (0.1, 0.7, 0.2), (5, 3, 2), (0.123, 0.456, 0.421)])
def test_short_decimals_and_ratios_are_exact(weights: tuple[float, ...]) -> None:
    cycle = Cycle(weights)
    assert cycle.period <= 1000
    assert largest_distance(cycle, np.array(weights) / sum(weights), 10_000) < 1


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4))
@settings(max_examples=8, deadline=None)
def test_other_weights_are_rounded_but_little(weights: list[float]) -> None:
    cycle = Cycle(weights)
    shares = cycle.quotas / cycle.period
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 4 / MAX_PERIOD
    assert largest_distance(cycle, shares, 20_000) < 1


def test_a_part_far_smaller_than_the_rest_is_not_lost() -> None:
    cycle = Cycle([1e9, 1])
    assert cycle.quotas.tolist() == [MAX_PERIOD, 1]


@given(weights=WEIGHTS, begin=st.integers(0, 500), count=st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_places_and_counts_agree(weights: list[int], begin: int, count: int) -> None:
    cycle = Cycle(weights)
    parts, ranks = cycle.places(begin, begin + count)
    before = cycle.counts(begin)
    for part, rank in zip(parts, ranks, strict=True):
        assert rank == before[part]
        before[part] += 1
    assert before.tolist() == cycle.counts(begin + count).tolist()


# ---- mixtures -----------------------------------------------------------------------------------------------------------


def mixed(phases: list[tuple[int, list[int]]], per_step: int = 7) -> tuple[Order, list[Order], list[int]]:
    sizes = [5 + 6 * part for part in range(len(phases[0][1]))]
    orders: list[Order] = [Shuffled(size, part) for part, size in enumerate(sizes)]
    offsets = [0, *np.cumsum(sizes)[:-1].tolist()]
    order: Order = Mixed(orders, offsets, phases)
    for step, _ in phases[1:]:
        order = order.at(step, step * per_step)
    return order, orders, [*offsets, sum(sizes)]


@st.composite
def phase_lists(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    parts = draw(st.integers(1, 4))
    steps = sorted(draw(st.sets(st.integers(1, 30), max_size=3)))
    return [(step, draw(st.lists(st.integers(0, 9), min_size=parts, max_size=parts).filter(any))) for step in (0, *steps)]


@given(phases=phase_lists(), begin=st.integers(0, 400), count=st.integers(0, 200))
@settings(max_examples=80, deadline=None)
def test_a_mixture_interleaves_the_streams_of_its_parts(phases: list[tuple[int, list[int]]], begin: int, count: int) -> None:
    """Against drawing one sample after the other: shares hold from the beginning of each phase, streams go on, reading is random access."""
    order, orders, edges = mixed(phases)
    stream = order.indices(0, begin + count)
    parts = np.searchsorted(edges, stream, side="right") - 1
    for part, own in enumerate(orders):
        visits = stream[parts == part] - edges[part]
        assert visits.tolist() == own.indices(0, len(visits)).tolist()
    starts = [7 * step for step, _ in phases] + [ENDLESS]
    for (_, weights), first, last in zip(phases, starts[:-1], starts[1:], strict=True):
        drawn = parts[first:last]
        visits = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
        ideal = np.arange(1, len(drawn) + 1)[:, None] * (np.array(weights) / sum(weights))
        assert not len(drawn) or np.abs(visits - ideal).max() < 1
        assert order.stretch(first) == (first, last)
    assert order.indices(begin, begin + count).tolist() == stream[begin:].tolist()
    copy: Order = pickle.loads(pickle.dumps(order))
    assert copy.indices(begin, begin + count).tolist() == stream[begin:].tolist()


def test_phases_begin_where_they_are_told() -> None:
    order: Order = Mixed([Shuffled(4, 0), Shuffled(4, 1)], [0, 4], [(0, [1, 0]), (3, [0, 1]), (5, [1, 1])])
    assert order.phase_steps == (3, 5) and order.at(2, 10) is order
    assert order.stretch(1000) == (0, ENDLESS)
    later = order.at(4, 21)
    assert later.phase_steps == (5,) and order.phase_steps == (3, 5)
    assert set((later.indices(0, 40) // 4)[:21]) == {0} and set((later.indices(0, 40) // 4)[21:]) == {1}
    both = order.at(9, 6)  # the one between them has no samples
    assert both.phase_steps == () and both.indices(0, 6).max() < 4
    assert np.bincount(both.indices(6, 26) // 4).tolist() == [10, 10]


def test_a_small_part_begins_again_and_is_shuffled_anew() -> None:
    order = Mixed([Shuffled(5, 0), Shuffled(100, 1)], [0, 5], [(0, [1, 1])])
    stream = order.indices(0, 40)
    epochs = stream[stream < 5].reshape(4, 5)
    assert (np.sort(epochs) == np.arange(5)).all() and len({tuple(epoch) for epoch in epochs}) > 1


def test_a_mixture_is_as_close_as_its_closest_stream() -> None:
    parts = [Shuffled(100, 0), Windowed(100, 0, 8), Windowed(100, 0, 30)]
    assert Mixed(parts, [0, 100, 200], [(0, [1, 1, 1])]).window == 8
    assert Mixed(parts[:1], [0], [(0, [1])]).window is None
    assert Windowed(100, 0, 100).window is None  # all of it is in memory
