"""What can be said of rows that were run with the same seeds: intervals, paired differences, and how small a
difference could have been seen.

The test of a difference is the sign-flip permutation test: under the null hypothesis that two rows are alike,
each seed's difference is as likely to be positive as negative, so all 2^n signs of n differences are equally
likely. It assumes nothing else, but with n seeds its p is at least 2 / 2^n: with five seeds 0.0625, so that
by itself it shows nothing at 5 %. Beside it is the paired t test, which assumes that differences are normal,
and has power with five seeds. Two rows are called different only if there are ``ENOUGH`` seeds and both
agree: the t test at 5 % after Holm's correction for the number of pairs, and the sign-flip test at 5 % or at
the smallest p that so many seeds can reach, which says that all of them point the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05
"""Of false alarms, over all pairs together."""
ENOUGH = 5
"""Seeds below which nothing is called different."""
POWER = 0.8
RESAMPLES = 9999
"""Of the bootstrap."""
EXACT = 16
"""Seeds up to which all patterns of signs are tried."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: of the values that are there.
        low, high: 95 % interval, BCa bootstrap (Efron 1987); NaN with fewer than three values, or if all are
            the same.
        count: values.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Row ``b`` less row ``a``, over the seeds that both have.

    Attributes:
        values: by seed.
        mean: of them.
        low, high: 95 % paired t interval, for this pair alone.
        p_sign: exact two-sided sign-flip test.
        p_t: two-sided paired t test.
        p_holm: ``p_t`` after Holm's correction for all pairs (Holm 1979).
        visible: the smallest true difference that a t test with so many seeds and this spread finds in four
            of five cases, at the level that Bonferroni's correction for all pairs leaves.
    """

    a: str
    b: str
    values: dict[int, float]
    mean: float
    low: float
    high: float
    p_sign: float
    p_t: float
    p_holm: float
    visible: float

    @property
    def is_shown(self) -> bool:
        """Whether the rows differ, by the rule at the head of this file."""
        enough = len(self.values) >= ENOUGH
        reached = self.p_sign <= max(LEVEL, smallest_p(len(self.values)) * (1 + 1e-9))
        return enough and reached and self.p_holm <= LEVEL


def smallest_p(seeds: int) -> float:
    """The smallest p that the sign-flip test can give."""
    return min(1.0, 2.0 ** (1 - seeds))


def mean_of(values: Sequence[float], seed: int = 0) -> Mean:
    """The mean of ``values``, and its interval, by ``scipy.stats.bootstrap``."""
    found = np.asarray(values, dtype=np.float64)
    low = high = math.nan
    if len(found) >= 3 and np.ptp(found) > 0:
        rng = np.random.default_rng(seed)
        interval = stats.bootstrap((found,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=rng).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Mean(float(found.mean()), low, high, len(found))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p: the share of all sign patterns whose mean is at least as far from 0; beyond ``EXACT``
    seeds of random patterns.
    """
    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2 or not found.any():
        return 1.0
    if len(found) > EXACT:
        rng = np.random.default_rng(0)
        return float(stats.permutation_test((found,), np.mean, permutation_type="samples", n_resamples=99_999, rng=rng).pvalue)
    means = np.abs(_signs(len(found)) @ found)
    return float((means >= abs(found.sum()) * (1 - 1e-12)).mean())


@cache
def _signs(count: int) -> np.ndarray:
    """(2^count, count): all patterns of signs."""
    return 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)


def differences(rows: Mapping[str, Mapping[int, float]], asked: Iterable[Sequence[str]] = ()) -> list[Difference]:
    """Pairs of rows.

    Args:
        rows: name -> seed -> score. Pairs with fewer than two seeds in common are left out.
        asked: the pairs; none: all, in the order of ``rows``.
    """
    pairs = []
    for a, b in tuple(asked) or combinations(rows, 2):
        common = sorted(rows[a].keys() & rows[b].keys())
        if len(common) >= 2:
            pairs.append((a, b, {seed: rows[b][seed] - rows[a][seed] for seed in common}))
    p_values = [_t_p(list(values.values())) for _, _, values in pairs]
    return [
        _difference(a, b, values, p, corrected, len(pairs))
        for (a, b, values), p, corrected in zip(pairs, p_values, holm(p_values), strict=True)
    ]


def _difference(a: str, b: str, values: dict[int, float], p: float, corrected: float, pairs: int) -> Difference:
    found = np.array(list(values.values()))
    n, mean, error = len(found), float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found)))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    visible = visible_difference(float(found.std(ddof=1)), n, LEVEL / pairs)
    return Difference(a, b, values, mean, mean - half, mean + half, sign_flip_p(found.tolist()), p, corrected, visible)


def _t_p(values: Sequence[float]) -> float:
    """Two-sided p of the paired t test. Differences that are all the same have no spread: p is 1 if they are
    0, else 0.
    """
    if np.ptp(values) == 0:
        return 0.0 if values[0] else 1.0
    t = np.mean(values) / np.std(values, ddof=1) * math.sqrt(len(values))
    return 2 * float(stats.t.sf(abs(t), len(values) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values that may be compared with the level itself, corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(order):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[k]))
        corrected[k] = most
    return corrected


def visible_difference(spread: float, seeds: int, level: float = LEVEL) -> float:
    """The true difference that a two-sided paired t test finds with probability ``POWER``.

    Args:
        spread: standard deviation of the differences over seeds.
        seeds: their number.
        level: of false alarms.
    """
    return spread * _visible_shift(seeds, level) / math.sqrt(seeds) if spread else 0.0


@cache
def _visible_shift(seeds: int, level: float) -> float:
    """The same in standard errors, from the noncentral t distribution."""
    if seeds < 2:
        return math.inf
    limit = float(stats.t.ppf(1 - level / 2, seeds - 1))

    lack = lambda shift: POWER - float(stats.nct.sf(limit, seeds - 1, shift))  # the other tail adds nothing there
    high = limit
    while lack(high) > 0:
        high *= 1.5
    return optimize.root_scalar(lack, bracket=(0.0, high), xtol=1e-12).root


def clustered_error(points: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of the mean of ``points`` where the points of one cluster (the questions about one
    image) go together: the cluster-robust sandwich, with the factor C / (C - 1) for C clusters (Cameron and
    Miller 2015, section II). NaN with one cluster.
    """
    values = np.asarray(points, dtype=np.float64)
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(names)
    if count < 2:
        return math.nan
    sums = np.bincount(index, weights=values - values.mean(), minlength=count)
    return float(math.sqrt(count / (count - 1) * (sums**2).sum()) / len(values))
