from __future__ import annotations

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data import StepSampler
from kempnerforge.data.batching.order import Mixed, Shuffled, Windowed
from kempnerforge.data.batching.sampler import WINDOW, Lengths

SHARES = [(world, accum) for world in (1, 2, 4) for accum in (1, 2, 4)]


def lengths_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(1, 200, size=n)


def grouped(n: int, batching: str) -> Lengths | None:
    return lengths_of(n).__getitem__ if batching == "group" else None


def global_stream(n: int, batch: int, world: int, accum: int, batching: str, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """Per step what all ranks together take, micro-batch by micro-batch, by iterating the samplers."""
    ranks = [iter(StepSampler(n, batch, r, world, accum, 3, start, grouped(n, batching))) for r in range(world)]
    return [[item for _ in range(accum) for rank in ranks for item in next(rank)] for _ in range(start, stop)]


@given(
    n=st.integers(1, 90),
    share=st.sampled_from(SHARES),
    batching=st.sampled_from(["pad", "group"]),
    start=st.integers(0, 40),
    per_micro=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_global_stream_is_the_same_for_any_sharing_and_resume(
    n: int, share: tuple[int, int], batching: str, start: int, per_micro: int
) -> None:
    batch = 16 * per_micro
    reference = global_stream(n, batch, 1, 1, batching, 0, start + 3)
    assert global_stream(n, batch, *share, batching, start, start + 3) == reference[start:]
    assert all({step for _, step in items} == {s} for s, items in enumerate(reference))


@given(batches=st.integers(1, 70), size=st.integers(1, 6), batching=st.sampled_from(["pad", "group"]))
@settings(max_examples=40, deadline=None)
def test_each_epoch_is_covered_exactly_once(batches: int, size: int, batching: str) -> None:
    n = batches * size
    sampler = StepSampler(n, size, seed=5, lengths=grouped(n, batching))
    for epoch in range(3):
        seen = [index for step in range(epoch * batches, (epoch + 1) * batches) for index, _ in sampler.batch(step)]
        assert sorted(seen) == list(range(n))


@given(n=st.integers(1, 50), size=st.integers(1, 64), batching=st.sampled_from(["pad", "group"]))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_equally_often_seen_when_sizes_do_not_divide(n: int, size: int, batching: str) -> None:
    sampler = StepSampler(n, size, lengths=grouped(n, batching))
    steps = n  # n steps of `size` samples are `size` epochs
    counts = Counter(index for step in range(steps) for index, _ in sampler.batch(step))
    assert counts == dict.fromkeys(range(n), size)


def test_fewer_samples_than_a_global_batch_wrap_into_the_next_epochs() -> None:
    sampler = StepSampler(8, 32)
    assert Counter(index for index, _ in sampler.batch(0)) == dict.fromkeys(range(8), 4)


def test_epochs_and_seeds_are_ordered_differently() -> None:
    orders = {tuple(StepSampler(64, 64, seed=seed).global_indices(epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_grouping_puts_like_lengths_together_in_random_order() -> None:
    n, size = 16 * WINDOW, 16
    lengths = lengths_of(n)
    spread = {}
    for batching in ("pad", "group"):
        sampler = StepSampler(n, size, seed=1, lengths=grouped(n, batching))
        spread[batching] = np.mean([np.ptp(lengths[sampler.global_indices(s)]) for s in range(WINDOW)])
        means = [lengths[sampler.global_indices(s)].mean() for s in range(WINDOW)]
    assert spread["group"] < 0.1 * spread["pad"]
    assert means != sorted(means)


def test_step_is_random_access_and_pickles() -> None:
    sampler = StepSampler(100, 8, 1, 2, 2, 7, lengths=grouped(100, "group"))
    expected = [sampler.batch(s) for s in range(20)]
    copy = pickle.loads(pickle.dumps(sampler))
    assert [copy.batch(s) for s in reversed(range(20))] == expected[::-1]


@pytest.mark.parametrize(("world", "accum"), [(3, 1), (2, 3)])
def test_a_batch_that_cannot_be_shared_out_is_refused(world: int, accum: int) -> None:
    with pytest.raises(ValueError, match=f"train.batch_size = 32: must be a multiple of .* {world} x {accum}"):
        StepSampler(100, 32, 0, world, accum)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        StepSampler(0, 4)


def digest(sampler: StepSampler, steps: int) -> str:
    return hashlib.sha256(np.concatenate([sampler.global_indices(s) for s in range(steps)]).astype("<i8").tobytes()).hexdigest()[:16]


def test_the_order_of_earlier_runs_stays() -> None:
    """Five epochs and a bit; a run that was begun with this order resumes with it."""
    assert digest(StepSampler(1000, 16, seed=3), 330) == "f0dd882d18350f32"
    assert digest(StepSampler(1000, 16, seed=3, lengths=grouped(1000, "group")), 330) == "5a4e5572f60eb669"


@given(start=st.integers(1, 90), size=st.integers(1, 9), asked=st.integers(0, 120))
@settings(max_examples=40, deadline=None)
def test_a_phase_begins_exactly_with_its_step(start: int, size: int, asked: int) -> None:
    order = Mixed([Shuffled(50, 0), Shuffled(50, 1)], [0, 50], [(0, [1, 0]), (start, [0, 1])])
    for batching in ("pad", "group"):
        indices = StepSampler(order, size, lengths=grouped(100, batching)).global_indices(asked)
        assert set(indices // 50) == {int(asked >= start)}


@given(batches=st.integers(1, 40), window=st.integers(1, 60), size=st.integers(1, 20), world=st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_a_stream_is_not_read_far_ahead(batches: int, window: int, size: int, world: int) -> None:
    """Within an epoch no sample is further after the furthest one read than a window of the order, and of the sampler where it sorts."""
    n = batches * size * world
    order = Windowed(n, 1, window)
    for batching in ("pad", "group"):
        sampler = StepSampler(order, size * world, 0, world, lengths=grouped(n, batching))
        bound = window if batching == "pad" else max(window, size * world) + 2 * window
        furthest = 0
        for step in range(batches):
            for index, _ in sampler.batch(step):
                furthest = max(furthest, index)
                assert furthest - index < bound
