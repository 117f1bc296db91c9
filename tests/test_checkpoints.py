"""Going back in an evicted context: `edgekv.Llama` against fresh contexts that are led through the same batches."""

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from edgekv import native
from edgekv.checkpoints import Checkpoint, Checkpoints, common_prefix
from edgekv.errors import EdgekvError
from replay import Recorded
from test_eviction import contents
from tinymodel import write_tiny_model

OPTIONS = dict(n_ctx=2048, n_batch=32, n_ubatch=32, n_threads=1, n_threads_batch=1, kv_evict="knorm", kv_budget=64,
               kv_window=16)


@pytest.fixture(scope="module", params=("llama", "gemma3", "lfm2"))
def model(request, tmp_path_factory):
    shape = {"llama": {}, "gemma3": dict(n_layer=4), "lfm2": dict(n_layer=4, n_embd=128)}[request.param]
    return write_tiny_model(tmp_path_factory.mktemp("checkpoints") / f"{request.param}.gguf", arch=request.param, **shape)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("checkpoints") / "plain.gguf")


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([n, seed]).integers(3, 320, n).tolist()


def held(llama):
    """What the caches of a Llama or a Session hold."""
    if hasattr(llama, "layers"):
        return contents(llama)
    result = []
    for i, layer in enumerate(native.layers(llama.ctx)):
        for h in range(layer.n_head_kv):
            result.append(native.positions(llama.ctx, 0, i, h).tobytes())
            result.extend(native.rows(llama.ctx, 0, i, h, values=values).tobytes() for values in (False, True))
    return result


def answer(llama, prompt, n=12):
    out = []
    for token in llama.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            break
    return out


# --- where it goes on from -------------------------------------------------------------------------------------------


def test_the_same_document_another_question(model):
    """The document is read once; what is held then is what a fresh context holds after the same batches."""
    llama = Recorded(model, **OPTIONS)
    document = text(600)
    first = answer(llama, document + text(9, 1))
    assert llama.timings["cache_n"] == 0 and llama.timings["prompt_n"] == 609
    for seed in (2, 3):
        question = text(8, seed)
        if llama._is_hybrid:  # a recurrent state has no tail to cut: only whole prompts are places to come back to
            question = text(9, 1) + question
        answer(llama, document + question, 3)
        assert llama.timings["prompt_n"] <= len(question) + 1, llama.timings
        with llama.replayed() as fresh:
            assert held(fresh) == held(llama)
    again = answer(llama, document + text(9, 1))
    assert again == first and llama.timings["prompt_n"] <= 10


@pytest.mark.parametrize("n", (5, 17, 31, 32))
def test_questions_as_long_as_a_ubatch(plain, n):
    """Longer than the window (16), in one message with the document, and whatever its length leaves of a ubatch."""
    for n_document in range(590, 630, 3):
        llama = Recorded(plain, **OPTIONS)
        document = text(n_document)
        answer(llama, document + text(n, 1), 40)
        answer(llama, document + text(n, 2), 3)
        assert llama.timings["prompt_n"] <= n + 1
        with llama.replayed() as fresh:
            assert held(fresh) == held(llama)


def test_a_long_answer_again(model):
    """Evictions during the answer have taken the prompt's end out of reach: a checkpoint was made in time."""
    llama = Recorded(model, **OPTIONS)
    prompt = text(300)
    first = answer(llama, prompt, 200)
    assert llama.stats().floor > 300
    assert answer(llama, prompt, 200) == first and llama.timings["cache_n"] == 299 and llama.timings["prompt_n"] == 1
    assert len(llama.checkpoints) <= 2
    for _ in range(3):
        answer(llama, prompt, 150)
    assert len(llama.checkpoints) <= 2  # no more of them for the same place


def test_two_documents_in_turns(model):
    llama = Recorded(model, **OPTIONS)
    a, b = text(400, 1), text(500, 2)
    first = {}
    for name, document in (("a", a), ("b", b), ("a", a), ("b", b), ("a", a)):
        tokens = answer(llama, document)
        assert first.setdefault(name, tokens) == tokens
        assert llama.timings["prompt_n"] == (1 if llama.timings["cache_n"] else len(document))
        with llama.replayed() as fresh:
            assert held(fresh) == held(llama)
    assert llama.timings["cache_n"] == 399


def test_short_conversations_too(plain):
    """Nothing was evicted yet, and another long prompt takes the cache."""
    llama = Recorded(plain, **OPTIONS)
    a, b = text(80, 1), text(70, 2)
    first = answer(llama, a)
    answer(llama, b)
    assert answer(llama, a) == first and llama.timings["prompt_n"] == 1


