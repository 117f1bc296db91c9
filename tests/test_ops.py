"""The operators of ggml-edgekv.h against NumPy, at and around tile edges. test_kernels.py calls these tests for other
devices."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from ggml import Graph, row_bytes
from process import python

DOT, NORM, COS = range(3)
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
N_HEADS = (1, 2, 3, 8)
N_CELLS = (1, 7, 8, 31, 32, 33, 63, 64, 65, 255, 256, 257)
N_THREADS = (1, 2, 3)

# every count of cells, the KV heads in turn; all of them at one odd count
SHAPES = sorted({*zip(itertools.cycle(N_HEADS), N_CELLS), *((h, 65) for h in N_HEADS)})
LAYOUTS = [(kind, size) for kind in oracle.CACHE_TYPES for size in HEAD_SIZES
           if kind in ("f32", "f16", "bf16") or size % 32 == 0]


class Cache:
    """One layer's K or V as a cache stores it: [2 streams][cells + 3 spare][heads * head size]; a view is of stream 1."""

    def __init__(self, kind: str, size: int, n_head: int, n_cell: int, seed: int = 0):
        self.kind, self.size, self.n_head, self.n_cell = kind, size, n_head, n_cell
        self.rng = np.random.default_rng([seed, size, n_head, n_cell])
        self.row = row_bytes(kind, size)
        self.data = oracle.random_rows(self.rng, kind, (2, n_cell + 3, n_head), size)

    @property
    def rows(self) -> np.ndarray:
        """Bytes [n_cell, n_head, row] of the view."""
        return self.data[1, : self.n_cell]

    def keys(self) -> np.ndarray:
        """float64 [n_head, n_cell, size]."""
        return oracle.dequantise(self.kind, self.rows).swapaxes(0, 1)

    def view(self, graph: Graph) -> tuple[int, int]:
        """The whole tensor and the operators' view of it."""
        whole = graph.tensor(self.kind, (self.size * self.n_head, self.n_cell + 3, 2), self.data)
        cell = self.row * self.n_head
        return whole, graph.view(whole, (self.size, self.n_head, self.n_cell), self.row, cell, cell * (self.n_cell + 3))


def score(cache: Cache, vec, kind: int, scale: float, n_threads: int) -> np.ndarray:
    with Graph() as g:
        _, keys = cache.view(g)
        f = None if vec is None else g.tensor("f32", vec.shape[::-1], vec)
        result = g.op("score", keys, f, kind, scale)
        g.compute(result, n_threads=n_threads)
        return g.read(result, np.float32, (cache.n_head, cache.n_cell))


def choose(scores: np.ndarray, n_head: int, keep: int, window: int, n: int, n_threads: int = 1) -> np.ndarray:
    with Graph() as g:
        result = g.op("choose", g.tensor("f32", scores.shape[::-1], scores.astype(np.float32)), n_head, keep, window, n)
        g.compute(result, n_threads=n_threads)
        return g.read(result, np.int32, (n_head, n))


def same_for_all_threads(function) -> np.ndarray:
    first, *others = (function(n) for n in N_THREADS)
    assert all(other.tobytes() == first.tobytes() for other in others)
    return first


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_score(kind, size, shapes=SHAPES):
    for n_head, n_cell in shapes:
        cache = Cache(kind, size, n_head, n_cell)
        if n_cell > 2:
            cache.data[1, 2] = 0  # a zero key
        keys = cache.keys()
        vec = cache.rng.standard_normal((n_head, size)).astype(np.float32)
        for what, f, scale in ((DOT, vec, 1.0), (DOT, vec, -0.375), (NORM, None, -1.0), (COS, vec, -1.0)):
            got = same_for_all_threads(lambda n: score(cache, f, what, scale, n))
            for h in range(n_head):
                want, error = (oracle.dot(keys[h], vec[h]) if what == DOT else oracle.norm(keys[h]) if what == NORM
                               else oracle.cos(keys[h], vec[h].astype(np.float64)))
                # one more rounding for the scale
                assert (np.abs(got[h] - scale * want) <= abs(scale) * (error + oracle.EPS * np.abs(want))).all()
            if n_cell > 2:
                assert (got[:, 2] == 0).all()


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_key_mean(kind, size, shapes=SHAPES):
    def run(cache: Cache, n_threads: int) -> np.ndarray:
        with Graph() as g:
            result = g.op("key_mean", cache.view(g)[1])
            g.compute(result, n_threads=n_threads)
            return g.read(result, np.float32, (cache.n_head, size))

    for n_head, n_cell in shapes:
        cache = Cache(kind, size, n_head, n_cell)
        if n_cell > 2:
            cache.data[1, 2] = 0
        got = same_for_all_threads(lambda n: run(cache, n))
        for h, keys in enumerate(cache.keys()):
            want, error = oracle.key_mean(keys)
            assert (np.abs(got[h] - want) <= error).all()


