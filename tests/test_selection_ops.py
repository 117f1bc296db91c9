"""The operators of page selection against NumPy in float64, at and around the edges of pages and parts. test_kernels.py
calls these tests for other devices."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
from ggml import Graph, row_bytes

N_CELLS = (1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 4097)
# query heads, KV heads: grouped, multi-head, multi-query, groups that do not divide by four
HEADS = ((4, 2), (3, 3), (8, 1), (7, 1), (10, 2), (32, 8))
N_THREADS = (1, 2, 3)
INF = float("inf")


class Layer:
    """K and V of one layer as a cache stores them, queries as the graph has them, and a causal mask with holes."""

    def __init__(self, kind_k="f16", kind_v="f16", size=64, size_v=None, heads=(4, 2), n_cells=65, n_tokens=1, n_stream=1,
                 seed=0, scale=1.0):
        self.kinds, self.size, self.size_v = (kind_k, kind_v), size, size_v or size
        self.n_head, self.n_head_kv = heads
        self.n_cells, self.n_tokens, self.n_stream = n_cells, n_tokens, n_stream
        self.rng = np.random.default_rng([seed, size, n_cells, n_tokens])
        shape = (n_stream, n_cells + 3, self.n_head_kv)  # three cells that the view leaves out
        self.k = oracle.random_rows(self.rng, kind_k, shape, size)
        self.v = oracle.random_rows(self.rng, kind_v, shape, self.size_v)
        self.q = (scale * self.rng.standard_normal((n_stream, n_tokens, self.n_head, size))).astype(np.float32)
        self.mask = np.zeros((n_stream, 1, n_tokens, n_cells), np.float16)

    def floats(self, which: str) -> np.ndarray:
        """float64 [n_stream, n_head_kv, n_cells, size]."""
        data, kind = (self.k, self.kinds[0]) if which == "k" else (self.v, self.kinds[1])
        return oracle.dequantise(kind, data[:, : self.n_cells]).swapaxes(1, 2)

    def rows(self, g: Graph, which: str) -> int:
        data, kind, size = (self.k, self.kinds[0], self.size) if which == "k" else (self.v, self.kinds[1], self.size_v)
        whole = g.tensor(kind, (size * self.n_head_kv, self.n_cells + 3, self.n_stream), data)
        row = row_bytes(kind, size)
        cell = row * self.n_head_kv
        return g.view_4d(whole, (size, self.n_head_kv, self.n_cells, self.n_stream), row, cell, cell * (self.n_cells + 3))

    def query(self, g: Graph) -> int:
        """[size, n_tokens, n_head, n_stream] as a view of what a projection gives."""
        return g.permute(g.tensor("f32", self.q.shape[::-1], self.q), 0, 2, 1, 3)

    def group(self, s: int, t: int, h: int) -> np.ndarray:
        n = self.n_head // self.n_head_kv
        return self.q[s, t, h * n : (h + 1) * n].astype(np.float64)


def same_for_all_threads(function, within: float = 0.0) -> np.ndarray:
    """Bit for bit, or but for an error ``within``."""
    first, *others = (function(n) for n in N_THREADS)
    assert all(other.tobytes() == first.tobytes() or error(other, first) <= within for other in others)
    return first


# --- summaries -------------------------------------------------------------------------------------------------------


def summarize(layer: Layer, page_size: int, before=None, cells=None, n_threads=1, n_spare=2) -> np.ndarray:
    """float64 [n_stream, pages + spare ones, n_head_kv, 2 * size]."""
    n_pages = -(-layer.n_cells // page_size) + n_spare
    shape = (layer.n_stream, n_pages, layer.n_head_kv, 2 * layer.size)
    with Graph() as g:
        s = g.tensor("f16", shape[::-1], np.full(shape, 7, np.float16) if before is None else before.astype(np.float16))
        c = None if cells is None else g.tensor("i64", (len(cells),), np.array(cells, np.int64))
        g.compute(g.op("summarize", s, layer.rows(g, "k"), c, page_size), n_threads=n_threads)
        return g.read(s, np.float16, shape).astype(np.float64)


LAYOUTS = [(kind, size) for kind, size in itertools.product(oracle.CACHE_TYPES, (64, 80, 96, 128, 192, 256))
           if kind in ("f32", "f16", "bf16") or size % 32 == 0]


@pytest.mark.parametrize("kind, size", LAYOUTS)
def test_summaries(kind, size):
    for n_cells, page_size in itertools.product((1, 15, 16, 17, 65), (8, 16)):
        layer = Layer(kind, size=size, n_cells=n_cells, n_stream=2)
        got = same_for_all_threads(lambda n: summarize(layer, page_size, n_threads=n))
        want = oracle.summaries(layer.floats("k"), page_size).swapaxes(1, 2)
        np.testing.assert_array_equal(got[:, : want.shape[1]], want)
        assert (got[:, want.shape[1] :] == 7).all()  # pages without cells are left alone


@pytest.mark.parametrize("page_size", (8, 16, 32, 64))
def test_only_the_pages_that_are_named(page_size):
    layer = Layer(n_cells=300, n_stream=2)
    whole = summarize(layer, page_size)
    cells = [0, 1, 2, 17, 299, 300 + 5, 300 + 299, 70, 71, 0]
    pages = {(c // 300, c % 300 // page_size) for c in cells}
    got = same_for_all_threads(lambda n: summarize(layer, page_size, cells=cells, n_threads=n))
    for s, p in itertools.product(range(2), range(-(-300 // page_size))):
        np.testing.assert_array_equal(got[s, p], whole[s, p] if (s, p) in pages else 7)


def test_rounding_is_outward():
    """Numbers that f16 cannot hold: between two, beyond the largest, below the smallest, and none at all."""
    layer = Layer("f32", size=64, heads=(1, 1), n_cells=1)
    values = np.array([1 + 2**-12, -1 - 2**-12, 70000, -70000, 1e-9, -1e-9, 0.0, -0.0, np.inf, -np.inf, 65504, 65505], np.float32)
    layer.k.view(np.float32)[0, 0, 0, : len(values)] = values
    got = summarize(layer, 16)[0, 0, 0]
    high, low = got[: len(values)], got[64 : 64 + len(values)]
    assert (high >= values).all() and (low <= values).all()
    assert high.tolist() == [1 + 2**-10, -1, INF, -65504, 2**-24, 0, 0, 0, INF, -INF, 65504, INF]
    assert low.tolist() == [1, -1 - 2**-10, 65504, -INF, 0, -(2**-24), 0, 0, INF, -INF, 65504, 65504]
    layer.k.view(np.float32)[0, 0, 0, 3] = np.nan
    got = summarize(layer, 16)[0, 0, 0]
    assert got[3] == INF and got[64 + 3] == -INF


# --- scores of pages -------------------------------------------------------------------------------------------------


def page_scores(layer: Layer, bounds: np.ndarray, n_threads=1) -> np.ndarray:
    """float32 [n_stream, n_tokens, n_head_kv, pages]; bounds [n_stream, pages, n_head_kv, 2 * size]."""
    with Graph() as g:
        result = g.op("page_scores", layer.query(g), g.tensor("f16", bounds.shape[::-1], bounds.astype(np.float16)))
        g.compute(result, n_threads=n_threads)
        return g.read(result, np.float32, (layer.n_stream, layer.n_tokens, layer.n_head_kv, bounds.shape[1]))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", (64, 80, 96, 128, 192, 256))
def test_page_scores(size, heads):
    for n_cells, n_tokens, n_stream in ((1, 1, 1), (65, 1, 2), (513, 3, 2)):
        layer = Layer(size=size, heads=heads, n_cells=n_cells, n_tokens=n_tokens, n_stream=n_stream)
        bounds = summarize(layer, 16, n_spare=0)
        got = same_for_all_threads(lambda n: page_scores(layer, bounds, n))
        for s, t, h in np.ndindex(got.shape[:3]):
            want = oracle.page_scores(layer.group(s, t, h), bounds[s, :, h])
            np.testing.assert_allclose(got[s, t, h], want, rtol=1e-5, atol=1e-4)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["f32", "f16", "bf16", "q8_0", "q4_0"]),
       power=st.integers(-12, 12), spikes=st.integers(0, 5), page_size=st.sampled_from([8, 16, 64]),
       n_cells=st.integers(1, 130), alike=st.booleans())
@example(seed=0, kind="f32", power=0, spikes=5, page_size=16, n_cells=130, alike=True)
def test_no_page_is_scored_below_its_keys(seed, kind, power, spikes, page_size, n_cells, alike):
    """The bound, for keys of any size, with outliers, and for keys that all point the query's way (where it is tight). The
    tolerance is that of a float32 sum."""
    rng = np.random.default_rng(seed)
    layer = Layer(kind, size=64, heads=(3, 1), n_cells=n_cells, seed=seed % 1000)
    if kind == "f32":
        keys = rng.standard_normal((n_cells + 3, 64)) * 2.0**power
        if alike:
            keys = np.sign(layer.q[0, 0, 0]) * np.abs(keys)
        for _ in range(spikes):
            keys[rng.integers(n_cells), rng.integers(64)] *= 10.0 ** rng.integers(-6, 7)
        layer.k.view(np.float32)[0, :, 0] = keys
    scores = page_scores(layer, summarize(layer, page_size, n_spare=0))[0, 0, 0]
    keys = layer.floats("k")[0, 0]
    q = layer.group(0, 0, 0)
    true, size = q @ keys.T, np.abs(q) @ np.abs(keys).T
    for p, score in enumerate(scores):
        part = slice(p * page_size, (p + 1) * page_size)
        assert score >= (true[:, part] - 1e-5 * size[:, part]).max()


# --- choice of pages -------------------------------------------------------------------------------------------------


def choose_pages(scores, mask, page_size, n_first, n_chosen, n_threads=1) -> np.ndarray:
    """scores [n_stream, n_tokens, n_head_kv, pages], mask [n_stream, 1, n_tokens, cells]."""
    with Graph() as g:
        result = g.op("choose_pages", g.tensor("f32", scores.shape[::-1], scores.astype(np.float32)),
                      g.tensor("f16", mask.shape[::-1], mask.astype(np.float16)), page_size, n_first, n_chosen)
        g.compute(result, n_threads=n_threads)
        return g.read(result, np.int32, (*scores.shape[:3], n_chosen))


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 2**31), n_cells=st.sampled_from([1, 15, 16, 17, 63, 64, 65, 257, 1000]),
       page_size=st.sampled_from([8, 16, 32, 64]), n_first=st.integers(0, 3), n_more=st.integers(1, 40),
       levels=st.sampled_from([1, 3, 10**6]), hidden=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]), nan=st.booleans())
def test_choice(seed, n_cells, page_size, n_first, n_more, levels, hidden, nan):
    """Ties (few levels of scores), hidden pages, holes, tokens that see nothing, NaN."""
    rng = np.random.default_rng(seed)
    n_stream, n_tokens, n_head_kv, n_pages = 2, 2, 3, -(-n_cells // page_size)
    scores = rng.integers(-levels, levels, (n_stream, n_tokens, n_head_kv, n_pages)).astype(np.float32)
    if nan:
        scores[rng.random(scores.shape) < 0.2] = np.nan
    mask = np.where(rng.random((n_stream, 1, n_tokens, n_cells)) < hidden, -INF, 0.0)
    got = same_for_all_threads(lambda n: choose_pages(scores, mask, page_size, n_first, n_first + n_more, n))
    for s, t, h in np.ndindex(got.shape[:3]):
        want = oracle.choose_pages(scores[s, t, h], mask[s, 0, t] == 0, page_size, n_first, n_first + n_more)
        np.testing.assert_array_equal(got[s, t, h], want)


def test_choice_by_hand():
    scores = np.array([0, 5, 5, 1, 9, 2, 0], np.float32).reshape(1, 1, 1, 7)
    mask = np.zeros((1, 1, 1, 7 * 8), np.float16)
    mask[..., 4 * 8 : 5 * 8] = -INF  # the best page is hidden
    assert choose_pages(scores, mask, 8, 1, 3).ravel().tolist() == [0, 2, 6]  # of two equal ones the later
    assert choose_pages(scores, mask, 8, 1, 4).ravel().tolist() == [0, 1, 2, 6]
    assert choose_pages(scores, mask, 8, 0, 1).ravel().tolist() == [6]
    assert choose_pages(scores, mask, 8, 1, 8).ravel().tolist() == [0, 1, 2, 3, 5, 6, -1, -1]
    mask[..., 7:] = -INF
    assert choose_pages(scores, mask, 8, 1, 3).ravel().tolist() == [0, -1, -1]


# --- attention -------------------------------------------------------------------------------------------------------


def attend(layer: Layer, pages=None, sinks=None, page_size=16, scale=0.125, softcap=0.0, n_threads=1) -> np.ndarray:
    """float32 [n_stream, n_tokens, n_head, size of V]."""
    with Graph() as g:
        result = g.op("attn", layer.query(g), layer.rows(g, "k"), layer.rows(g, "v"),
                      g.tensor("f16", layer.mask.shape[::-1], layer.mask),
                      None if pages is None else g.tensor("i32", pages.shape[::-1], pages.astype(np.int32)),
                      None if sinks is None else g.tensor("f32", sinks.shape, sinks.astype(np.float32)),
                      page_size, scale, softcap)
        g.compute(result, n_threads=n_threads)
        return g.read(result, np.float32, (layer.n_stream, layer.n_tokens, layer.n_head, layer.size_v))


def expected(layer: Layer, pages=None, sinks=None, page_size=16, scale=0.125, softcap=0.0) -> np.ndarray:
    keys, values = layer.floats("k"), layer.floats("v")
    out = np.zeros((layer.n_stream, layer.n_tokens, layer.n_head, layer.size_v))
    n = layer.n_head // layer.n_head_kv
    for s, t, head in np.ndindex(out.shape[:3]):
        h = head // n
        mask = layer.mask[s, 0, t].astype(np.float64)
        if pages is not None:
            chosen = np.isin(np.arange(layer.n_cells) // page_size, pages[s, t, h][pages[s, t, h] >= 0])
            mask = np.where(chosen, mask, -INF)
        seen = mask > -INF
        out[s, t, head] = oracle.attention(layer.q[s, t, head].astype(np.float64), keys[s, h][seen], values[s, h][seen],
                                           mask[seen], scale, softcap, None if sinks is None else float(sinks[head]))
    return out


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Normalised mean squared error."""
    return float(((got - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def random_pages(layer: Layer, page_size: int, share: float) -> np.ndarray:
    n_pages = -(-layer.n_cells // page_size)
    n_chosen = max(1, int(share * n_pages))
    pages = np.full((layer.n_stream, layer.n_tokens, layer.n_head_kv, n_chosen + 1), -1, np.int32)
    for s, t, h in np.ndindex(pages.shape[:3]):
        pages[s, t, h, :n_chosen] = np.sort(layer.rng.choice(n_pages, n_chosen, replace=False))
    return pages


@pytest.mark.parametrize("n_cells", N_CELLS)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_on_any_number_of_cells(heads, n_cells, within=0.0):
    for n_tokens, n_stream in ((1, 1), (2, 2)):
        layer = Layer(heads=heads, n_cells=n_cells, n_tokens=n_tokens, n_stream=n_stream)
        if n_cells > 1:
            layer.mask[..., layer.rng.random(layer.mask.shape[-1]) < 0.3] = -INF
        dense = same_for_all_threads(lambda n: attend(layer, n_threads=n), within)
        assert error(dense, expected(layer)) <= 1e-6
        for page_size, share in ((16, 0.3), (8, 0.6)):
            pages = random_pages(layer, page_size, share)
            got = same_for_all_threads(lambda n: attend(layer, pages, page_size=page_size, n_threads=n), within)
            assert error(got, expected(layer, pages, page_size=page_size)) <= 1e-6


@pytest.mark.parametrize("kind_v", oracle.CACHE_TYPES)
@pytest.mark.parametrize("kind_k", oracle.CACHE_TYPES)
def test_attention_on_every_type(kind_k, kind_v):
    layer = Layer(kind_k, kind_v, size=64, n_cells=145)
    assert error(attend(layer), expected(layer)) <= 1e-6
    pages = random_pages(layer, 16, 0.5)
    assert error(attend(layer, pages), expected(layer, pages)) <= 1e-6


@pytest.mark.parametrize("size, size_v", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (64, 72)])
def test_attention_of_every_head_size(size, size_v):
    layer = Layer("f16", "f16", size=size, size_v=size_v, n_cells=100, heads=(6, 2))
    assert error(attend(layer), expected(layer)) <= 1e-6


def test_soft_cap_and_sinks():
    layer = Layer(n_cells=600, heads=(8, 2), n_tokens=2, scale=3.0)
    layer.mask[0, 0, 1, 300:] = -INF
    sinks = np.linspace(-3, 14, 8)
    pages = random_pages(layer, 16, 0.4)
    for arguments in (dict(softcap=5.0), dict(sinks=sinks), dict(sinks=sinks, softcap=2.0, pages=pages), dict(scale=0.02)):
        got, want = attend(layer, **arguments), expected(layer, **arguments)
        assert error(got, want) <= 1e-6
        assert error(attend(layer), want) > 1e-3  # it makes a difference


def test_tokens_that_see_nothing():
    layer = Layer(n_cells=40, n_tokens=3, heads=(4, 2))
    layer.mask[0, 0, 1] = -INF
    got = attend(layer)
    assert (got[0, 1] == 0).all() and error(got, expected(layer)) <= 1e-6
    assert (attend(layer, np.full((1, 3, 2, 4), -1, np.int32)) == 0).all()
    sinks = np.ones(4)
    assert (attend(layer, sinks=sinks)[0, 1] == 0).all()


def test_all_pages_are_dense_attention():
    """Bit for bit: the same parts in the same order."""
    layer = Layer(n_cells=1500, heads=(9, 3), n_tokens=2)
    pages = np.broadcast_to(np.arange(94, dtype=np.int32), (1, 2, 3, 94))
    np.testing.assert_array_equal(attend(layer, pages), attend(layer))


def test_large_scores_do_not_overflow():
    layer = Layer(n_cells=700, scale=300.0)
    assert error(attend(layer, scale=1.0), expected(layer, scale=1.0)) <= 1e-6