def test_without_checkpoints_it_is_read_again_and_said(model):
    said = []
    llama = Recorded(model, **OPTIONS, cache_ram=0)
    llama.on_notice = said.append
    prompt = text(400)
    first = answer(llama, prompt, 100)
    assert answer(llama, prompt, 100) == first and llama.timings["prompt_n"] == 400
    assert len(said) == 1 and said[0].startswith("399 tokens are read again")
    assert len(llama.checkpoints) == 0


def test_no_memory_for_a_checkpoint(plain, monkeypatch):
    """The answer comes all the same."""
    def no_memory(ctx):
        raise MemoryError

    said = []
    llama = Recorded(plain, **OPTIONS)
    first = answer(llama, text(300), 100)
    other = Recorded(plain, **OPTIONS)
    other.on_notice = said.append
    monkeypatch.setattr("edgekv.native.save_state", no_memory)
    assert answer(other, text(300), 100) == first and not len(other.checkpoints)
    assert said and said[0] == "a checkpoint could not be made: out of memory"


def test_a_state_beyond_the_limit_is_not_even_copied(plain, monkeypatch):
    """It would be a second cache for a moment, where memory may be what is short."""
    llama = Recorded(plain, **OPTIONS)
    llama.checkpoints.limit = 1000
    monkeypatch.setattr("edgekv.native.save_state", lambda ctx: pytest.fail("copied"))
    assert answer(llama, text(300), 100) and not len(llama.checkpoints)


@st.composite
def lives(draw):
    """Prompts that share beginnings of any length, with answers of any length between them."""
    n_prompts = draw(st.integers(2, 7))
    return [(draw(st.integers(0, 2)), draw(st.integers(1, 400)), draw(st.integers(0, 60)), draw(st.integers(0, 3)),
             draw(st.integers(1, 90))) for _ in range(n_prompts)]


@settings(deadline=None, max_examples=60)
@given(life=lives(), budget=st.integers(4, 90), window=st.integers(0, 40), cache_ram=st.sampled_from([0, 1, 1000]))
def test_any_life(plain, life, budget, window, cache_ram):
    """Whatever went before, the cache is that of a fresh context after the batches that were said to make it."""
    window = min(window, budget)
    llama = Recorded(plain, **{**OPTIONS, "kv_budget": budget, "kv_window": window, "keep": min(2, budget - window)},
                     cache_ram=cache_ram)
    answers = {}
    for document, n, n_tail, seed, n_answer in life:
        prompt = text(400, document)[:n] + text(n_tail, seed)
        event("reused" if llama.checkpoints.best(np.array(prompt))[1] else "not reused")
        tokens = answer(llama, prompt, n_answer)
        assert llama.timings["cache_n"] + llama.timings["prompt_n"] == len(prompt)
        assert llama.n_tokens == len(prompt) + n_answer - 1 == llama.stats().tokens_seen
        with llama.replayed() as fresh:
            assert held(fresh) == held(llama)
        if llama.timings["cache_n"] == len(prompt) - 1 and tuple(prompt) in answers:
            n_both = min(n_answer, len(answers[tuple(prompt)]))
            assert tokens[:n_both] == answers[tuple(prompt)][:n_both]
        answers[tuple(prompt)] = tokens
        assert llama.checkpoints.nbytes <= cache_ram << 20


def test_interrupted_in_any_batch(plain):
    """An exception leaves the cache ahead of, or behind, what was counted: the next prompt is answered all the same."""
    llama = Recorded(plain, **OPTIONS)
    prompt = text(500)
    first = answer(llama, prompt)
    for at in (1, 5, 9):
        llama.reset()
        llama.checkpoints.clear()
        decode, calls = llama._ctx.decode, []

        def fails(batch):
            calls.append(1)
            decode(batch)
            if len(calls) == at:
                raise KeyboardInterrupt  # the batch is in the cache, and nobody has counted it

        llama._ctx.decode = fails
        with pytest.raises(KeyboardInterrupt):
            answer(llama, prompt)
        llama._ctx.decode = decode
        llama.log.clear()
        assert len(answer(llama, prompt)) == len(first)
        assert llama.stats().tokens_seen == llama.n_tokens
    llama.interrupt()
    assert answer(llama, text(30, 7))  # a stale wish stops nothing

    progress = []
    llama.on_progress = lambda done, total: (progress.append((done, total)), len(progress) == 3 and llama.interrupt())
    with pytest.raises(KeyboardInterrupt):
        answer(llama, text(400, 8))
    assert progress == [(32 * i, 400) for i in (1, 2, 3)] and llama.n_tokens == 96


