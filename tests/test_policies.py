"""Policies that look at more than keys and filters, and evictions by other settings than the context's own."""

import functools

import numpy as np
import pytest

import oracle
import oracle_snapkv
from edgekv import native
from edgekv import session as session_module
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.settings import POLICIES, EvictionSettings
from tinymodel import write_tiny_model

Session = functools.partial(session_module.Session, n_threads=1)
ON_DEMAND = EvictionSettings("streaming", 8, 0, 0, "prompt")


@pytest.fixture(scope="module", params=[("llama", 32), ("llama", 64), ("gemma3", 32)], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request, tmp_path_factory):
    arch, head_size = request.param
    return write_tiny_model(tmp_path_factory.mktemp("policies") / "tiny.gguf", n_head=4, n_head_kv=2, n_embd=64,
                            head_size=head_size, arch=arch, scale=2.0)


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([n, seed]).integers(0, 320, n)


def keys(session, seq_id: int = 0, kind: str = "f16") -> list[np.ndarray]:
    """Per cache layer float64 [n_head_kv, n_used, head_size], as they are stored."""
    return [np.stack([oracle.dequantise(kind, session.rows(i, h, seq_id, values=False))
                      for h in range(layer.n_head_kv)]) for i, layer in enumerate(session.layers())]


def kept(session, seq_id: int = 0) -> list[np.ndarray]:
    return [np.stack([session.positions(i, h, seq_id) for h in range(layer.n_head_kv)])
            for i, layer in enumerate(session.layers())]


def filters(session, seed: int = 3) -> QFilters:
    rng = np.random.default_rng(seed)
    layers = session.layers()
    return QFilters([rng.standard_normal((layer.n_head_kv, layer.head_size_k)).astype(np.float32) for layer in layers],
                    [layer.il for layer in layers])


def fill(session, n: int, step: int = 48) -> None:
    text = tokens(1024)[:n]
    for pos in range(0, n, step):
        session.decode(text[pos:pos + step], pos)


# --- SnapKV ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [("f16", "f16", False), ("f16", "f16", True), ("q8_0", "q8_0", True)], ids=str)
@pytest.mark.parametrize("window", (5, 64, 90))
def test_snapkv_against_float64(model, cache, window):
    """The runtime's choice is the oracle's, which a test proves against the published library; but for scores that are
    equal within float32 (and f16 products of a quantised cache)."""
    type_k, type_v, flash_attn = cache
    n, budget = 200, 120
    scale = 1.0 if "gemma3" in model.read_bytes()[:400].decode("latin1") else None  # it scales its queries itself
    with Session(model, n_ctx=512, n_ubatch=64, flash_attn=flash_attn, type_k=type_k, type_v=type_v, tap_queries=True,
                 settings=EvictionSettings("snapkv", budget, window, 3, "prompt")) as s:
        fill(s, n, step=40)  # the last 64 queries come from two ubatches
        # the tap hands over those of the last ubatch only: read them in a twin, all at once
        with Session(model, n_ctx=512, n_ubatch=64, flash_attn=flash_attn, type_k=type_k, type_v=type_v,
                     tap_queries=True) as twin:
            twin.read(tokens(1024)[:n - 128])
            twin.read(tokens(1024)[n - 128:n - 64], n - 128)
            twin.decode(tokens(1024)[n - 64:n], n - 64)
            queries = [native.last_step(twin.ctx, i)[0] for i in range(len(twin.layers()))]
        stored = keys(s, kind=type_k)
        assert s.evict() == n - budget
        for layer, q, k, found in zip(s.layers(), queries, stored, kept(s)):
            n_queries = min(64, window)
            q = np.stack([oracle.rotated(h[None], type_k == "q8_0")[0] for h in q[-n_queries:].transpose(1, 0, 2)]
                         ) if type_k == "q8_0" else q[-n_queries:].transpose(1, 0, 2)
            behind = np.zeros((k.shape[0], n_queries))
            scores = np.concatenate([oracle_snapkv.scores(q, k, scale=scale), behind], axis=1)
            for head in range(layer.n_head_kv):
                ours = oracle.choose(scores[head], 3, window, budget)
                differ = np.setxor1d(ours, found[head])
                edge = np.sort(scores[head][3:n - window])[::-1][budget - 3 - window - 1] if budget > 3 + window else 0
                near = (0.02 if type_k == "f16" else 0.05) * edge
                assert len(differ) <= 8 and (np.abs(scores[head][differ] - edge) <= near).all()


