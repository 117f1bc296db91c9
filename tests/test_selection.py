"""Selection in the runtime, on tiny random models: what decode steps choose, read and count, against NumPy.

The oracle makes summaries of K as it is stored and scores them with the queries that the tap saw; the operators
themselves are tested in test_selection_ops.py. Budgets are a few pages of twenty or more, so that a summary that was
not brought up to date shows; where one could be forgotten, the test asserts that the old one would have chosen
otherwise.
"""

import ctypes
import functools

import gguf
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import oracle
from edgekv import native
from edgekv import session as session_module
from edgekv.errors import EdgekvError
from edgekv.settings import PAGE_SIZES, EvictionSettings, SelectionSettings
from test_eviction import contents, decode_both, every_head, tokens
from tinymodel import write_tiny_model

import llama_cpp  # last: edgekv says which library it loads

Session = functools.partial(session_module.Session, n_threads=1, n_ctx=512, n_ubatch=16, flash_attn=True)
KNORM = EvictionSettings("knorm", 170, 10, 4)  # evicts every 16 tokens, keeps more than 20 pages of 8

MODELS = {
    "32": dict(n_head=4, n_head_kv=2, head_size=32, scale=2.0),
    "64": dict(n_head=3, n_head_kv=3, head_size=64, scale=2.0, seed=1),  # a quantised K is rotated
    "gemma3": dict(arch="gemma3", n_layer=4),
    "lfm2": dict(arch="lfm2", n_layer=4, n_embd=128),
    "qwen2vl": dict(arch="qwen2vl", n_head=2, n_head_kv=2, scale=2.0),
    "one layer": dict(n_layer=1, n_head=4, n_head_kv=2, head_size=32, scale=2.0, n_ctx=8192),
}
ARCHITECTURES = ("32", "gemma3", "lfm2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    return {name: write_tiny_model(folder / f"{name}.gguf", **shape) for name, shape in MODELS.items()}


def quest(budget: int = 24, page_size: int = 8, dense_layers: int = 0, grouped: bool = False) -> SelectionSettings:
    return SelectionSettings("quest", budget, page_size, dense_layers, grouped)


def padded(cells: int) -> int:
    """The cells that a graph is built for: llama.cpp pads them to 256."""
    return -(-cells // 256) * 256


class Watched(session_module.Session):
    """A session with selection whose decode steps are compared with NumPy."""

    def __init__(self, path, selection=None, type_k="f16", **options):
        self.selection, self.type_k = selection or quest(), type_k
        options = {"n_threads": 1, "n_ctx": 512, "n_ubatch": 16, "flash_attn": True, **options}
        super().__init__(path, type_k=type_k, selection=self.selection, tap_queries=True, **options)
        self.rng = np.random.default_rng(0)

    def more(self, n: int, seq_id: int = 0) -> None:
        """Random tokens behind the last one of a sequence."""
        self.read(self.rng.integers(0, 320, n), self.stats(seq_id).tokens_seen, seq_id)

    def keys(self, i: int, h: int, seq_id: int = 0) -> np.ndarray:
        """float64 [cells in use, head size], as they are stored."""
        return oracle.dequantise(self.type_k, self.rows(i, h, seq_id, values=False))

    def all_keys(self, seq_id: int = 0) -> dict:
        return {(i, h): self.keys(i, h, seq_id) for i, h in every_head(self)}

    def choices(self, visible: list[tuple[int, np.ndarray]], keys):
        """For each choice of the last step: the pages, the scores that ``keys(i_layer, head, sequence)`` give with the
        bounds of their errors, and the cells that the token may see. ``visible``: sequence and cells, per token."""
        quantised = self.type_k not in ("f32", "f16", "bf16")
        page_size = self.selection.page_size
        for i, layer in enumerate(self.layers()):
            queries, pages = native.last_step(self.ctx, i, self.per_query_head)
            assert len(queries) == len(visible)
            if layer.il < self.selection.dense_layers:
                assert pages is None
                continue
            n_choices = layer.n_head if self.per_query_head else layer.n_head_kv
            assert pages.shape == (len(visible), n_choices, -(-self.selection.budget // page_size))
            queries = oracle.rotated(queries, quantised)
            n, size = layer.n_head // n_choices, layer.head_size_k
            for h in range(n_choices):
                h_kv = h * layer.n_head_kv // n_choices
                bounds = {seq_id: oracle.summaries(keys(i, h_kv, seq_id), page_size)
                          for seq_id in {v[0] for v in visible}}
                for t, (seq_id, cells) in enumerate(visible):
                    q, b = queries[t, h * n : (h + 1) * n], np.abs(bounds[seq_id])
                    largest = np.maximum(b[:, :size], b[:, size:])
                    # of a sum of 2 * size products in float32, and of a rotation before it
                    error = (2 * size + 2) * oracle.EPS * (np.abs(q) @ largest.T).max(axis=0)
                    error += quantised * (size + 2) * oracle.EPS * np.linalg.norm(q, axis=1).max() * largest.sum(axis=1)
                    yield pages[t, h], oracle.page_scores(q, bounds[seq_id]), error, cells

    def check(self, visible=None, keys=None) -> None:
        """The last step, by default of one token in sequence 0, chose what the oracle chooses."""
        if visible is None:
            visible = self.behind(1)
        for pages, scores, error, cells in self.choices(visible, keys or self.keys):
            page_size, n_chosen = self.selection.page_size, len(pages)
            want = oracle.choose_pages(scores, cells, page_size, 1, n_chosen)
            if np.array_equal(pages, want):
                continue
            # pages whose scores differ by less than the rounding of float32 may change places, the mandatory ones not
            lost, extra = np.setdiff1d(want, pages), np.setdiff1d(pages, want)
            seen = np.flatnonzero(cells) // page_size
            assert len(lost) == len(extra) and (np.diff(pages) > 0).all() and np.isin(pages, seen).all()
            assert seen[0] in pages and seen[-1] in pages
            a, b = lost[scores[lost].argmax()], extra[scores[extra].argmin()]
            assert scores[a] - scores[b] <= error[a] + error[b], f"chose {pages}, not {want}"

    def would_choose_otherwise(self, keys: dict, visible=None) -> bool:
        """Whether the last step would have chosen other pages if the summaries were those of these keys."""
        def fit(i, h, seq_id):
            """As many rows as there are now; the newest page is chosen anyway."""
            return np.resize(keys[i, h], self.keys(i, h, seq_id).shape)

        page_size = self.selection.page_size
        return any(not np.array_equal(pages, oracle.choose_pages(scores, cells, page_size, 1, len(pages)))
                   for pages, scores, _, cells in self.choices(visible or self.behind(1), fit))

    def behind(self, n: int, seq_id: int = 0) -> list[tuple[int, np.ndarray]]:
        """What the last n tokens of a sequence without holes see."""
        used = self.stats(seq_id).cells_used
        return [(seq_id, np.arange(used) <= used - n + t) for t in range(n)]

    def step(self, n: int = 1, seq_id: int = 0) -> None:
        """A decode step of n tokens, checked."""
        before = self.stats().n_selections
        self.more(n, seq_id)
        assert self.stats().n_selections == before + 1
        self.check(self.behind(n, seq_id))

    def steps(self, n: int, seq_id: int = 0) -> None:
        for _ in range(n):
            self.step(1, seq_id)


# --- off is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", (None, EvictionSettings("knorm", 240, 10, 4)), ids=("", "evicted"))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_budget_that_covers_the_cache(models, arch, eviction):
    """Bit for bit, until the cache has outgrown the budget."""
    text = tokens(300)
    for budget in (256, 512, 10**6):
        with Session(models[arch], settings=eviction) as stock, \
                Session(models[arch], settings=eviction, selection=quest(budget, dense_layers=1)) as s:
            for session in (stock, s):
                session.read(text[:200])
            for pos in range(200, 240):
                np.testing.assert_array_equal(*(x.decode(text[pos : pos + 1], pos, logits="all") for x in (stock, s)))
            assert contents(s) == contents(stock) and s.stats().n_selections == 0 and s.stats().choice_us == 0
            for session in (stock, s):
                session.decode(text[240:256], 240)
                session.decode(text[256:257], 256)
            # without eviction the graph is one for 512 cells from here on
            assert s.stats().n_selections == (budget == 256 and eviction is None)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompts_are_dense(models, arch):
    """More than 8 tokens a ubatch are read as without selection: bit for bit, and nothing is chosen."""
    text = tokens(450)
    with Session(models[arch]) as stock, Watched(models[arch]) as s:
        for pos in range(0, 450, 9):
            np.testing.assert_array_equal(*(x.decode(text[pos : pos + 9], pos, logits="all") for x in (stock, s)))
        assert contents(s) == contents(stock) and s.stats().n_selections == 0
        s.step(8)
        s.more(9)
        queries, pages = native.last_step(s.ctx, 0)
        assert s.stats().n_selections == 1 and len(queries) == 9 and pages is None


# --- what a decode step chooses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("name, type_k", [("32", "f16"), ("32", "q8_0"), ("64", "f16"), ("64", "q8_0"), ("64", "f32"),
                                          ("gemma3", "f16"), ("lfm2", "q8_0")])
def test_after_a_prompt(models, name, type_k, page_size):
    n = 21 * page_size + 3
    for n_pages in (2, 4):
        selection = quest(n_pages * page_size, page_size)
        with Watched(models[name], selection, type_k, n_ctx=padded(n + 80), n_ubatch=512) as s:
            s.more(n)
            s.steps(page_size + 2 if page_size < 32 else 8)  # over the edge of a page where that is near
            for m in range(2, 9):
                s.step(m)


@pytest.mark.parametrize("name, type_k", [("32", "f16"), ("64", "q8_0"), ("gemma3", "f16"), ("lfm2", "f16")])
def test_each_query_head_by_itself(models, name, type_k):
    """As the paper has it: the choice is that of the oracle for one query head, and what is read goes to that head. Where
    all cells are read, both ways of choosing give the same answer."""
    selection = SelectionSettings("quest", 64, 16, 0, per_query_head=True)
    with Watched(models[name], selection, type_k, n_seq_max=2, n_ctx=512, n_ubatch=512) as s:
        s.more(250)
        s.steps(6)
        s.step(5)
        assert s.stats().n_selections == 7
        s.copy(0, 1)
        s.step(1, seq_id=1)

    text, everything = tokens(208), {}
    for each in (False, True):
        whole = SelectionSettings("quest", 224, 16, 0, per_query_head=each)
        with Session(models[name], type_k=type_k, selection=whole) as s:
            s.read(text[:200])
            everything[each] = s.decode(text[200:], 200, logits="all")
            assert s.stats().n_selections > 0
    np.testing.assert_allclose(everything[True], everything[False], rtol=0, atol=1e-4)


def read_embeddings(session, n: int, width: int) -> None:
    """As libmtmd reads an image: embeddings in the place of tokens; a model with M-RoPE has time, row and column of each
    for a position, others attend within it in both directions."""
    pos = session.stats().tokens_seen
    m_rope = llama_cpp.llama_model_rope_type(session.model) == llama_cpp.LLAMA_ROPE_TYPE_MROPE
    embeddings = np.ascontiguousarray(session.rng.standard_normal((n, width), dtype=np.float32))
    places = np.arange(n)
    positions = np.stack([0 * places, places // 8, places % 8, -pos + 0 * places]) if m_rope else places
    positions = np.ascontiguousarray(pos + positions, dtype=np.int32)
    sequence_of = ctypes.pointer(llama_cpp.llama_seq_id(0))
    batch = llama_cpp.llama_batch(
        n_tokens=n, embd=embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        pos=positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos)),
        n_seq_id=(ctypes.c_int32 * n)(*[1] * n),
        seq_id=(type(sequence_of) * n)(*[sequence_of] * n),
        logits=(ctypes.c_int8 * n)())
    llama_cpp.llama_set_causal_attn(session.ctx, m_rope)
    try:
        assert llama_cpp.llama_decode(session.ctx, batch) == 0
    finally:
        llama_cpp.llama_set_causal_attn(session.ctx, True)


@pytest.mark.parametrize("name", ("32", "gemma3", "qwen2vl"))
def test_behind_an_image(models, name):
    """What the keys of an image say of their pages counts as that of words does."""
    with Watched(models[name], n_ubatch=64) as s:
        s.more(150)
        s.steps(2)
        before = s.all_keys()
        read_embeddings(s, 64, 64)
        otherwise = 0
        for _ in range(6):
            s.step()
            otherwise += s.would_choose_otherwise(before)
        assert otherwise
        s.more(100)
        s.steps(10)
        read_embeddings(s, 5, 64)  # as few as a step that selects has
        s.steps(3)


def test_a_budget_is_rounded_up_to_pages(models):
    with Watched(models["32"], quest(17, 8)) as s:
        s.more(300)
        s.step()
        assert native.last_step(s.ctx, 0)[1].shape == (1, 2, 3)


def test_the_first_pages_of_a_short_text(models):
    """The graph is one for 256 cells at least, so a step selects from the first token on: all pages, until there are
    too many."""
    with Watched(models["32"], quest(24, 8)) as s:
        s.steps(40)
        s.clear()
        s.step(8)
        assert native.last_step(s.ctx, 1)[1][7, 0].tolist() == [0, -1, -1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_after_evictions(models, arch):
    """Automatic ones between single steps, and one asked for."""
    with Watched(models[arch], settings=KNORM) as s:
        s.more(300)
        n, otherwise = s.stats().n_evictions, 0
        for _ in range(52):
            before, n_evictions = s.all_keys(), s.stats().n_evictions
            s.step()
            if s.stats().n_evictions > n_evictions:
                otherwise += s.would_choose_otherwise(before)
        assert s.stats().n_evictions >= n + 3 and otherwise >= 2
        before = s.all_keys()
        assert s.evict(budget=120) > 40
        s.step()
        assert s.would_choose_otherwise(before)
        s.steps(10)
        s.evict(budget=100)
        s.evict(budget=60)  # nothing was decoded in between
        s.steps(10)


@pytest.mark.parametrize("policy", ("streaming", "keydiff"))
@pytest.mark.parametrize("mode", ("bounded", "prompt"))
def test_after_evictions_of_a_rotated_cache(models, policy, mode):
    with Watched(models["64"], type_k="q8_0", settings=EvictionSettings(policy, 170, 10, 4, mode)) as s:
        s.more(400)
        s.evict()
        for n in (1, 8, 3, 1, 1, 6, 8, 8, 1, 1):
            s.step(n)


@pytest.mark.parametrize("evicted", (False, True))
def test_after_a_tail_was_removed(models, evicted):
    """New tokens overwrite its cells, so old rows lie behind them."""
    with Watched(models["32"], settings=EvictionSettings("knorm", 170, 80, 4) if evicted else None) as s:
        s.more(400)
        otherwise = 0
        for n in (5, 75, 75):
            before = s.all_keys()
            assert s.remove(max(s.stats(0).tokens_seen - n, s.stats(0).floor))
            s.more(n // 2)
            for _ in range(24):
                s.step()
                otherwise += s.would_choose_otherwise(before)
        assert otherwise >= 10


@pytest.mark.parametrize("data", (False, True))
@pytest.mark.parametrize("evicted", (False, True))
def test_after_everything_was_cleared(models, evicted, data):
    with Watched(models["32"], settings=KNORM if evicted else None, n_seq_max=2) as s:
        s.more(320)
        s.more(200, 1)
        before = s.all_keys()
        llama_cpp.llama_memory_clear(s.memory, data)
        s.more(250)
        s.steps(20)
        assert s.would_choose_otherwise(before)
        assert s.remove(-1)  # one sequence only
        s.more(180)
        s.steps(4)
        s.more(200, 1)
        s.steps(4, 1)


@pytest.mark.parametrize("name, type_k", [("32", "f16"), ("64", "q8_0"), ("gemma3", "f16"), ("lfm2", "f16")])
@pytest.mark.parametrize("evicted", (False, True))
def test_a_copied_sequence(models, name, type_k, evicted):
    with Watched(models[name], type_k=type_k, settings=KNORM if evicted else None, n_seq_max=2) as s:
        s.more(350)
        s.more(330, 1)  # what the copy replaces
        s.step(1, 1)
        before = s.all_keys(1)
        s.copy(0, 1)
        s.step(1, 1)
        assert s.would_choose_otherwise(before, s.behind(1, 1))
        s.steps(12, 1)
        s.steps(4, 0)
        s.copy(1, 0)
        s.steps(4, 0)  # before anything reads the copy
        s.step(8, 1)


@pytest.mark.parametrize("name, type_k", [("32", "f16"), ("64", "q8_0"), ("gemma3", "f16"), ("lfm2", "f16")])
@pytest.mark.parametrize("evicted", (False, True))
def test_a_state(models, name, type_k, evicted):
    """Of the whole context or of one sequence, into a new context or over another text, by a context with selection or
    without."""
    options = dict(settings=KNORM if evicted else None, n_seq_max=2, type_k=type_k)
    for with_selection in (True, False):
        with (Watched(models[name], **options) if with_selection else Session(models[name], **options)) as source:
            source.read(tokens(350))
            states = {None: source.save(), 0: source.save(0)}
        for seq_id, used in ((None, False), (None, True), (0, False), (0, True)):
            with Watched(models[name], **options) as s:
                goal = 1 if seq_id == 0 else 0
                if used:
                    s.more(360, goal)
                    s.step(1, goal)
                    before = s.all_keys(goal)
                s.load(states[seq_id], None if seq_id is None else goal)
                s.step(1, goal)
                if not used:
                    before = {key: 0 * value for key, value in s.all_keys(goal).items()}
                assert s.would_choose_otherwise(before, s.behind(1, goal))
                s.steps(6, goal)


def test_sequences_interleaved(models):
    """Each has summaries of its own; several in one batch are one step."""
    with Watched(models["32"], settings=KNORM, n_seq_max=3) as s:
        for seq_id, n in enumerate((340, 200, 270)):
            s.more(n, seq_id)
        for _ in range(20):
            for seq_id in (2, 0, 1):
                s.step(1, seq_id)
        for n in (1, 2, 4):
            before = s.stats().n_selections
            assert decode_both(s, s.rng.integers(0, 320, n), s.stats(0).tokens_seen,
                               s.rng.integers(0, 320, n), s.stats(1).tokens_seen) == 0
            assert s.stats().n_selections == before + 1
            s.check(s.behind(n, 0) + s.behind(n, 1))
            s.step(n, 2)


@pytest.mark.parametrize("n", (5, 8))
def test_more_than_eight_tokens_of_two_sequences(models, n):
    """A decode step has at most 8 tokens per sequence: two sequences may have 16 together, and the tap shows them."""
    with Watched(models["32"], n_seq_max=2) as s:
        s.more(340)
        s.more(200, 1)
        before = s.stats().n_selections
        assert decode_both(s, s.rng.integers(0, 320, n), 340, s.rng.integers(0, 320, n), 200) == 0
        assert s.stats().n_selections == before + 1
        s.check(s.behind(n, 0) + s.behind(n, 1))


def test_a_refused_batch(models):
    """Its first ubatches fit, the last one exceeds the context: all is as before, so new tokens go into the next cells.
    The other sequence holds a few tokens more."""
    with Watched(models["32"], settings=KNORM, n_seq_max=2, n_batch=64) as s:
        s.more(300)
        s.more(480, 1)
        s.evict(1, budget=s.stats(0).cells_used - 12)
        before = contents(s, 1), s.stats(1).cells_used
        assert s.try_decode(tokens(37), 480, 1) == 1 and "the context is full" in native.last_error()
        assert (contents(s, 1), s.stats(1).cells_used) == before
        s.step(8, 1)
        s.steps(2, 1)


def test_sequences_in_one_stream(models, monkeypatch):
    """A unified cache: a sequence chooses among the pages with cells of its own. Its rows cannot be asked for, but
    those of the first layer depend on tokens and positions only."""
    parts = {0: tokens(100), 1: tokens(300, 1)}
    with Watched(models["one layer"], n_seq_max=2) as apart:
        for seq_id, text in parts.items():
            apart.read(text, 0, seq_id)
        keys = {h: np.concatenate([apart.keys(0, h, 0), apart.keys(0, h, 1)]) for h in range(2)}
        apart.decode(tokens(1, 2), 300, 1)
        new = {h: apart.keys(0, h, 1)[-1:] for h in range(2)}

    defaults = llama_cpp.llama_context_default_params

    def unified():
        params = defaults()
        params.kv_unified = True
        return params

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", unified)
    with Watched(models["one layer"], n_seq_max=2) as s:
        for seq_id, text in parts.items():
            s.read(text, 0, seq_id)
        s.decode(tokens(1, 2), 300, 1)
        s.check([(1, np.arange(401) >= 100)], lambda i, h, _: np.concatenate([keys[h], new[h]]))
        pages = native.last_step(s.ctx, 0)[1]
        assert (pages[:, :, 0] == 100 // 8).all() and (pages[:, :, -1] == 400 // 8).all()


# --- holes and shifted positions (without eviction) ------------------------------------------------------------------


@pytest.mark.parametrize("page_size, hole", [(8, (100, 200)), (8, (0, 50)), (16, (161, 250)), (8, (300, 349)),
                                             (8, (21, 23))])
def test_pages_without_visible_cells(models, page_size, hole):
    """New tokens fill the hole, from its start. Rows that were removed still lie in its pages."""
    with Watched(models["32"], quest(4 * page_size, page_size)) as s:
        s.more(350)
        s.step()
        lie = s.all_keys()
        assert s.remove(*hole)
        used = np.r_[: hole[0], hole[1] : 351]
        for n in range(1, hole[1] - hole[0]):
            used = np.sort(np.append(used, hole[0] + n - 1))
            s.decode(tokens(1, n), 350 + n)
            assert s.positions(0, 0).tolist() == [c if c < hole[0] or c >= hole[1] else 351 + c - hole[0] for c in used]
            for key in lie:
                lie[key][used] = s.keys(*key)
            visible = np.isin(np.arange(351), used)
            s.check([(0, visible)], lambda i, h, _: lie[i, h])
            if n == 20:
                break


@pytest.mark.parametrize("name", ("32", "64"))
def test_shifted_positions(models, name):
    """K is rotated where it lies."""
    with Watched(models[name]) as s:
        s.more(350)
        s.step()
        for by in (7, -5):
            before = s.all_keys()
            n_past = s.stats(0).tokens_seen
            llama_cpp.llama_memory_seq_add(s.memory, 0, 60, -1, by)
            s.decode(tokens(1), n_past + by)
            assert s.positions(0, 0)[60] == 60 + max(0, by) - (by < 0) * -2
            s.check()
            assert s.would_choose_otherwise(before)
            s.steps(3)


def test_a_context_shift(models):
    """What llama.cpp does when the context is full: a part in the middle leaves, the rest moves up."""
    with Watched(models["32"]) as s:
        s.more(400)
        lie = s.all_keys()
        assert s.remove(40, 200)
        llama_cpp.llama_memory_seq_add(s.memory, 0, 200, -1, -160)
        used = np.r_[:40, 200:400]
        for n in range(10):
            used = np.sort(np.append(used, 40 + n))
            s.decode(tokens(1, n), 240 + n)
            old = {key: value.copy() for key, value in lie.items()}
            for key in lie:
                lie[key][used] = s.keys(*key)
            visible = [(0, np.isin(np.arange(400), used))]
            s.check(visible, lambda i, h, _: lie[i, h])
            if n == 0:
                with pytest.raises(AssertionError, match="chose"):
                    s.check(visible, lambda i, h, _: old[i, h])


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tolerance", [("f32", 1e-5), ("f16", 5e-3)])
@pytest.mark.parametrize("n", (1, 3))
def test_logits_are_those_of_the_chosen_pages(models, tmp_path, kind, tolerance, n):
    """One layer, of which the output projection reads one KV head's group: stock attention gives the same logits if all
    tokens outside that head's pages are removed. Stock without flash attention computes in the cache's type: with f32
    only the order of its sums differs, with f16 it rounds queries and weights to 11 bits."""
    text = tokens(333)  # the last tokens are in a page with others, so that the removals leave no gap before them
    for h in range(2):
        path = tmp_path / f"{h}.gguf"
        path.write_bytes(models["one layer"].read_bytes())
        weights = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}["blk.0.attn_output.weight"]
        weights.reshape(64, 2, 64)[:, 1 - h] = 0  # [n_embd, KV head, its two query heads of 32]
        weights.flush()

        options = dict(type_k=kind, type_v=kind)
        with Watched(path, quest(32, 8), **options) as s, Session(path, flash_attn=False, **options) as stock:
            s.read(text[:-n])
            got = s.decode(text[-n:], len(text) - n, logits="all")
            s.check(s.behind(n))
            pages = native.last_step(s.ctx, 0)[1][:, h]
            for t in range(n):
                pos = len(text) - n + t
                stock.clear()
                stock.read(text[:pos])
                dense = stock.decode(text[pos : pos + 1], pos, logits="all")[0]
                for page in set(range(pos // 8 + 1)) - set(pages[t].tolist()):
                    assert stock.remove(8 * page, 8 * page + 8)
                assert stock.remove(pos)
                want = stock.decode(text[pos : pos + 1], pos, logits="all")[0]
                assert np.abs(got[t] - want).max() <= tolerance * np.abs(want).max()
                assert np.abs(got[t] - dense).max() > 0.02 * np.abs(want).max()  # it makes a difference


GROUPED = SelectionSettings("none", grouped_attention=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_grouped_attention(models, arch):
    """Equal to stock's flash attention but for rounding: stock sums V in f16, ours in f32. Prompts are bit for bit the
    same."""
    text = tokens(400)
    with Session(models[arch]) as stock, Session(models[arch], selection=GROUPED) as s:
        for pos in range(0, 384, 16):
            np.testing.assert_array_equal(*(x.decode(text[pos : pos + 16], pos, logits="all") for x in (stock, s)))
        pos = 384
        for n in (1, 1, 5, 8, 1):
            want, got = (x.decode(text[pos : pos + n], pos, logits="all") for x in (stock, s))
            assert 0 < np.abs(got - want).max() <= 5e-3 * np.abs(want).max()
            pos += n
        ours, theirs = s.stats(), stock.stats()
        assert ours.dense_us > 0 and theirs.dense_us == 0
        assert (ours.n_selections, ours.pages_read, ours.summary_bytes, ours.attn_us) == (0, 0, 0, 0)
        assert ours.kv_bytes == theirs.kv_bytes


@pytest.mark.parametrize("name", ("32", "64", "lfm2"))
def test_grouped_attention_in_float32(models, name):
    """Stock without flash attention is exact there, but for the order of its sums; the layers after it magnify that.
    All in decode steps: stock's flash attention, which reads prompts, rounds an f32 cache to f16."""
    text = tokens(320)
    options = dict(type_k="f32", type_v="f32")
    with Session(models[name], flash_attn=False, **options) as stock, \
            Session(models[name], selection=GROUPED, **options) as s:
        for pos in range(0, 320, 8):
            want, got = (x.decode(text[pos : pos + 8], pos, logits="all") for x in (stock, s))
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_steps_that_select_nothing_with_grouped_attention(models):
    """Within the budget: our kernel if asked for, else stock's."""
    for grouped in (False, True):
        with Watched(models["32"], quest(512, grouped=grouped), n_ctx=1024) as s:
            s.more(300)
            s.more(1)
            assert s.stats().n_selections == 0 and (s.stats().dense_us > 0) == grouped
            assert native.last_step(s.ctx, 0)[1] is None and len(native.last_step(s.ctx, 0)[0]) == 1
            s.more(260)
            s.step()


@pytest.mark.parametrize("cells, budget", [(300, 784), (800, 800), (1025, 808), (4096, 896), (6000, 960)])
def test_auto_budget(models, cells, budget):
    """768 and a 32nd of the graph's cells."""
    assert native.auto_budget(padded(cells)) == budget == 768 + padded(cells) // 32
    with Watched(models["one layer"], quest(0, 16), n_ctx=8192, n_ubatch=512) as s:
        s.more(cells - 1)
        s.more(1)
        pages = native.last_step(s.ctx, 0)[1]
        assert (pages is None) == (padded(cells) <= budget)
        if pages is not None:
            assert pages.shape == (1, 2, -(-budget // 16)) and (pages >= 0).all()
            s.selection = quest(budget, 16)
            s.check()


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, layers", [("32", [0, 1]), ("gemma3", [1, 3]), ("lfm2", [1, 3])])
def test_dense_layers(models, arch, layers):
    """The first layers of the model, whichever of them have pages: in pairs those with full attention, in hybrids those
    with attention."""
    for dense_layers in range(5):
        with Watched(models[arch], quest(dense_layers=dense_layers)) as s:
            assert [layer.il for layer in s.layers()] == layers
            s.more(300)
            before = s.stats()
            s.more(1)
            s.check()  # asks dense layers for None
            selected = [il for il in layers if il >= dense_layers]
            pages = 38 * 2 * len(selected)
            after = s.stats()
            assert (after.n_selections, after.pages_total) == (bool(selected), pages)
            assert after.summary_bytes == len(selected) * 512 // 8 * 2 * 2 * 32 * 2
            # in a step that selects, dense layers are read by our kernel
            assert (after.dense_us > before.dense_us) == (len(selected) < len(layers))


# --- memory and statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("name", ("32", "64", "gemma3", "lfm2"))
def test_memory(models, name, page_size):
    for eviction, n_seq_max, type_k in ((None, 1, "f16"), (None, 3, "q8_0"), (KNORM, 2, "f16")):
        options = dict(settings=eviction, n_seq_max=n_seq_max, type_k=type_k)
        with Session(models[name], **options) as stock, \
                Session(models[name], selection=quest(128, page_size, 1), **options) as s, \
                Session(models[name], selection=GROUPED, **options) as grouped:
            got, cells = s.stats(), s.stats().cells_allocated
            want = sum(-(-cells // page_size) * layer.n_head_kv * 2 * layer.head_size_k * 2
                       for layer in s.layers() if layer.il >= 1) * n_seq_max
            assert got.summary_bytes == got.kv_bytes - stock.stats().kv_bytes == want > 0
            assert (got.k_bytes, got.v_bytes, got.cells_allocated) == (
                stock.stats().k_bytes, stock.stats().v_bytes, stock.stats().cells_allocated)
            assert grouped.stats() == stock.stats() and stock.stats().summary_bytes == 0
            if page_size == 16:
                f16 = sum(cells * layer.n_head_kv * 2 * layer.head_size_k * 2 for layer in s.layers()) * n_seq_max
                assert got.summary_bytes <= 0.065 * f16


@pytest.mark.parametrize("type_k, type_v", [("f16", "f16"), ("q8_0", "q4_0")])
def test_statistics(models, type_k, type_v):
    """Counted by hand, over steps of several tokens and sequences."""
    with Watched(models["32"], quest(40, 8, 1), type_k, type_v=type_v, n_seq_max=2) as s:
        layer = s.layers()[1]
        page_bytes = 8 * (layer.k_row_bytes + layer.v_row_bytes)
        steps = read = total = 0
        previous = s.stats()
        used = [0, 0]
        for n, seq_id in ((300, 0), (1, 0), (20, 1), (8, 0), (7, 1), (1, 1), (9, 0), (1, 0), (8, 1)):
            s.more(n, seq_id)  # 300 = 18 * 16 + 12 and 20 = 16 + 4: the 4 tokens are a decode step
            parts = [16] * (n // 16) + [n % 16] * (n % 16 > 0)
            for part in parts:
                used[seq_id] += part
                if part <= 8:
                    steps += 1
                    for t in range(part):
                        pages = -(-(used[seq_id] - part + t + 1) // 8)
                        total += pages * layer.n_head_kv
                        read += min(pages, 5) * layer.n_head_kv
            now = s.stats()
            assert (now.n_selections, now.pages_read, now.pages_total) == (steps, read, total)
            assert now.bytes_read == read * page_bytes + total * 2 * layer.head_size_k * 2
            assert s.stats(0).n_selections == s.stats(1).n_selections == steps  # the context's, whichever is asked
            for name in ("summarize_us", "scores_us", "choice_us", "attn_us", "dense_us"):
                assert getattr(now, name) >= getattr(previous, name) >= 0
            previous = now
        s.more(300, 1)
        for _ in range(20):
            s.more(1)
        now = s.stats()
        for name in ("summarize_us", "scores_us", "choice_us", "attn_us", "dense_us"):
            assert getattr(now, name) > getattr(previous, name), name
        s.clear()
        assert s.stats().n_selections == steps + 20


# --- settings that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", (quest(), GROUPED), ids=str)
def test_flash_attention_is_needed(models, selection):
    with pytest.raises(EdgekvError, match="selection is not possible: it needs flash attention") as error:
        Session(models["32"], selection=selection, flash_attn=False)
    assert "\n" not in str(error.value)
    with Session(models["32"], flash_attn=False) as s:  # nothing is left of it
        assert s.stats().summary_bytes == 0


@pytest.mark.parametrize("arguments, why", [
    (dict(method="quest", page_size=12), "--kv-page-size 12: choose one of 8, 16, 32, 64"),
    (dict(method="quest", budget=10), "--kv-select-budget 10: must be two pages at least, 32 tokens"),
    (dict(method="quest", budget=127, page_size=64), "--kv-select-budget 127: must be two pages at least, 128 tokens"),
    (dict(method="quest", budget="many"), "--kv-select-budget many: give a number of tokens, or auto"),
    (dict(method="quest", budget=-100), "--kv-select-budget -100: give a number"),
    (dict(method="quest", budget="²"), "--kv-select-budget ²: give a number"),
    (dict(method="quest", budget=2**31), "--kv-select-budget 2147483648: too large"),
    (dict(method="quest", dense_layers=-1), "--kv-dense-layers -1: must not be negative"),
    (dict(method="h2o"), "--kv-select h2o: unknown, choose one of none, quest"),
    (dict(budget=64), "--kv-select-budget is for selection: add --kv-select quest"),
    (dict(page_size=16), "--kv-page-size is for selection"),
    (dict(dense_layers=0), "--kv-dense-layers is for selection"),
])
def test_settings_that_make_no_sense(arguments, why):
    with pytest.raises(EdgekvError) as error:
        SelectionSettings.resolve(**arguments)
    assert why in str(error.value) and "\n" not in str(error.value)


def test_settings_by_default():
    assert SelectionSettings.resolve() == SelectionSettings("none")
    assert not SelectionSettings.resolve().needs_flash_attention
    assert SelectionSettings.resolve(grouped_attention=True).needs_flash_attention
    assert SelectionSettings.resolve("quest") == SelectionSettings.resolve("quest", "auto") == quest(0, 16, 2)
    assert SelectionSettings.resolve("quest", " 64 ", 32, 0) == quest(64, 32, 0)
    assert quest().needs_flash_attention


@pytest.mark.parametrize("selection, why", [
    (quest(page_size=12), "the page size must be 8, 16, 32 or 64 cells, not 12"),
    (quest(page_size=0), "not 0"),
    (quest(budget=1), r"the selection budget \(1\) must be two pages at least \(16\)"),
    (quest(budget=15), "two pages at least"),
    (quest(budget=2**31), "the selection budget is too large"),
    (SelectionSettings("h2o", 64), "unknown selection 'h2o'"),
])
def test_settings_that_the_library_refuses(models, selection, why):
    with pytest.raises(EdgekvError, match=why) as error:
        native.set_next(None, None, selection)
    assert "\n" not in str(error.value)
    with Session(models["32"]) as s:
        assert s.stats().summary_bytes == 0


# --- any life of two sequences ---------------------------------------------------------------------------------------


@st.composite
def lives(draw):
    page_size = draw(st.sampled_from([8, 8, 16]))
    config = dict(name=draw(st.sampled_from(["32", "32", "64"])), type_k=draw(st.sampled_from(["f16", "q8_0"])),
                  selection=quest(page_size * draw(st.integers(2, 4)), page_size, draw(st.integers(0, 1))),
                  policy=draw(st.sampled_from([None, "knorm", "keydiff"])), budget=draw(st.integers(100, 200)))
    seq_id = st.integers(0, 1)
    command = st.one_of(
        st.tuples(st.just("step"), seq_id, st.integers(1, 8)),
        st.tuples(st.just("both"), st.integers(1, 4)),
        st.tuples(st.just("fill"), seq_id, st.integers(9, 120)),
        st.tuples(st.just("remove"), seq_id, st.integers(1, 60)),
        st.tuples(st.just("evict"), seq_id, st.integers(60, 150)),
        st.tuples(st.just("copy"), seq_id),
        st.tuples(st.just("save"), st.sampled_from([0, 1, None])),
        st.tuples(st.just("load"), st.integers(0, 5), seq_id),
        st.tuples(st.just("move"), st.booleans()),
        st.tuples(st.just("clear"), seq_id, st.booleans()),
    )
    return config, draw(st.lists(command, min_size=4, max_size=20))


@settings(deadline=None, max_examples=120, derandomize=True)
@given(life=lives())
def test_any_life(models, life):
    """However K came to be what it is, every decode step chooses what the oracle chooses from it."""
    config, commands = life
    eviction = EvictionSettings(config["policy"], config["budget"], 40, 4) if config["policy"] else None
    options = dict(type_k=config["type_k"], settings=eviction, n_seq_max=2)
    s, saved = Watched(models[config["name"]], config["selection"], **options), []

    def room(n: int, *seq_ids: int) -> bool:
        return all(s.stats(seq_id).tokens_seen + n <= 512 for seq_id in seq_ids)

    try:
        for seq_id, n in enumerate((250, 180)):
            s.more(n, seq_id)
        # every life ends with a step in each sequence
        for command, *arguments in [*commands, ("step", 0, 1), ("step", 1, 2)]:
            if command == "step":
                seq_id, n = arguments
                if room(n, seq_id):
                    s.step(n, seq_id)
            elif command == "both":
                n = arguments[0]
                if room(n, 0, 1):
                    text = s.rng.integers(0, 320, (2, n))
                    assert decode_both(s, text[0], s.stats(0).tokens_seen, text[1], s.stats(1).tokens_seen) == 0
                    s.check(s.behind(n, 0) + s.behind(n, 1))
            elif command == "fill":
                seq_id, n = arguments
                if room(n, seq_id):
                    s.more(n, seq_id)
            elif command == "remove":
                seq_id, n = arguments
                event(f"removed: {s.remove(max(0, s.stats(seq_id).tokens_seen - n), -1, seq_id)}")
            elif command == "evict":
                if eviction:
                    s.evict(*arguments)
            elif command == "copy":
                s.copy(arguments[0], 1 - arguments[0])
                assert native.last_error() == ""
            elif command == "save":
                saved.append((arguments[0], s.save(arguments[0])))
            elif command == "load" and saved:
                source, state = saved[arguments[0] % len(saved)]
                s.load(state, None if source is None else arguments[1])
            elif command == "move":  # go on in a new context, perhaps by way of one without selection
                state = s.save()
                s.close()
                if arguments[0]:
                    with Session(models[config["name"]], **options) as other:
                        other.load(state)
                        state = other.save()
                s = Watched(models[config["name"]], config["selection"], **options)
                s.load(state)
            elif command == "clear":
                seq_id, all_of_them = arguments
                if all_of_them:
                    s.clear()
                else:
                    assert s.remove(-1, -1, seq_id)
                for other in (0, 1):
                    if not s.stats(other).tokens_seen:
                        s.more(130, other)
    finally:
        s.close()
