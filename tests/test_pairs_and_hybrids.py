"""Models of which only a part is evicted from: sliding-window pairs (gemma3) and hybrids (lfm2), tiny and random.

What is kept is compared with the NumPy model of the rule; what the other half does, with contexts in which nothing was
evicted or removed.
"""

import functools

import numpy as np
import pytest

import oracle
from edgekv import native
from edgekv import session as session_module
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.settings import EvictionSettings, needs_filters
from test_eviction import contents, decode_both, figures, tokens
from tinymodel import write_tiny_model

import llama_cpp  # last: edgekv says which library it loads

N_SWA = 32
Session = functools.partial(session_module.Session, n_threads=1, n_ctx=1024, n_ubatch=16, n_seq_max=2)
KNORM = EvictionSettings("knorm", 40, 10, 4)
AMPLE = EvictionSettings("knorm", 1024, 10, 4)  # nothing is ever evicted

ARCHITECTURES = {"gemma3": dict(n_layer=4, n_swa=N_SWA), "lfm2": dict(n_layer=4, n_embd=128)}
FULL = [1, 3]  # the layers that are evicted from, in both


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return {arch: write_tiny_model(folder / f"{arch}.gguf", arch=arch, **shape) for arch, shape in ARCHITECTURES.items()}


@pytest.fixture(params=ARCHITECTURES)
def model(models, request):
    return models[request.param]


def test_which_layers(models):
    assert native.swa_layers(models["gemma3"]) == [0, 2] and native.swa_layers(models["lfm2"]) == []
    for path in models.values():
        with Session(path, settings=KNORM) as s:
            assert [layer.il for layer in s.layers()] == FULL