def test_snapkv_sees_the_last_queries_of_its_own_sequence(model):
    """Two sequences in one batch, tails removed, sequences copied: as if each had been read by itself."""
    settings = EvictionSettings("snapkv", 60, 20, 2)
    options = dict(n_ctx=512, n_ubatch=32, settings=settings)
    text, other = tokens(200), tokens(200, 9)
    with Session(model, n_seq_max=2, **options) as both, Session(model, **options) as alone:
        for pos in range(0, 192, 32):
            both.decode(other[pos:pos + 32], pos, 1)
            both.decode(text[pos:pos + 32], pos, 0)
            alone.decode(text[pos:pos + 32], pos)
        for session in (both, alone):
            session.decode(other[:7], 192)  # another end, which is taken back
            assert session.remove(192)
            session.decode(text[192:], 192)
        both.copy(0, 1)
        for session, seq_id in ((both, 0), (both, 1), (alone, 0)):
            session.evict(seq_id, 40)
        for found in (kept(both, 0), kept(both, 1)):
            for a, b in zip(found, kept(alone)):
                np.testing.assert_array_equal(a, b)


def test_snapkv_needs_queries(model):
    with pytest.raises(EdgekvError, match="looks at the queries of the window: give one"):
        Session(model, n_ctx=512, n_ubatch=64, settings=EvictionSettings("snapkv", 50, 0, 4, "prompt"))
    with Session(model, n_ctx=512, n_ubatch=64, settings=EvictionSettings("snapkv", 50, 9, 4, "prompt")) as s:
        fill(s, 100)
        with pytest.raises(EdgekvError, match="snapkv"):
            s.save()
    with Session(model, n_ctx=512, n_ubatch=64, settings=ON_DEMAND) as s:
        fill(s, 100)
        with pytest.raises(EdgekvError, match="create it with tap_queries"):
            s.evict_as(EvictionSettings("snapkv", 50, 10, 4, "prompt"))


def test_snapkv_after_a_window_was_taken_back(model):
    """More than the 64 tokens whose queries are looked at: those of the tokens before are still there."""
    with Session(model, n_ctx=1024, n_ubatch=128, settings=EvictionSettings("snapkv", 256, 120, 4)) as s:
        fill(s, 420, 60)
        assert s.stats().n_evictions and s.remove(420 - 100)
        fill_on = tokens(300, 1)
        for pos in range(320, 620, 100):
            s.decode(fill_on[pos - 320:pos - 220], pos)
        assert s.stats().tokens_seen == 620


# --- scores of the host ----------------------------------------------------------------------------------------------


def test_random_is_a_sample_of_all_tokens(model):
    """Evictions one after the other keep what one eviction of everything keeps: the best-ranked of all tokens, which
    differ between heads and layers and are spread evenly."""
    n, budget = 600, 200
    always, at_once = (EvictionSettings("random", budget, 0, 0, mode) for mode in ("bounded", "prompt"))
    with Session(model, n_ctx=1024, n_ubatch=32, settings=always) as many, \
            Session(model, n_ctx=1024, n_ubatch=32, settings=at_once) as once:
        for session in (many, once):
            fill(session, n, 32)
            session.evict()
        assert many.stats().n_evictions > 5 and once.stats().n_evictions == 1
        sets = []
        for a, b in zip(kept(many), kept(once)):
            np.testing.assert_array_equal(a, b)
            sets += list(a)
        for a in sets:
            assert abs(a.mean() - n / 2) < 5 * n / np.sqrt(12 * budget)
        for i, a in enumerate(sets):
            for b in sets[:i]:  # a share of budget / n in common, as chance has it
                assert abs(len(np.intersect1d(a, b)) - budget**2 / n) < 5 * np.sqrt(budget**2 / n)


