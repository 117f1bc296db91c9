"""Confidence intervals of means, and paired tests, for cases that come in clusters.

Several questions are asked about one document, so their answers are not independent: what is drawn again by the
bootstrap and what has its sign flipped by the permutation test is always the whole document, the *cluster*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EXACT = 16  # clusters that differ, up to which all sign flips are enumerated
SMALL = 10  # clusters; strata that have fewer are drawn from together
_BLOCK = 1 << 21  # numbers held at a time


@dataclass(frozen=True)
class Interval:
    """A mean, its confidence interval, and the number of clusters they rest on.

    ``low`` and ``high`` are NaN for a single cluster: it does not tell how clusters differ.
    """

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired:
    """A mean difference and its interval, the two-sided p-value of "no difference", the number of clusters, and in how
    many of them the first is better and worse. Values are such that more is better."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    better: int
    worse: int


def balanced(tasks: Sequence[Hashable]) -> np.ndarray:
    """Weights, one per value, with which each task counts the same in a mean, whatever its number of values. Without
    weights each value counts the same."""
    counts = Counter(tasks)
    return np.array([1 / counts[task] for task in tasks])


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = 0.95,
                  n_boot: int = 10_000, seed: int = 0, *, weights: Sequence[float] | None = None,
                  strata: Sequence[Hashable] | None = None) -> Interval:
    """Weighted mean of ``values``, with the percentile interval of a bootstrap over clusters.

    Args:
        clusters: which cluster each value belongs to; None: every value is one of its own.
        weights: of the values, above 0; None: all the same.
        strata: a group for each value, the same within a cluster. Clusters are drawn within their group, so that each
            resample has as many of each group as the design had (say, per context length). Groups of fewer than
            ``SMALL`` clusters are put together.

    The interval always contains the mean. Same seed, same interval. ValueError if there are no values, or if one is
    not finite.
    """
    values, weights, index = _checked(values, clusters, weights)
    n = int(index.max()) + 1
    origin = values[0]  # sums of equal values are then exact: no width from rounding
    w = np.bincount(index, weights)
    s = np.bincount(index, weights * (values - origin))
    mean = s.sum() / w.sum()
    if n == 1:
        return Interval(float(origin + mean), np.nan, np.nan, 1)

    order, sizes = _strata(index, n, strata)
    s, w = s[order], w[order]
    equal = bool((w == w[0]).all())
    means = np.empty(n_boot)
    rows = max(1, _BLOCK // n)
    for begin in range(0, n_boot, rows):
        draws = _draws(sizes, min(rows, n_boot - begin), seed, begin)
        means[begin : begin + rows] = s.take(draws).sum(1) / (w.sum() if equal else w.take(draws).sum(1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(origin + mean), float(origin + min(low, mean)), float(origin + max(high, mean)), n)


def paired(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = 0.95,
           n_boot: int = 10_000, n_flips: int = 10_000, seed: int = 0, *, weights: Sequence[float] | None = None,
           strata: Sequence[Hashable] | None = None) -> Paired:
    """Compare two settings on the same cases: ``a[i]`` and ``b[i]`` are one case.

    The interval of the mean of a - b is that of :func:`mean_interval`. The p-value is that of a sign-flip permutation
    test on the clusters' sums of weighted differences: were there no difference, each cluster's could as well have come
    with the other sign. All flips are tried where at most ``EXACT`` clusters differ, else k of ``n_flips`` random ones
    are at least as extreme and p is (k + 1) / (n_flips + 1). ValueError as there, or if a and b differ in length.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs")
    interval = mean_interval(a - b, clusters, level, n_boot, seed, weights=weights, strata=strata)
    d, w, index = _checked(a - b, clusters, weights)
    sums = np.bincount(index, w * d)
    sums[np.abs(sums) <= 1e-12 * np.bincount(index, w * np.abs(d))] = 0  # rounding is no difference
    return Paired(interval.mean, interval.low, interval.high, _flip_test(sums[sums != 0], n_flips, seed),
                  interval.n, int((sums > 0).sum()), int((sums < 0).sum()))


@lru_cache(maxsize=4)  # a table asks for the same ones again and again
def _draws(sizes: tuple[int, ...], rows: int, seed: int, begin: int) -> np.ndarray:
    """Resamples from the one numbered ``begin``: ``rows`` by clusters, each drawn from its own stratum."""
    rng = np.random.default_rng((seed, begin))
    first = np.cumsum(sizes) - sizes
    return np.hstack([rng.integers(a, a + n, (rows, n)) for a, n in zip(first, sizes)])


def _flip_test(sums: np.ndarray, n_flips: int, seed: int) -> float:
    """The share of sign flips whose total is at least as far from zero as this one; no ``sums`` is 0."""
    n = len(sums)
    if n == 0:
        return 1.0
    least = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal totals that were added up in another order
    if n <= EXACT:
        signs = 1 - 2 * (np.arange(1 << (n - 1))[:, None] >> np.arange(n) & 1)  # the other half are their negatives
        return float((np.abs(signs @ sums) >= least).mean())
    rng = np.random.default_rng(seed)
    count = 0
    rows = max(1, _BLOCK // n)
    for begin in range(0, n_flips, rows):
        signs = rng.integers(0, 2, (min(rows, n_flips - begin), n), np.int8).astype(np.float64) * 2 - 1
        count += int((np.abs(signs @ sums) >= least).sum())
    return (count + 1) / (n_flips + 1)


def _checked(values, clusters, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, weights and the number of each value's cluster, in the order of their first values."""
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    clusters = range(len(values)) if clusters is None else clusters
    if not len(values) or not len(values) == len(weights) == len(clusters):
        raise ValueError(f"{len(values)} values, {len(weights)} weights, {len(clusters)} clusters")
    if not (np.isfinite(values).all() and np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError("values must be finite, weights finite and above 0")
    return values, weights, _numbers(clusters)


def _numbers(names: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def _strata(index: np.ndarray, n: int, strata: Sequence[Hashable] | None) -> tuple[np.ndarray, tuple[int, ...]]:
    """Clusters in the order of their strata, and how many there are in each stratum."""
    if strata is None:
        return np.arange(n), (n,)
    if len(strata) != len(index):
        raise ValueError(f"{len(strata)} strata for {len(index)} values")
    of_value = _numbers(strata)
    of_cluster = np.empty(n, np.intp)
    of_cluster[index] = of_value
    if (of_cluster[index] != of_value).any():
        raise ValueError("a cluster is in two strata")
    sizes = np.bincount(of_cluster)
    of_cluster[sizes[of_cluster] < SMALL] = len(sizes)
    sizes = np.bincount(of_cluster)
    return np.argsort(of_cluster, kind="stable"), tuple(sizes[sizes > 0].tolist())