# --- states ----------------------------------------------------------------------------------------------------------


def test_save_and_load_state(model):
    llama, other = Recorded(model, **OPTIONS), Recorded(model, **OPTIONS)
    answer(llama, text(300), 50)
    state = llama.save_state()
    more = answer(llama, llama.input_ids[: llama.n_tokens].tolist() + [7])
    answer(other, text(50, 5))
    other.load_state(state)
    assert other.n_tokens == state.n_tokens
    assert answer(other, state.input_ids[: state.n_tokens].tolist() + [7]) == more
    before = held(other), other.n_tokens
    state.llama_state = state.llama_state[:-10]
    with pytest.raises(EdgekvError, match="truncated|damaged"):
        other.load_state(state)
    assert (held(other), other.n_tokens) == before


@pytest.mark.parametrize("n", (250, 350))
def test_a_state_with_other_tokens_than_it_has(plain, n):
    """As a forged session file could have it: the answer is right all the same."""
    llama, other, fresh = (Recorded(plain, **OPTIONS) for _ in range(3))
    answer(llama, text(300), 1)
    assert llama.n_tokens == 300
    named = (text(300) + text(100, 5))[:n]
    other.restore(np.array(named, np.int32), native.save_state(llama.ctx))
    assert answer(other, named + text(40, 7)) == answer(fresh, named + text(40, 7))
    assert other.stats().tokens_seen == other.n_tokens


def test_the_bindings_own_cache(plain):
    from llama_cpp import LlamaRAMCache

    llama = Recorded(plain, **OPTIONS)
    llama.set_cache(LlamaRAMCache(1 << 24))
    first = llama.create_completion(text(300), max_tokens=20, temperature=0)["choices"][0]["text"]
    llama.create_completion(text(200, 5), max_tokens=20, temperature=0)
    assert llama.create_completion(text(300), max_tokens=20, temperature=0)["choices"][0]["text"] == first


# --- the store -------------------------------------------------------------------------------------------------------


def checkpoint(tokens, floor=0, boundaries=(), size=100):
    return Checkpoint(np.array(tokens, np.int32), floor, frozenset(boundaries), np.zeros(size, np.uint8))


def test_least_recently_used_goes_first():
    store = Checkpoints(360)
    a, b, c, d = (checkpoint([i] * 5, boundaries=[5]) for i in range(4))
    assert all(store.add(x) for x in (a, b, c)) and store.nbytes == 360
    store.touch(a)
    store.add(d)
    assert list(store) == [c, a, d]
    assert not store.add(checkpoint([9], size=400)) and list(store) == [c, a, d]
    assert not Checkpoints(0).add(a)


def test_what_a_checkpoint_serves():
    c = checkpoint(range(10), floor=6, boundaries=[8])
    for tokens, n in ((range(12), 10), (range(10), 10), (range(8), 8), (range(6), 6), (range(5), 0), ([0, 1, 9], 0), ([], 0)):
        assert c.serves(np.array(tokens, np.int32)) == n
    store = Checkpoints(1000)
    store.add(c)
    store.add(checkpoint([*range(4)], floor=2, boundaries=[4]))
    assert store.best(np.arange(3))[1] == 3 and store.best(np.arange(7)) == (c, 7)
    assert store.covers(np.arange(8), 6) and not store.covers(np.arange(8), 5) and not store.covers(np.arange(5), 9)
    less = checkpoint([*range(12)], floor=4, boundaries=[12])
    store.add(less)
    assert store.best(np.arange(8)) == (less, 8)


def test_one_that_adds_nothing_is_replaced():
    store = Checkpoints(10**6)
    old = checkpoint(range(20), floor=5, boundaries=[8])
    store.add(old)
    new = checkpoint([*range(10), 77, 78], floor=5, boundaries=[8])
    store.add(new)
    assert list(store) == [new]
    later = checkpoint([*range(10), 77, 78, 79], floor=9, boundaries=[11])
    store.add(later)
    assert list(store) == [new, later]


@given(a=st.lists(st.integers(0, 2), max_size=12), b=st.lists(st.integers(0, 2), max_size=12))
def test_common_prefix(a, b):
    n = common_prefix(np.array(a, np.int32), np.array(b, np.int32))
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
