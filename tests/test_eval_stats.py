"""Intervals and paired tests against enumeration in plain Python, their invariants, and how often they are right."""

import itertools
import math
import tracemalloc
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.eval import stats
from edgekv.eval.stats import balanced, mean_interval, paired

few = {"n_boot": 200}
case = st.tuples(st.integers(0, 20).map(lambda x: x / 20), st.integers(0, 20).map(lambda x: x / 20), st.integers(0, 7),
                 st.sampled_from([1.0, 0.5, 2.0]))
cases = st.lists(case, min_size=1, max_size=40).map(lambda rows: [list(column) for column in zip(*rows)])


def by_cluster(values, clusters):
    found = defaultdict(list)
    for value, cluster in zip(values, clusters):
        found[cluster].append(value)
    return list(found.values())


# --- the bootstrap ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("level", "block"), [(0.95, None), (0.5, None), (0.5, 5 * 50)])
def test_interval_is_that_of_all_resamples(weighted, level, block, monkeypatch):
    """5 clusters have 3125 resamples; the bounds are quantiles of their means. Also where few are held at a time."""
    monkeypatch.setattr(stats, "_BLOCK", block or stats._BLOCK)
    rng = np.random.default_rng(3)
    clusters = "abbcdddaeecb"
    values = rng.random(len(clusters)).tolist()
    weights = (rng.random(len(clusters)) + 0.2).tolist() if weighted else [1.0] * len(clusters)
    groups = by_cluster(zip(values, weights), clusters)
    means = []
    for drawn in itertools.product(groups, repeat=len(groups)):
        pairs = [pair for group in drawn for pair in group]
        means.append(sum(v * w for v, w in pairs) / sum(w for _, w in pairs))

    found = mean_interval(values, clusters, level, 40_000, weights=weights if weighted else None)
    assert found.n == 5
    assert found.mean == pytest.approx(sum(v * w for v, w in zip(values, weights)) / sum(weights), abs=1e-12)
    for bound, share in ((found.low, (1 - level) / 2), (found.high, (1 + level) / 2)):
        assert sum(m < bound - 1e-9 for m in means) / len(means) <= share + 0.01
        assert sum(m <= bound + 1e-9 for m in means) / len(means) >= share - 0.01


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(-4, 4))
def test_interval_invariants(rows, shift):
    values, _, clusters, weights = rows
    found = mean_interval(values, clusters, weights=weights, **few)
    assert found.n == len(set(clusters))
    mean = sum(Fraction(v) * Fraction(w) for v, w in zip(values, weights)) / sum(map(Fraction, weights))
    assert found.mean == pytest.approx(float(mean), abs=1e-12)
    if found.n == 1:
        assert math.isnan(found.low) and math.isnan(found.high)
        return
    assert min(values) - 1e-12 <= found.low <= found.mean <= found.high <= max(values) + 1e-12
    assert found == mean_interval(values, clusters, weights=weights, **few)
    moved = mean_interval([v + shift for v in values], clusters, weights=weights, **few)
    assert moved.mean == pytest.approx(found.mean + shift)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift))
    wider = mean_interval(values, clusters, 0.999, weights=weights, **few)
    assert wider.low <= found.low + 1e-12 and wider.high >= found.high - 1e-12


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e6, 1e6), st.lists(st.tuples(st.integers(0, 5), st.floats(0.1, 9)), min_size=2, max_size=30))
def test_equal_values_have_no_width(value, rows):
    clusters, weights = zip(*rows)
    found = mean_interval([value] * len(rows), clusters, weights=weights, **few)
    assert found.mean == value
    assert (found.low, found.high) == (value, value) or found.n == 1


def test_tasks_that_count_the_same():
    tasks, values = ["a"] * 9 + ["b"], [1.0] * 9 + [0.0]
    assert mean_interval(values).mean == pytest.approx(0.9)
    assert mean_interval(values, weights=balanced(tasks)).mean == pytest.approx(0.5)
    assert balanced(["x", "y", "x"]).tolist() == [0.5, 1, 0.5]


def test_strata():
    """Answers that depend on the task alone: documents of one task each do not make the mean uncertain."""
    tasks = ["easy"] * 12 + ["hard"] * 12
    values = [1.0] * 12 + [0.25] * 12
    assert mean_interval(values).high > 0.7
    found = mean_interval(values, strata=tasks)
    assert found.low == found.high == found.mean == 0.625
    mixed = mean_interval(values[6:18], strata=tasks[6:18])  # groups too small to be told apart
    assert mixed.low < 0.5 and mixed.high > 0.75
    # the order in which clusters come has nothing to do with their strata
    order = np.random.default_rng(0).permutation(48)
    values = np.repeat([1.0, 0.25], 24)[order]
    strata = np.repeat(["easy", "hard"], 24)[order].tolist()
    found = mean_interval(values, [f"d{i // 2}" for i in order], strata=strata)
    assert found.n == 24 and found.low == found.high == 0.625
    with pytest.raises(ValueError, match="a cluster is in two strata"):
        mean_interval([0, 1, 2], ["d", "d", "e"], strata=["a", "b", "a"])
    with pytest.raises(ValueError, match="1 strata for 2 values"):
        mean_interval([0, 1], strata=["a"])