def test_scores_that_are_not_finite():
    cache = Cache("f32", 32, 2, 8)
    keys = cache.data.view(np.float32)
    keys[1, 3, 0, 5], keys[1, 4, 1, 0] = np.nan, np.inf
    vec = np.ones((2, 32), np.float32)
    got = score(cache, vec, DOT, 1.0, 1)
    assert np.isnan(got[0, 3]) and got[1, 4] == np.inf
    assert np.isfinite(np.delete(got.ravel(), [3, 8 + 4])).all()


# --- choice ----------------------------------------------------------------------------------------------------------


def check_choice(scores: np.ndarray, n_head: int, keep: int, window: int, n: int, n_threads: int = 1) -> np.ndarray:
    scores = scores.astype(np.float32)
    got = choose(scores, n_head, keep, window, n, n_threads)
    for h in range(n_head):
        assert got[h].tolist() == oracle.choose(scores[h % len(scores)], keep, window, n).tolist()
    return got


@pytest.mark.parametrize("n_head", N_HEADS)
@pytest.mark.parametrize("n_cell", N_CELLS)
def test_choose(n_head, n_cell):
    rng = np.random.default_rng([n_head, n_cell])
    strange = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3.0e38, 1.0])
    kinds = [rng.standard_normal((n_head, n_cell)),       # distinct
             rng.integers(0, 3, (n_head, n_cell)),        # heavy ties
             np.zeros((n_head, n_cell)),                  # nothing but a tie
             np.full((n_head, n_cell), np.nan),
             rng.choice(strange, (n_head, n_cell)),
             rng.choice(strange, (1, n_cell))]            # shared by the heads
    for n in sorted({1, 2, n_cell // 3, n_cell - 1, n_cell} & set(range(1, n_cell + 1))):
        for keep, window in {(0, 0), (n, 0), (0, n), (n // 2, n - n // 2), (n // 4, n // 4), (min(4, n), 0)}:
            for scores in kinds:
                check_choice(scores, n_head, keep, window, n)


def test_choose_states_its_rules():
    """By hand, so that an error in the oracle shows."""
    nan, inf = np.nan, np.inf
    assert choose(np.array([[5., 1, 1, 1, 0]]), 1, 0, 0, 3).tolist() == [[0, 2, 3]]         # ties: the later
    assert choose(np.array([[5., 1, 1, 1, 0]]), 1, 1, 1, 3).tolist() == [[0, 3, 4]]         # sinks and window
    assert choose(np.array([[-0., 0, -0., 0]]), 1, 0, 0, 2).tolist() == [[2, 3]]            # -0 equals 0
    assert choose(np.array([[0., -0., -1, -2]]), 1, 0, 0, 1).tolist() == [[1]]
    assert choose(np.array([[nan, -inf, nan, -1]]), 1, 0, 0, 3).tolist() == [[1, 2, 3]]     # NaN below -inf
    assert choose(np.array([[nan, -nan, nan, -inf]]), 1, 0, 0, 2).tolist() == [[2, 3]]      # whatever its sign
    assert choose(np.array([[inf, 3e38, inf, 1]]), 1, 0, 0, 2).tolist() == [[0, 2]]
    assert choose(np.array([[1., 9, 2, 8]]), 3, 0, 0, 2).tolist() == [[1, 3]] * 3           # shared scores
    assert choose(np.array([[1., 9, 2], [9, 1, 2]]), 2, 0, 0, 1).tolist() == [[1], [0]]     # each its own


def test_choose_does_not_depend_on_threads():
    scores = np.random.default_rng(0).integers(0, 5, (8, 1000)).astype(np.float32)
    same_for_all_threads(lambda n: check_choice(scores, 8, 4, 100, 400, n))


@st.composite
def choices(draw):
    n_cell = draw(st.integers(1, 80))
    n_head = draw(st.integers(1, 4))
    n = draw(st.integers(1, n_cell))
    keep = draw(st.integers(0, n))
    window = draw(st.integers(0, n - keep))
    value = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]))
    shared = draw(st.booleans())
    rows = draw(st.lists(st.lists(value, min_size=n_cell, max_size=n_cell), min_size=1 if shared else n_head,
                         max_size=1 if shared else n_head))
    return np.array(rows, np.float32), n_head, keep, window, n


def check_invariants(scores: np.ndarray, n_head: int, keep: int, window: int, n: int) -> None:
    n_cell = scores.shape[1]
    got = check_choice(scores, n_head, keep, window, n)
    for h in range(n_head):
        s, chosen = scores[h % len(scores)], set(got[h].tolist())
        assert len(chosen) == n and (np.diff(got[h]) > 0).all()
        assert chosen >= set(range(keep)) | set(range(n_cell - window, n_cell))
        rest = set(range(keep, n_cell - window))
        for out in rest - chosen:
            for kept in rest & chosen:  # nothing left out beats anything kept
                assert not s[out] > s[kept] and not (np.isnan(s[kept]) and not np.isnan(s[out]))
                assert s[out] != s[kept] or kept > out


@settings(deadline=None, max_examples=200)
@given(choices())
def test_choose_property(case):
    check_invariants(*case)


# --- the row move ----------------------------------------------------------------------------------------------------


def ascending(rng: np.random.Generator, n_head: int, n_cell: int, n: int) -> np.ndarray:
    return np.array([np.sort(rng.choice(n_cell, n, replace=False)) for _ in range(n_head)], np.int32)


def subset_sizes(n_cell: int) -> list[int]:
    return sorted({1, max(1, n_cell // 2), max(1, n_cell - 1), n_cell})


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_compact(kind, size, shapes=SHAPES):
    def run(cache: Cache, chosen: np.ndarray, n_threads: int) -> np.ndarray:
        with Graph() as g:
            whole, rows = cache.view(g)
            result = g.op("compact", rows, g.tensor("i32", chosen.shape[::-1], chosen))
            g.compute(result, n_threads=n_threads)
            return g.read(whole, np.uint8, cache.data.shape)

    for n_head, n_cell in shapes:
        cache = Cache(kind, size, n_head, n_cell)
        # every bit pattern must survive: NaN payloads, denormals, blocks that no quantiser would make
        cache.data = cache.rng.integers(0, 256, cache.data.shape, np.uint8)
        for n in subset_sizes(n_cell):
            chosen = ascending(cache.rng, n_head, n_cell, n)
            got = same_for_all_threads(lambda t: run(cache, chosen, t))
            for h in range(n_head):
                np.testing.assert_array_equal(got[1, :n, h], cache.rows[chosen[h], h])
            np.testing.assert_array_equal(got[0], cache.data[0])  # the other stream
            np.testing.assert_array_equal(got[1, n_cell:], cache.data[1, n_cell:])  # cells behind the view


@pytest.mark.parametrize("kind, size", [(kind, size) for kind, size in LAYOUTS if kind in ("f32", "f16", "bf16")])
def test_compact_transposed(kind, size, shapes=SHAPES):
    """V without flash attention: [2 streams][heads * head size][cells + 3 spare]."""
    word = {"f32": np.uint32}.get(kind, np.uint16)
    item = np.dtype(word).itemsize

    def run(data: np.ndarray, chosen: np.ndarray, n_cell: int, n_threads: int) -> np.ndarray:
        _, n_head, _, n_all = data.shape
        with Graph() as g:
            whole = g.tensor(kind, (n_all, size * n_head, 2), data)
            v = g.view(whole, (n_cell, size, n_head), n_all * item, n_all * size * item, n_all * size * n_head * item)
            result = g.op("compact", g.permute(v, 2, 0, 1, 3), g.tensor("i32", chosen.shape[::-1], chosen))
            g.compute(result, n_threads=n_threads)
            return g.read(whole, word, data.shape)

    for n_head, n_cell in shapes:
        rng = np.random.default_rng([size, n_head, n_cell])
        data = rng.integers(0, np.iinfo(word).max, (2, n_head, size, n_cell + 3), word, endpoint=True)
        for n in subset_sizes(n_cell):
            chosen = ascending(rng, n_head, n_cell, n)
            got = same_for_all_threads(lambda t: run(data, chosen, n_cell, t))
            for h in range(n_head):
                np.testing.assert_array_equal(got[1, h, :, :n], data[1, h][:, chosen[h]])
            np.testing.assert_array_equal(got[0], data[0])
            np.testing.assert_array_equal(got[1, :, :, n_cell:], data[1, :, :, n_cell:])


def test_score_choose_compact_in_one_graph():
    """As an eviction runs them: the keys are read before they are moved."""
    cache = Cache("q8_0", 64, 3, 257)
    vec = cache.rng.standard_normal((3, 64)).astype(np.float32)
    chosen = choose(score(cache, vec, DOT, 1.0, 1), 3, 4, 16, 100)
    with Graph() as g:
        whole, keys = cache.view(g)
        index = g.op("choose", g.op("score", keys, g.tensor("f32", (64, 3), vec), DOT, 1.0), 3, 4, 16, 100)
        moved = g.op("compact", keys, index)
        g.compute(moved, n_threads=2)
        got = g.read(whole, np.uint8, cache.data.shape)
    for h in range(3):
        np.testing.assert_array_equal(got[1, :100, h], cache.rows[chosen[h], h])


# --- contracts are asserted ------------------------------------------------------------------------------------------

VIOLATIONS = {
    "more chosen than cells": "g.op('choose', g.tensor('f32', (4, 1), np.zeros(4, 'f4')), 1, 0, 0, 5)",
    "sinks and window exceed the choice": "g.op('choose', g.tensor('f32', (4, 1), np.zeros(4, 'f4')), 1, 2, 2, 3)",
    "scores of other heads": "g.op('choose', g.tensor('f32', (4, 2), np.zeros(8, 'f4')), 3, 0, 0, 2)",
    "a vector of another size": "g.op('score', g.tensor('f32', (8, 1, 4), np.zeros(32, 'f4')), "
                                "g.tensor('f32', (4, 1), np.zeros(4, 'f4')), 0, 1.0)",
    "a strided quantised row": "g.op('compact', g.permute(g.tensor('q8_0', (64, 32, 3), np.zeros(192 * 34, 'u1')), "
                               "2, 0, 1, 3), g.tensor('i32', (1, 3), np.zeros(3, 'i4')))",
}


@pytest.mark.skipif(sys.platform == "win32", reason="an abort opens a dialogue")
@pytest.mark.parametrize("what", VIOLATIONS)
def test_a_broken_contract_aborts(what):
    code = ["import numpy as np", "from ggml import Graph", "g = Graph()",
            "print('ready', flush=True)", VIOLATIONS[what], "print('accepted')"]
    # without the variable ggml calls a debugger for a backtrace
    run = subprocess.run(python("\n".join(code)), env={**os.environ, "GGML_NO_BACKTRACE": "1"},
                         capture_output=True, text=True)
    assert run.stdout == "ready\n" and run.returncode != 0
    assert "GGML_ASSERT" in run.stderr