@pytest.mark.parametrize("flash_attn", (False, True))
@pytest.mark.parametrize("policy", ("qfilters", "streaming", "knorm", "keydiff", "kvdiff", "kvdiff+qfilters+recency"))
def test_the_rule(model, policy, flash_attn):
    """Two sequences, alone and in one batch, over many evictions and tails taken back."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((2, 2, 32)).astype(np.float32)
    settings = EvictionSettings(policy, 40, 10, 4)
    # the file's filters may be for more layers than are evicted from
    filters = QFilters([rng.standard_normal((2, 32)), vectors[0], vectors[1]], [0, *FULL])
    if "lfm2" in str(model):
        filters = QFilters(list(vectors), FULL)
    with Session(model, settings=settings, filters=filters, flash_attn=flash_attn) as s:
        shapes = [(layer.n_head_kv, layer.k_row_bytes, layer.v_row_bytes) for layer in s.layers()]
        rules = [oracle.Rule(policy, 40, 10, 4, 16, 1024, "f16", "f16", shapes, vectors if needs_filters(policy) else None)
                 for _ in range(2)]

        def follow(seq_id, n, due):
            rule = rules[seq_id]
            if due:
                rule.evict(40, lambda layer, h: s.positions(layer, h, seq_id)[:-n])
            rule.append(n, lambda layer, h: [s.rows(layer, h, seq_id, values=v)[-n:] for v in (False, True)])

        for step in range(60):
            n = int(rng.integers(1, 17))
            if step % 3 == 2:
                n = min(n, 8)
                due = [rule.due(n) for rule in rules]
                parts = rng.integers(0, 320, (2, n))
                assert decode_both(s, parts[0], rules[0].n_past, parts[1], rules[1].n_past) == 0
                follow(0, n, due[0])
                follow(1, n, due[1])
            else:
                seq_id = step % 2
                due = rules[seq_id].due(n)
                s.decode(rng.integers(0, 320, n), rules[seq_id].n_past, seq_id)
                follow(seq_id, n, due)
            if step % 7 == 6:
                back = int(rng.integers(1, 12))
                rule, before = rules[0], (contents(s), figures(s))
                p0 = rule.n_past - back
                floor = s.stats(0).floor
                assert floor >= rule.floor
                removed = s.remove(p0)
                assert removed == (p0 >= floor)
                if removed:
                    rule.remove(p0, -1)
                else:
                    assert (contents(s), figures(s)) == before
            for seq_id, rule in enumerate(rules):
                stats = s.stats(seq_id)
                assert (stats.cells_used, stats.tokens_seen, stats.n_evictions) == (rule.used, rule.n_past, rule.n_evictions)
                for (layer, h), head in rule.heads.items():
                    np.testing.assert_array_equal(s.positions(layer, h, seq_id), head.positions)
                    np.testing.assert_array_equal(s.rows(layer, h, seq_id, values=False), head.k)
                    np.testing.assert_array_equal(s.rows(layer, h, seq_id, values=True), head.v)
        assert min(rule.n_evictions for rule in rules) > 5


def test_memory_of_a_pair(models):
    """By hand: 2 KV heads of 32 f16 for K and V, 256 bytes a layer and cell; two layers in each half."""
    with Session(models["gemma3"], settings=KNORM) as s, Session(models["gemma3"]) as stock:
        # full attention: pad(40 + 16, 256) cells; sliding window: pad(32 + 10 + 16, 256), not the whole context
        assert s.stats().kv_bytes == 2 * 256 * (2 * 256 + 2 * 256)
        # the bindings' default is swa_full
        assert stock.stats().kv_bytes == 2 * 256 * (2 * 1024 + 2 * 1024)
    with Session(models["gemma3"], settings=EvictionSettings("knorm", 40, 10, 4), n_ubatch=300) as s:
        assert s.stats().kv_bytes == 2 * 256 * (2 * 512 + 2 * 512)
    with Session(models["gemma3"], settings=EvictionSettings("knorm", 600, 10, 4)) as s:
        assert s.stats().kv_bytes == 2 * 256 * (2 * 768 + 2 * 256)


def test_budgets_in_bytes_count_the_layers_that_are_evicted_from(models):
    """Two of four layers, 256 bytes each: 512 bytes a token."""
    from edgekv.llama import Llama

    llama = Llama(models["gemma3"], n_ctx=1024, n_threads=1, n_batch=16, n_ubatch=16, kv_evict="knorm", kv_budget="25600B")
    assert llama.eviction.budget == 50
    llama = Llama(models["lfm2"], n_ctx=1024, n_threads=1, n_batch=16, n_ubatch=16, kv_evict="knorm", kv_budget="25.6kB")
    assert llama.eviction.budget == 50


def test_window_of_a_pair_is_exact(models):
    """Where nothing is evicted, every removal that is granted leaves what a context has that never read the tail."""
    text = tokens(500)
    for back in (None, 3, 0):
        with Session(models["gemma3"], settings=AMPLE) as s, Session(models["gemma3"]) as twin:
            s.read(text)
            floor = s.stats(0).floor
            assert 0 < floor <= 500 - 10  # a window's worth can always be taken back
            before = contents(s)
            assert not s.remove(floor - 1) and contents(s) == before
            assert f"its floor is {floor}" in native.last_error()
            p0 = 495 if back is None else floor + back
            assert s.remove(p0)
            twin.read(text[:p0])
            np.testing.assert_allclose(*(x.decode(tokens(8, p0), p0, logits="all") for x in (s, twin)), atol=2e-4)


def test_tails_above_the_floor_can_always_be_taken_back(models):
    """However long ago the last eviction was, the sliding-window half still has what the rule promises. (After a removal
    it may have less, since the cells that became free need not be the next ones to be filled; then it says so.)"""
    rng = np.random.default_rng(0)
    # sliding window: 32 + 156 + 68 = 256 cells, to the cell
    with Session(models["gemma3"], settings=EvictionSettings("knorm", 300, 68, 4), n_ubatch=156, n_ctx=4096) as s:
        pos, floor, n_evictions = 0, 0, 0
        while pos < 3800:
            n = int(rng.integers(1, 157))
            s.decode(tokens(n, pos), pos)
            if s.stats(0).n_evictions > n_evictions:
                n_evictions, floor = n_evictions + 1, max(floor, pos - 68)
            pos += n
            if n_evictions:
                assert s.stats(0).floor == floor
        assert n_evictions > 10 and s.remove(floor)


def test_the_recurrent_half_cannot_roll_back(models):
    with Session(models["lfm2"], settings=KNORM) as s, Session(models["lfm2"], settings=KNORM) as twin:
        for session in (s, twin):
            session.read(tokens(200))
        before = contents(s), figures(s)
        for p0, p1 in ((199, -1), (0, 100), (10, 20)):
            assert not s.remove(p0, p1) and native.last_error()
        assert (contents(s), figures(s)) == before and s.stats(0).floor == 200
        assert s.remove(200) and s.remove(300, 400)
        np.testing.assert_array_equal(*(x.decode(tokens(8, 5), 200, logits="all") for x in (s, twin)))
        assert s.remove(0) and figures(s)[:3] == (0, 0, 0)
        s.read(tokens(30, 2))
        with Session(models["lfm2"], settings=KNORM) as fresh:
            fresh.read(tokens(30, 2))
            np.testing.assert_array_equal(*(x.decode(tokens(8, 6), 30, logits="all") for x in (s, fresh)))


def test_copies_and_states(model):
    """A copy in the other stream, and a state in a new context, go on as the original does."""
    with Session(model, settings=KNORM) as s, Session(model, settings=KNORM) as whole, Session(model, settings=KNORM) as one:
        s.read(tokens(300))
        s.copy(0, 1)
        assert native.last_error() == "" and contents(s, 0) == contents(s, 1) and figures(s, 0) == figures(s, 1)
        whole.load(s.save())
        one.load(s.save(0), 1)
        assert contents(whole, 0) == contents(one, 1) == contents(s, 0)
        assert figures(whole) == figures(s)
        for pos in range(300, 360, 12):
            runs = [x.decode(tokens(12, pos), pos, seq_id, logits="all")
                    for x, seq_id in ((s, 0), (s, 1), (whole, 0), (one, 1))]
            for run in runs[1:]:  # the cells of a window are in another order after a load
                np.testing.assert_allclose(run, runs[0], atol=2e-4)
        native.clear_error()
        s.copy(0, 1, 0, 100)
        assert "only whole sequences" in native.last_error()
        s.copy(0, 2)
        assert "only 2 sequences" in native.last_error()


def test_positions_cannot_be_shifted(model):
    with Session(model, settings=KNORM) as s:
        s.read(tokens(100))
        before = contents(s), figures(s)
        for call in (lambda: llama_cpp.llama_memory_seq_add(s.memory, 0, 50, -1, -10),
                     lambda: llama_cpp.llama_memory_seq_div(s.memory, 0, 0, -1, 2)):
            native.clear_error()
            call()
            assert "positions cannot be shifted" in native.last_error()
        assert (contents(s), figures(s)) == before
        assert not llama_cpp.llama_memory_can_shift(s.memory)


def test_damaged_states_change_neither_half(model):
    with Session(model, settings=KNORM) as s, Session(model, settings=KNORM) as twin:
        for session in (s, twin):
            session.read(tokens(300))
        for seq_id in (None, 0):
            state = s.save(seq_id)
            for n in (100, len(state) // 2, len(state) - 9, len(state) - 1):
                with pytest.raises(EdgekvError):
                    s.load(state[:n], seq_id)
                flipped = bytearray(state)
                flipped[n] ^= 4
                with pytest.raises(EdgekvError):
                    s.load(bytes(flipped), seq_id)
        np.testing.assert_array_equal(*(x.decode(tokens(8, 5), 300, logits="all") for x in (s, twin)))


def test_calibration_sees_the_layers_that_are_evicted_from(model):
    with Session(model, n_ctx=512, tap_queries=True) as s:
        s.read(tokens(64))
        for i in range(2):
            moment, total, n = native.tap(s.ctx, i, 0, 32)
            assert n == 64 and np.linalg.matrix_rank(moment) > 10