def test_coverage():
    """Questions about a document share its difficulty. The interval over documents holds the truth about as often as it
    says, one over questions far less often."""
    rng = np.random.default_rng(11)
    documents = np.repeat(np.arange(40), 5)
    hits, naive, runs = 0, 0, 300
    for _ in range(runs):
        values = 0.6 + rng.normal(0, 0.2, 40)[documents] + rng.normal(0, 0.1, 200)
        a, b = mean_interval(values, documents, n_boot=400), mean_interval(values, n_boot=400)
        hits += a.low <= 0.6 <= a.high
        naive += b.low <= 0.6 <= b.high
    assert 0.9 <= hits / runs <= 0.98
    assert naive / runs < 0.8


def test_memory_is_bounded():
    values = np.random.default_rng(0).random(100_000)
    stats._draws.cache_clear()
    tracemalloc.start()
    try:
        mean_interval(values, n_boot=200)
        assert tracemalloc.get_traced_memory()[1] < 150e6  # at once it would be 160 MB of indices and as much of values
    finally:
        tracemalloc.stop()
        stats._draws.cache_clear()


# --- the paired test -------------------------------------------------------------------------------------------------


def test_p_of_all_flips():
    rng = np.random.default_rng(5)
    for n in (1, 2, 5, 9):
        clusters = np.repeat(np.arange(n), 3)
        a, b = rng.integers(0, 5, (2, 3 * n)) / 4
        sums = [sum(map(Fraction, group)) for group in by_cluster((a - b).tolist(), clusters.tolist())]
        extreme = [abs(sum(s * x for s, x in zip(signs, sums))) >= abs(sum(sums))
                   for signs in itertools.product((1, -1), repeat=n)]
        found = paired(a, b, clusters, **few)
        assert found.p == pytest.approx(sum(extreme) / len(extreme), abs=1e-12)
        assert (found.better, found.worse, found.n) == (sum(x > 0 for x in sums), sum(x < 0 for x in sums), n)


@pytest.mark.parametrize(("n", "shift"), [(16, 0.2), (17, 0.2), (60, 0.15), (60, 0.0)])
def test_p_against_the_exact_distribution(n, shift):
    """Of whole numbers it can be counted: how often the signed sum is each number."""
    rng = np.random.default_rng(n)
    a = (rng.random(n) < 0.5 + shift).astype(int) * 2
    b = (rng.random(n) < 0.5 - shift).astype(int) * 3
    ways = Counter({0: 1})
    for x in (a - b).tolist():
        ways = Counter({total: ways[total - x] + ways[total + x]
                        for total in {t + s * x for t in ways for s in (1, -1)}})
    exact = sum(n for total, n in ways.items() if abs(total) >= abs((a - b).sum())) / sum(ways.values())
    found = paired(a, b, **few).p
    differing = np.count_nonzero(a - b)
    tolerance = 1e-12 if differing <= stats.EXACT else 5 * math.sqrt(exact * (1 - exact) / 10_000) + 2e-4
    assert found == pytest.approx(exact, abs=tolerance)


def test_smallest_p_of_random_flips():
    a, b = np.ones(40), np.zeros(40)
    assert paired(a, b, **few).p == 1 / 10_001
    assert paired(a, b, n_flips=99, **few).p == 1 / 100
    assert paired(a, a, **few).p == 1.0
    assert paired([1.0] * 16, [0.0] * 16, **few).p == 2 / 2**16


def test_no_difference_is_seldom_called_one():
    rng = np.random.default_rng(2)
    ps = []
    for _ in range(300):
        difficulty = rng.normal(0, 1, 30)[:, None]
        a, b = (rng.normal(0, 1, (2, 30, 4)) + difficulty > 0).astype(float).reshape(2, -1)
        ps.append(paired(a, b, np.repeat(np.arange(30), 4), n_boot=2, n_flips=300).p)
    assert np.mean(np.array(ps) <= 0.05) < 0.08 and np.mean(np.array(ps) <= 0.5) < 0.58


@settings(max_examples=60, deadline=None)
@given(cases)
def test_paired_invariants(rows):
    a, b, clusters, weights = rows
    one = paired(a, b, clusters, weights=weights, **few)
    other = paired(b, a, clusters, weights=weights, **few)
    assert 0 < one.p <= 1 and one.p == other.p
    assert one.difference == pytest.approx(-other.difference, abs=1e-12)
    assert [one.low, one.high] == pytest.approx([-other.high, -other.low], abs=1e-12, nan_ok=True)
    assert (one.better, one.worse, one.n) == (other.worse, other.better, other.n)
    alone = mean_interval([x - y for x, y in zip(a, b)], clusters, weights=weights, **few)
    assert (one.difference, one.n) == (pytest.approx(alone.mean, abs=1e-12), alone.n)
    assert [one.low, one.high] == pytest.approx([alone.low, alone.high], abs=1e-12, nan_ok=True)


def test_rounding_is_no_difference():
    """0.1 + 0.2 - 0.3 is not 0 in binary."""
    found = paired([0.1, 0.2, 0.0], [0.0, 0.0, 0.3], ["d", "d", "d"], **few)
    assert (found.better, found.worse, found.p) == (0, 0, 1.0)


@pytest.mark.parametrize(("why", "arguments"), [
    ("0 values", ([],)),
    ("values must be finite", ([1, math.nan],)),
    ("2 values, 2 weights, 1 clusters", ([1, 2], ["a"])),
])
def test_bad_values(why, arguments):
    with pytest.raises(ValueError, match=why):
        mean_interval(*arguments)
    with pytest.raises(ValueError, match="above 0"):
        mean_interval([1, 2], weights=[1, 0])
    with pytest.raises(ValueError, match="1 and 2 values are no pairs"):
        paired([1], [1, 2])
