"""Eviction on tiny random models, against the NumPy model of the whole rule and against unevicted twins."""

import copy
import functools
import os
import subprocess

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import oracle
from edgekv import native
from edgekv import session as session_module
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.session import CACHE_TYPES
from edgekv.settings import EvictionSettings, needs_filters
from process import python
from tinymodel import write_tiny_model

import llama_cpp  # last: edgekv says which library it loads

# threads wait for each other by spinning: with models this small a busy machine would do nothing else
Session = functools.partial(session_module.Session, n_threads=1)

POLICIES = ("qfilters", "streaming", "knorm", "keydiff", "kvdiff", "qfilters+keydiff", "kvdiff+qfilters+recency")
# K, V, flash attention: V as rows and transposed, K as it is and rotated (quantised, head size 64)
CACHES = [("f16", "f16", False), ("f16", "f16", True), ("f32", "bf16", False), ("q8_0", "f16", False),
          ("q8_0", "q8_0", True), ("q4_0", "q4_0", True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eviction")
    return {32: write_tiny_model(folder / "32.gguf", n_head=4, n_head_kv=2, head_size=32),
            64: write_tiny_model(folder / "64.gguf", n_head=3, n_head_kv=3, head_size=64, seed=1)}


@pytest.fixture(scope="module")
def model(models):
    return models[32]


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([n, seed]).integers(0, 320, n)


def every_head(session):
    return [(i, h) for i, layer in enumerate(session.layers()) for h in range(layer.n_head_kv)]


def contents(session, seq_id: int = 0) -> list[bytes]:
    """Everything a sequence holds."""
    result = []
    for i, h in every_head(session):
        result.append(session.positions(i, h, seq_id).tobytes())
        result.extend(session.rows(i, h, seq_id, values=values).tobytes() for values in (False, True))
    return result


def figures(session, seq_id: int = 0) -> tuple[int, int, int, int]:
    stats = session.stats(seq_id)
    return stats.cells_used, stats.tokens_seen, stats.floor, stats.n_evictions


def decode_both(session, first, pos_first: int, second, pos_second: int) -> int:
    """One llama_decode with tokens of the sequences 0 and 1."""
    batch = session._batch
    entries = [(t, pos_first + i, 0) for i, t in enumerate(first)] + [(t, pos_second + i, 1) for i, t in enumerate(second)]
    batch.n_tokens = len(entries)
    for i, (token, pos, seq_id) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), pos, 1, False
        batch.seq_id[i][0] = seq_id
    return llama_cpp.llama_decode(session.ctx, batch)


# --- the whole rule --------------------------------------------------------------------------------------------------


class Twins:
    """A session with two sequences, and what NumPy says that it should hold."""

    def __init__(self, path, head_size, policy, mode, budget, window, keep, n_ubatch, n_ctx, cache, seed):
        self.rng = np.random.default_rng(seed)
        type_k, type_v, flash_attn = cache
        self.saved = []
        n_head_kv = {32: 2, 64: 3}[head_size]  # see models()
        filters = self.rng.standard_normal((2, n_head_kv, head_size)).astype(np.float32) if needs_filters(policy) else None
        self.open = functools.partial(
            Session, path, n_ctx=n_ctx, n_ubatch=n_ubatch, n_seq_max=2, type_k=type_k, type_v=type_v,
            flash_attn=flash_attn, filters=None if filters is None else QFilters(list(filters), [0, 1]),
            settings=EvictionSettings(policy, budget, window, keep, mode))
        self.session = self.open()
        shapes = [(layer.n_head_kv, layer.k_row_bytes, layer.v_row_bytes) for layer in self.session.layers()]
        if filters is not None:
            filters = oracle.rotated(filters, type_k not in ("f32", "f16", "bf16"))
        self.rules = [oracle.Rule(policy, budget, window, keep, n_ubatch, n_ctx, type_k, type_v, shapes, filters,
                                  bounded=mode == "bounded") for _ in range(2)]
        cells = min(n_ctx, (min(n_ctx, budget + n_ubatch) + 255) // 256 * 256)
        assert self.session.stats().cells_allocated == (cells if mode == "bounded" else n_ctx)

    def check(self) -> None:
        for seq_id, rule in enumerate(self.rules):
            assert figures(self.session, seq_id) == (rule.used, rule.n_past if rule.used else 0, rule.floor, rule.n_evictions)
            for (layer, h), head in rule.heads.items():
                np.testing.assert_array_equal(self.session.positions(layer, h, seq_id), head.positions)
                np.testing.assert_array_equal(self.session.rows(layer, h, seq_id, values=False), head.k)
                np.testing.assert_array_equal(self.session.rows(layer, h, seq_id, values=True), head.v)

    def follow(self, seq_id: int, n: int, due: bool) -> None:
        """What a ubatch of n tokens does to a sequence."""
        rule, session = self.rules[seq_id], self.session
        if due:
            rule.evict(rule.budget, lambda layer, h: session.positions(layer, h, seq_id)[:-n])
        rule.append(n, lambda layer, h: [session.rows(layer, h, seq_id, values=values)[-n:] for values in (False, True)])

    def decode(self, seq_id: int, n: int) -> None:
        rule = self.rules[seq_id]
        due = rule.due(n)
        code = self.session.try_decode(self.rng.integers(0, 320, n), rule.n_past, seq_id)
        assert (code == 0) == rule.fits(n)
        if code == 0:
            self.follow(seq_id, n, due)
        else:
            event("context full")
            assert "context is full" in native.last_error()

    def both(self, n: int) -> None:
        """n tokens of each sequence, in one ubatch."""
        if not all(rule.fits(n) for rule in self.rules):
            return
        due = [rule.due(n) for rule in self.rules]
        parts = self.rng.integers(0, 320, (2, n))
        assert decode_both(self.session, parts[0], self.rules[0].n_past, parts[1], self.rules[1].n_past) == 0
        for seq_id in range(2):
            self.follow(seq_id, n, due[seq_id])

    def remove(self, seq_id: int, p0: int, p1: int) -> None:
        chosen = self.rules if seq_id < 0 else [self.rules[seq_id]]
        allowed = all(rule.removable(p0, p1) for rule in chosen)
        native.clear_error()
        assert self.session.remove(p0, p1, seq_id) == allowed
        assert bool(native.last_error()) == (not allowed)
        event(f"removal {'done' if allowed else 'refused'}")
        if allowed:
            for rule in chosen:
                rule.remove(p0, p1)

    def evict(self, seq_id: int, budget: int) -> None:
        rule, session = self.rules[seq_id], self.session
        wanted = budget or rule.budget
        if rule.keep + rule.window > wanted:
            with pytest.raises(EdgekvError, match="exceed the budget"):
                session.evict(seq_id, budget)
            return
        before = rule.used
        assert session.evict(seq_id, budget) == max(0, before - wanted)
        if before > wanted:
            rule.evict(wanted, lambda layer, h: session.positions(layer, h, seq_id))

    def set_keep(self, seq_id: int, keep: int) -> None:
        rule = self.rules[0]
        if keep + rule.window > rule.budget:
            with pytest.raises(EdgekvError, match="exceed the budget"):
                native.set_keep(self.session.ctx, keep, seq_id)
        else:
            native.set_keep(self.session.ctx, keep, seq_id)
            for rule in self.rules if seq_id == -1 else [self.rules[seq_id]]:
                rule.keep = keep

    def copy(self, src: int) -> None:
        self.session.copy(src, 1 - src)
        assert native.last_error() == ""
        self.rules[1 - src] = copy.deepcopy(self.rules[src])

    def save(self, seq_id: int | None) -> None:
        self.saved.append((seq_id, self.session.save(seq_id), copy.deepcopy(self.rules)))

    def load(self, which: int, seq_id: int) -> None:
        """One of the saved states: a sequence's goes into either sequence, wherever it comes from."""
        if not self.saved:
            return
        source, state, rules = self.saved[which % len(self.saved)]
        rules = copy.deepcopy(rules)
        if source is None:
            with pytest.raises(EdgekvError, match="wrong sequence state magic"):
                self.session.load(state, seq_id)
            self.check()
            self.session.load(state)
            self.rules = rules
        else:
            with pytest.raises(EdgekvError, match="not that of a whole context"):
                self.session.load(state)
            self.check()
            self.session.load(state, seq_id)
            rules[source].keep = self.rules[seq_id].keep  # is not part of it
            self.rules[seq_id] = rules[source]
        event("loaded")

    def move(self) -> None:
        """Go on in a new context."""
        state = self.session.save()
        self.session.close()
        self.session = self.open()
        self.session.load(state)
        assert self.session.save() == state

    def clear(self) -> None:
        self.session.clear()
        for rule in self.rules:
            rule.clear()


@st.composite
def cases(draw):
    n_ubatch = draw(st.integers(2, 40))
    budget = draw(st.integers(1, 200 if draw(st.booleans()) else 30))
    window = draw(st.integers(0, budget))
    keep = draw(st.integers(0, budget - window))
    config = dict(head_size=draw(st.sampled_from([32, 64])), policy=draw(st.sampled_from(POLICIES)),
                  mode=draw(st.sampled_from(["bounded"] * 4 + ["prompt"])), budget=budget, window=window, keep=keep,
                  n_ubatch=n_ubatch, n_ctx=draw(st.sampled_from([256, 512])), cache=draw(st.sampled_from(CACHES)),
                  seed=draw(st.integers(0, 2**31)))
    seq_id = st.integers(0, 1)
    some = st.integers(1, n_ubatch)
    # places in a sequence: around its floor, around its end, anywhere
    place = st.tuples(st.sampled_from(["floor", "end", "start"]), st.integers(-3, 3)) | st.tuples(
        st.just("share"), st.floats(0, 1))
    end = st.just(("end", 0)) | st.just(("open", 0)) | place
    command = st.one_of(
        st.tuples(st.just("decode"), seq_id, some, st.integers(1, 4)),
        st.tuples(st.just("fill"), seq_id, st.integers(2, 8)),
        st.tuples(st.just("fill"), seq_id, st.integers(2, 8)),
        st.tuples(st.just("both"), st.integers(1, n_ubatch // 2), st.integers(1, 4)),
        st.tuples(st.just("remove"), st.sampled_from([0, 0, 1, 1, -1]), place, end),
        st.tuples(st.just("evict"), seq_id, st.just(0) | st.integers(1, budget + n_ubatch)),
        st.tuples(st.just("keep"), st.sampled_from([-1, 0, 1]), st.integers(0, budget)),
        st.tuples(st.just("copy"), seq_id),
        st.tuples(st.just("save"), st.sampled_from([0, 1, None])),
        st.tuples(st.just("load"), st.integers(0, 5), seq_id),
        st.tuples(st.just("load"), st.integers(0, 5), seq_id),
        st.tuples(st.just("move")),
        st.tuples(st.just("clear")),
    )
    return config, draw(st.lists(command, min_size=6, max_size=40))


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_the_whole_rule(models, case):
    config, commands = case
    twins = Twins(models[config["head_size"]], **config)
    try:
        for command, *arguments in commands:
            if command == "decode":
                seq_id, n, times = arguments
                for _ in range(times):
                    twins.decode(seq_id, n)
            elif command == "fill":
                seq_id, times = arguments
                for _ in range(times):
                    twins.decode(seq_id, config["n_ubatch"])
            elif command == "both":
                n, times = arguments
                for _ in range(times):
                    twins.both(n)
            elif command == "remove":
                seq_id, *ends = arguments
                rule = twins.rules[max(seq_id, 0)]
                p0, p1 = ({"floor": rule.floor, "end": rule.n_past, "start": 0, "open": -1}[at] + by if at != "share"
                          else int(by * rule.n_past) for at, by in ends)
                twins.remove(seq_id, p0, p1)
            elif command == "evict":
                twins.evict(*arguments)
            elif command == "keep":
                twins.set_keep(*arguments)
            else:
                getattr(twins, command)(*arguments)
            twins.check()
        event(f"evictions: {min(4, sum(rule.n_evictions for rule in twins.rules))}")
    finally:
        twins.session.close()


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("head_size", (32, 64))
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_and_cache(models, policy, head_size, cache):
    """What the property test may not draw: each combination once, over many evictions."""
    twins = Twins(models[head_size], head_size, policy, "bounded", 48, 12, 4, 16, 512, cache, seed=5)
    with twins.session:
        for n in (16, 16, 16, 16, 16, 1, 1, 7, 16, 15, 2, 16, 16):
            twins.decode(0, n)
            twins.both(8)
            twins.check()
        assert min(rule.n_evictions for rule in twins.rules) >= 3


def test_positions_are_what_the_rule_says(model):
    """By hand, so that an error in the oracle shows: streaming with 2 sinks and a budget of 8."""
    with Session(model, n_ctx=512, n_ubatch=4, settings=EvictionSettings("streaming", 8, 3, 2)) as s:
        for pos in range(0, 12, 4):
            s.decode(tokens(4, pos), pos)
        assert figures(s) == (12, 12, 0, 0)  # budget + n_ubatch, no more
        s.decode(tokens(1), 12)
        assert figures(s) == (9, 13, 12 - 3, 1)
        assert s.positions(0, 0).tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 12]
        assert not s.remove(8) and s.remove(13) and s.remove(9)
        assert s.positions(1, 1).tolist() == [0, 1, 6, 7, 8]
        for p0, p1 in ((0, 3), (2, 4), (8, -1), (0, 8)):
            assert not s.remove(p0, p1)
        assert figures(s) == (5, 9, 9, 1)
        assert s.remove(0) and figures(s) == (0, 0, 0, 1)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ("knorm", "keydiff"))
@pytest.mark.parametrize("flash_attn", (False, True))
def test_several_ubatches_in_one_call(model, policy, flash_attn):
    """prepare() plans the evictions of all ubatches before any is computed: same bits as one ubatch a call."""
    options = dict(n_ctx=1024, n_ubatch=16, flash_attn=flash_attn,
                   settings=EvictionSettings(policy, 40, 10, 4))
    text = tokens(640)
    with Session(model, n_batch=160, **options) as many, Session(model, n_batch=16, **options) as one:
        for pos in range(0, 640, 160):
            got = many.decode(text[pos:pos + 160], pos, logits="all")
            want = [one.decode(text[p:p + 16], p, logits="all") for p in range(pos, pos + 160, 16)]
            np.testing.assert_array_equal(got, np.concatenate(want))
            assert contents(many) == contents(one) and figures(many) == figures(one)
        assert many.stats().n_evictions > 10


def test_a_refused_batch_changes_nothing(model):
    """Its first ubatches fit and would evict; its last one exceeds the context."""
    options = dict(n_ctx=256, n_ubatch=16, settings=EvictionSettings("knorm", 40, 10, 4), n_batch=96)
    text = tokens(256)
    with Session(model, **options) as s, Session(model, **options) as twin:
        for session in (s, twin):
            session.read(text[:192])
        before = contents(s), figures(s)
        with pytest.raises(EdgekvError, match="the context is full: position 256 of 256"):
            s.decode(tokens(80), 192)
        assert (contents(s), figures(s)) == before
        np.testing.assert_array_equal(s.decode(text[192:], 192, logits="all"), twin.decode(text[192:], 192, logits="all"))
        assert contents(s) == contents(twin)
        with pytest.raises(EdgekvError, match="the context is full"):
            s.decode([1], 256)
        assert contents(s) == contents(twin)


# --- several sequences -----------------------------------------------------------------------------------------------


def test_sequences_do_not_touch_each_other(model):
    options = dict(n_ctx=512, n_ubatch=16, n_seq_max=2, settings=EvictionSettings("keydiff", 40, 10, 4))
    texts = tokens(320, 0), tokens(320, 1)
    with Session(model, **options) as together:
        got = ([], [])
        for pos in range(0, 320, 16):
            for seq_id in (0, 1):
                got[seq_id].append(together.decode(texts[seq_id][pos:pos + 16], pos, seq_id, logits="all"))
        for seq_id in (0, 1):
            with Session(model, **options) as alone:
                for i, pos in enumerate(range(0, 320, 16)):
                    want = alone.decode(texts[seq_id][pos:pos + 16], pos, seq_id, logits="all")
                    np.testing.assert_array_equal(got[seq_id][i], want)
                assert contents(together, seq_id) == contents(alone, seq_id)
                assert figures(together, seq_id) == figures(alone, seq_id) and figures(alone, 1 - seq_id) == (0, 0, 0, 0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("p0, p1", ((-1, -1), (0, -1), (0, 200), (0, 10**6)))
def test_copy_of_a_whole_sequence(model, cache, p0, p1):
    type_k, type_v, flash_attn = cache
    with Session(model, n_ctx=512, n_ubatch=16, n_seq_max=2, type_k=type_k, type_v=type_v,
                 flash_attn=flash_attn, settings=EvictionSettings("knorm", 40, 10, 4)) as s:
        s.decode(tokens(16, 9), 0, 1)  # what the copy replaces
        s.read(tokens(200))
        native.clear_error()
        llama_cpp.llama_memory_seq_cp(s.memory, 0, 1, p0, p1)
        assert native.last_error() == "" and contents(s, 1) == contents(s, 0)
        assert figures(s, 1)[:3] == figures(s, 0)[:3]
        floor = s.stats(1).floor
        assert floor > 0 and not s.remove(floor - 1, -1, 1) and s.remove(200, -1, 1)

        kept = contents(s, 0)
        for pos in range(200, 280, 16):  # evictions in the copy leave the original alone
            s.decode(tokens(16, pos), pos, 1)
        assert contents(s, 0) == kept
        for pos in range(200, 280, 16):
            s.decode(tokens(16, pos), pos, 0)
        assert contents(s, 0) == contents(s, 1)
        assert s.remove(0, -1, 0) and figures(s, 0)[0] == 0 and figures(s, 1)[0] > 0


# --- what an evicted cache cannot do ---------------------------------------------------------------------------------


@pytest.fixture
def evicted(model):
    with Session(model, n_ctx=512, n_ubatch=16, n_seq_max=2, settings=EvictionSettings("knorm", 40, 10, 4)) as s:
        s.read(tokens(200))
        yield s


@pytest.mark.parametrize("call", ("seq_cp partial", "seq_cp tail", "seq_add", "seq_div"))
def test_void_functions_do_nothing_and_say_so(evicted, call):
    before = contents(evicted), figures(evicted)
    memory = evicted.memory
    native.clear_error()
    {"seq_cp partial": lambda: llama_cpp.llama_memory_seq_cp(memory, 0, 1, 0, 199),
     "seq_cp tail": lambda: llama_cpp.llama_memory_seq_cp(memory, 0, 1, 195, -1),
     "seq_add": lambda: llama_cpp.llama_memory_seq_add(memory, 0, 100, -1, -50),
     "seq_div": lambda: llama_cpp.llama_memory_seq_div(memory, 0, 0, -1, 2)}[call]()
    assert native.last_error() and "\n" not in native.last_error()
    assert (contents(evicted), figures(evicted)) == before and figures(evicted, 1) == (0, 0, 0, 0)


def test_positions_cannot_be_shifted(evicted, model):
    assert not llama_cpp.llama_memory_can_shift(evicted.memory)
    with Session(model, n_ctx=256, n_ubatch=16) as stock:
        assert llama_cpp.llama_memory_can_shift(stock.memory)


# --- which contexts and settings are accepted ------------------------------------------------------------------------


@pytest.mark.parametrize("change, why", [
    (dict(kv_unified=True, n_seq_max=2), "streams of their own"),
    (dict(attention_type=llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL), "causal"),
])
def test_contexts_off_the_list_are_refused(model, change, why):
    with Session(model, n_ctx=256, n_ubatch=16) as s:  # for its model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 16, 16
        for name, value in change.items():
            setattr(params, name, value)
        native.set_next(EvictionSettings("knorm", 40, 10, 4))
        assert not llama_cpp.llama_init_from_model(s.model, params)
        assert "eviction is not possible" in native.last_error() and why in native.last_error()
        # without settings it is an ordinary context: the refused attempt has used them up
        ctx = llama_cpp.llama_init_from_model(s.model, params)
        assert ctx
        llama_cpp.llama_free(ctx)


good = np.ones(2 * 2 * 32, np.float32)
BOTH = [0, 1]


@pytest.mark.parametrize("given_settings, numbers, layers, why", [
    (EvictionSettings("knorm", 0, 0, 0), None, BOTH, "at least 1 token"),
    (EvictionSettings("knorm", 20, 17, 4), None, BOTH, r"keep \(4\) \+ window \(17\) exceed the budget \(20\)"),
    (EvictionSettings("knorm", 20, 2**32 - 4, 8), None, BOTH, "exceed the budget"),
    (EvictionSettings("lru", 20, 4, 4), None, BOTH, "unknown eviction policy 'lru'"),
    (EvictionSettings("qfilters", 20, 4, 4), None, BOTH, "needs filters"),
    (EvictionSettings("qfilters", 20, 4, 4), good[:0], BOTH, "needs filters"),
    (EvictionSettings("qfilters", 20, 4, 4), np.where(np.arange(128) == 77, np.nan, good), BOTH, "not finite"),
    (EvictionSettings("qfilters", 20, 4, 4), np.where(np.arange(128) == 3, np.inf, good), BOTH, "not finite"),
    (EvictionSettings("qfilters", 20, 4, 4), good[:-1], BOTH, "127 numbers instead of 128"),
    (EvictionSettings("qfilters", 20, 4, 4), np.append(good, 1), BOTH, "129 numbers instead of 128"),
    (EvictionSettings("qfilters", 20, 4, 4), np.where(np.arange(128) // 32 == 2, 0, good), BOTH, "layer 1, KV head 0 is zero"),
    (EvictionSettings("qfilters", 20, 4, 4), good, [], "for which layers"),
    (EvictionSettings("qfilters", 20, 4, 4), good[:64], [1], "lack layer 0"),
    (EvictionSettings("qfilters", 20, 4, 4), good, [0, 2], "there is no layer 2"),
    (EvictionSettings("qfilters", 20, 4, 4), good, [-1, 0], "there is no layer -1"),
])
def test_settings_that_contradict_themselves(model, given_settings, numbers, layers, why):
    filters = None if numbers is None else QFilters([numbers], layers)
    with pytest.raises(EdgekvError, match=why) as error:
        Session(model, n_ctx=256, n_ubatch=16, settings=given_settings, filters=filters)
    assert "\n" not in str(error.value)
    with Session(model, n_ctx=512, n_ubatch=16) as s:  # nothing is left of them
        assert s.stats().cells_allocated == 512


def test_settings_are_used_once(model):
    native.set_next(EvictionSettings("knorm", 40, 10, 4))
    native.set_next(EvictionSettings("knorm", 50, 10, 4))  # the last word counts
    with Session(model, n_ctx=256, n_ubatch=16) as s:  # hands over settings of its own: none
        assert not s.stats().n_evictions
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512, 16, 16
        cells = []
        native.set_next(EvictionSettings("knorm", 40, 10, 4))
        for _ in range(2):
            ctx = llama_cpp.llama_init_from_model(s.model, params)
            cells.append(native.stats(ctx).cells_allocated)
            llama_cpp.llama_free(ctx)
        native.set_next(EvictionSettings("knorm", 40, 10, 4))
        native.clear_next()
        ctx = llama_cpp.llama_init_from_model(s.model, params)
        cells.append(native.stats(ctx).cells_allocated)
        llama_cpp.llama_free(ctx)
        assert cells == [256, 512, 512]


def test_without_settings_nothing_is_evicted(model):
    with Session(model, n_ctx=256, n_ubatch=16) as s:
        s.read(tokens(200))
        assert figures(s) == (200, 200, 0, 0)
        with pytest.raises(EdgekvError, match="without an eviction policy"):
            s.evict(budget=10)
        assert s.remove(50, 60)  # interior ranges are stock's business


def test_prompt_mode_evicts_on_demand_only(model):
    with Session(model, n_ctx=512, n_ubatch=32, settings=EvictionSettings("knorm", 64, 8, 4, "prompt")) as s:
        s.read(tokens(300))
        assert figures(s) == (300, 300, 0, 0) and s.stats().cells_allocated == 512
        assert s.evict(budget=300) == 0 and s.evict(budget=1000) == 0
        assert s.evict(budget=200) == 100 and figures(s) == (200, 300, 292, 1)
        before = contents(s)
        with pytest.raises(EdgekvError, match=r"exceed the budget \(11\)"):
            s.evict(budget=11)
        assert contents(s) == before
        assert s.evict() == 136 and figures(s) == (64, 300, 292, 2)
        s.decode(tokens(32), 300)
        assert figures(s) == (96, 332, 292, 2)
        with pytest.raises(EdgekvError, match="no sequence 1"):
            s.evict(1)


def test_statistics_count_what_is_allocated(model):
    with Session(model, n_ctx=4096, n_ubatch=64, settings=EvictionSettings("knorm", 448, 8, 4)) as s, \
            Session(model, n_ctx=4096, n_ubatch=64) as full:
        bounded, stock = s.stats(), full.stats()
        assert (bounded.cells_allocated, stock.cells_allocated) == (512, 4096)
        # 2 layers, 2 KV heads of 32 f16
        assert bounded.k_bytes == bounded.v_bytes == 512 * 2 * 2 * 32 * 2 and bounded.kv_bytes == 2 * bounded.k_bytes
        assert stock.kv_bytes == 8 * bounded.kv_bytes and stock.scratch_bytes == 0 < bounded.scratch_bytes
        s.read(tokens(1000))
        assert s.stats().evict_us > 0 and s.stats().scratch_bytes == bounded.scratch_bytes


def test_a_budget_above_the_context(model):
    """Keep and window fit the budget, but not the context: nothing is ever evicted. (An abort would end pytest.)"""
    code = f"""
from edgekv.session import Session
from edgekv.settings import EvictionSettings, needs_filters
for mode in ("bounded", "prompt"):
    with Session({os.fspath(model)!r}, n_ctx=256, n_ubatch=16, settings=EvictionSettings("knorm", 4096, 256, 4, mode)) as s:
        s.read(range(1, 257))
        print(s.stats().cells_used, s.stats().n_evictions, s.evict())
"""
    run = subprocess.run(python(code), env={**os.environ, "GGML_NO_BACKTRACE": "1"}, capture_output=True,
                         text=True)
    assert run.stdout.split() == ["256", "0", "0"] * 2, run.stderr


def test_positions_of_a_stock_cache_with_a_hole(model):
    """Without eviction an interior removal leaves empty cells, which are not used ones."""
    with Session(model, n_ctx=256, n_ubatch=16) as s:
        s.read(tokens(10))
        keys = s.rows(0, 0, values=False)
        assert s.remove(3, 5)
        assert s.positions(0, 0).tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
        np.testing.assert_array_equal(s.rows(0, 0, values=False), keys[[0, 1, 2, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize("type_k", CACHE_TYPES)
def test_every_cache_type_runs(models, type_k):
    twins = Twins(models[64], 64, "qfilters", "bounded", 20, 4, 2, 8, 256, (type_k, type_k, True), seed=2)
    with twins.session:
        for _ in range(8):
            twins.decode(0, 8)
        twins.check()
        assert twins.rules[0].n_evictions
