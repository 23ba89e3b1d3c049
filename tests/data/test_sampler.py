from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data import StepSampler
from kempnerforge.data.sampler import WINDOW

SHARES = [(world, accum) for world in (1, 2, 4) for accum in (1, 2, 4)]


def lengths_of(n: int) -> list[int]:
    return np.random.default_rng(n).integers(1, 200, size=n).tolist()


def global_stream(n: int, batch: int, world: int, accum: int, batching: str, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """Per step what all ranks together take, micro-batch by micro-batch, by iterating the samplers."""
    ranks = [iter(StepSampler(lengths_of(n), batch, r, world, accum, 3, start, batching)) for r in range(world)]
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
    sampler = StepSampler(lengths_of(n), size, seed=5, batching=batching)
    for epoch in range(3):
        seen = [index for step in range(epoch * batches, (epoch + 1) * batches) for index, _ in sampler.batch(step)]
        assert sorted(seen) == list(range(n))


@given(n=st.integers(1, 50), size=st.integers(1, 64), batching=st.sampled_from(["pad", "group"]))
@settings(max_examples=60, deadline=None)
def test_every_sample_is_equally_often_seen_when_sizes_do_not_divide(n: int, size: int, batching: str) -> None:
    sampler = StepSampler(lengths_of(n), size, batching=batching)
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
    lengths = np.array(lengths_of(n))
    spread = {}
    for batching in ("pad", "group"):
        sampler = StepSampler(lengths, size, seed=1, batching=batching)
        spread[batching] = np.mean([np.ptp(lengths[sampler.global_indices(s)]) for s in range(WINDOW)])
        means = [lengths[sampler.global_indices(s)].mean() for s in range(WINDOW)]
    assert spread["group"] < 0.1 * spread["pad"]
    assert means != sorted(means)


def test_step_is_random_access_and_pickles() -> None:
    sampler = StepSampler(lengths_of(100), 8, 1, 2, 2, 7, batching="group")
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