def test_given_scores(model):
    rng = np.random.default_rng(0)
    with Session(model, n_ctx=512, n_ubatch=64, settings=ON_DEMAND) as s:
        fill(s, 150)
        scores = [rng.standard_normal((layer.n_head_kv, 150)).astype(np.float32) for layer in s.layers()]
        how = EvictionSettings("given", 70, 9, 2, "prompt")
        for wrong in (None, scores[:1] if len(scores) > 1 else [scores[0][:1]], [x[:, :149] for x in scores]):
            with pytest.raises(EdgekvError, match="scores were given, and the sequence has"):
                s.evict_as(how, scores=wrong)
        assert s.stats().cells_used == 150
        assert s.evict_as(how, scores=scores) == 80
        for found, wanted in zip(kept(s), scores):
            for head, row in zip(found, wanted):
                np.testing.assert_array_equal(head, oracle.choose(row.astype(np.float64), 2, 9, 70))


# --- other settings than the context's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
def test_evicting_a_copy_by_other_settings(model, policy):
    """Bit for bit what a context with these settings does, and the sequence that was copied stays as it was."""
    n, settings = 220, EvictionSettings(policy, 90, 17, 5, "prompt")
    with Session(model, n_ctx=512, n_ubatch=64, n_seq_max=2, settings=ON_DEMAND, tap_queries=True) as shared:
        vectors = filters(shared) if "qfilters" in policy else None
        fill(shared, n)
        before = keys(shared)
        shared.copy(0, 1)
        assert shared.evict_as(settings, vectors, 1) == n - 90
        assert shared.evict_as(settings, vectors, 1) == 0  # fits already
        for a, b in zip(before, keys(shared)):
            np.testing.assert_array_equal(a, b)
        with Session(model, n_ctx=512, n_ubatch=64, settings=settings, filters=vectors) as own:
            fill(own, n)
            own.evict()
            assert own.stats().floor == shared.stats(1).floor == n - 17
            for a, b in zip(kept(own), kept(shared, 1)):
                np.testing.assert_array_equal(a, b)
            for i, layer in enumerate(own.layers()):
                for h in range(layer.n_head_kv):
                    for values in (False, True):
                        a, b = own.rows(i, h, values=values), shared.rows(i, h, 1, values=values)
                        np.testing.assert_array_equal(a, b)
            a, b = own.decode([7, 8], n, logits="all"), shared.decode([7, 8], n, 1, logits="all")
            np.testing.assert_array_equal(a, b)


def test_other_settings_are_refused(model):
    with Session(model, n_ctx=512, n_ubatch=64, settings=EvictionSettings("streaming", 100, 8, 4)) as s:
        fill(s, 64)
        with pytest.raises(EdgekvError, match='mode "prompt"'):
            s.evict_as(EvictionSettings("knorm", 20, 4, 4, "prompt"))
    with Session(model, n_ctx=512, n_ubatch=64, settings=ON_DEMAND) as s:
        fill(s, 64)
        with pytest.raises(EdgekvError, match="evicts nothing"):
            s.evict_as(EvictionSettings())
        with pytest.raises(EdgekvError, match="needs filters"):
            s.evict_as(EvictionSettings("qfilters", 20, 4, 4, "prompt"))
        with pytest.raises(EdgekvError, match="exceed the budget"):
            s.evict_as(EvictionSettings("knorm", 20, 18, 4, "prompt"))
        with pytest.raises(EdgekvError, match="do not fit the model"):
            s.evict_as(EvictionSettings("qfilters", 20, 4, 4, "prompt"), QFilters([np.ones((1, 8), np.float32)], [1]))
        with pytest.raises(EdgekvError, match="no sequence 3"):
            s.evict_as(EvictionSettings("knorm", 20, 4, 4, "prompt"), seq_id=3)
        assert s.stats().cells_used == 64
