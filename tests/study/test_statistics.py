"""Statistics against scipy, textbook cases and simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kempnerforge.study.statistics import (
    clustered_error,
    differences,
    holm,
    mean_of,
    sign_flip_p,
    smallest_p,
    visible_difference,
)

SEEDS = range(5)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_sign_flip_test_tries_all_signs():
    values = [0.3, -0.1, 0.25, 0.4, 0.05, 0.2]
    of_scipy = stats.permutation_test((np.array(values),), np.mean, permutation_type="samples", n_resamples=math.inf)
    assert sign_flip_p(values) == pytest.approx(of_scipy.pvalue) == 6 / 64
    assert sign_flip_p(values * 3) == pytest.approx(0.0013, abs=0.001), "eighteen seeds: random signs"
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == smallest_p(5) == 0.0625
    assert sign_flip_p([0.1] * 6) == smallest_p(6) == 0.03125
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_holm():
    """The example of R's documentation of p.adjust has no ties; this one is by hand."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_mean_has_the_interval_of_scipy():
    values = [0.91, 0.93, 0.9, 0.96, 0.94]
    mean = mean_of(values)
    expected = stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (mean.value, mean.low, mean.high, mean.count) == (pytest.approx(0.928), expected.low, expected.high, 5)
    assert mean.low < mean.value < mean.high
    assert math.isnan(mean_of([0.5, 0.5, 0.5]).low) and mean_of([0.5]).value == 0.5


def test_a_paired_difference_is_that_of_scipy():
    a, b = [0.80, 0.82, 0.79, 0.85, 0.81], [0.84, 0.85, 0.84, 0.88, 0.86]
    (found,) = differences({"a": by_seed(a), "b": by_seed(b)})
    expected = stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.04) and found.p_t == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.p_sign == 0.0625 and found.is_shown, "all five seeds agree, and the interval is far from 0"


def test_pairs_use_the_seeds_that_both_rows_have():
    found = differences({"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {1: 3.0, 2: 4.5, 9: 0.0}, "c": {7: 1.0}})
    assert [(one.a, one.b, one.values) for one in found] == [("a", "b", {1: 1.0, 2: 0.5})]


def test_pairs_that_were_not_asked_about_cost_nothing():
    """Holm's correction is for the pairs that are asked about; b - a is another sign than a - b."""
    rows = {
        name: by_seed(values) for name, values in (("a", [0.0, 0.1, 0.0, 0.2, 0.1]), ("b", [0.3, 0.6, 0.4, 0.4, 0.5]), ("c", [0.0] * 5))
    }
    of_all, (alone,) = {(one.a, one.b): one for one in differences(rows)}, differences(rows, [["b", "a"]])
    assert len(of_all) == 3 and alone.p_holm == alone.p_t == of_all["a", "b"].p_t < of_all["a", "b"].p_holm
    assert alone.mean == -of_all["a", "b"].mean < 0 and alone.visible < of_all["a", "b"].visible


def test_fewer_than_five_seeds_show_nothing():
    low, high = [0.50, 0.52, 0.48, 0.51, 0.49], [0.90, 0.92, 0.885, 0.91, 0.89]
    shown = [differences({"a": by_seed(low[:n]), "b": by_seed(high[:n])})[0].is_shown for n in (2, 3, 4, 5)]
    assert shown == [False, False, False, True]


def test_one_seed_that_points_the_other_way():
    """With five seeds all have to agree; with eight the sign-flip test has p below 5 % all the same."""
    for n, shown in ((5, False), (8, True)):
        b = [0.08, 0.09, 0.085, 0.095, -0.002, 0.09, 0.08, 0.1][:n]
        assert differences({"a": by_seed([0.0] * n), "b": by_seed(b)})[0].is_shown is shown


def test_the_visible_difference_has_the_power_that_it_claims():
    """Simulated: in four of five studies with such a difference the t test finds it."""
    rng = np.random.default_rng(1)
    size = visible_difference(0.02, 5, 0.05)
    found = stats.ttest_1samp(rng.normal(size, 0.02, (20_000, 5)), 0.0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert visible_difference(0.02, 10) < size / 1.5 and visible_difference(0.0, 5) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("seeds", [5, 8])
def test_false_alarms_of_a_thousand_null_studies(rows: int, seeds: int):
    """Rows that are alike, with seeds that matter more than what is left of chance. A study raises a false alarm if any pair is called
    different; one in twenty may. (The sign-flip condition makes it rarer; p itself is checked below.)
    """
    rng = np.random.default_rng(rows * 100 + seeds)
    alarms, below = 0, 0
    for _ in range(1000):
        common = rng.normal(0.8, 0.05, seeds)
        scores = {str(row): by_seed((common + rng.normal(0, 0.02, seeds)).tolist()) for row in range(rows)}
        found = differences(scores)
        alarms += any(one.is_shown for one in found)
        below += any(one.p_holm <= 0.05 for one in found)
    noise = 3 * math.sqrt(0.05 * 0.95 / 1000)
    assert alarms / 1000 <= 0.05 + noise
    assert below / 1000 <= 0.05 + noise
    if rows == 2:
        assert below / 1000 == pytest.approx(0.05, abs=noise)


def test_the_clustered_error():
    """Answers that are the same for all questions of an image count once; where each image has one question it is the usual error."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, 50).astype(float)
    alone = clustered_error(images.tolist(), [str(k) for k in range(50)])
    assert alone == pytest.approx(images.std(ddof=1) / math.sqrt(50))
    repeated = clustered_error(np.repeat(images, 4).tolist(), [str(k) for k in range(50) for _ in range(4)])
    assert repeated == pytest.approx(alone)
    assert math.isnan(clustered_error([1.0, 0.0], ["a", "a"]))
