"""Selection on SmolLM2, alone and behind an eviction: what must be the same text is the same text."""

import pytest

import edgekv
from edgekv.gguf_file import GGUF
from edgekv.llama import load_filters
from edgekv.session import Session
from edgekv.settings import EvictionSettings, SelectionSettings

pytestmark = pytest.mark.slow

N_ANSWER = 128


@pytest.fixture(scope="module")
def model(smollm2_qfilters):
    return smollm2_qfilters


def answer(model, n_prompt: int, **settings) -> tuple[list[int], edgekv.Llama]:
    """128 greedy tokens behind a prompt of English prose that every Python has."""
    from pydoc_data.topics import topics

    llama = edgekv.Llama(model, n_ctx=4096, n_threads=2, n_threads_batch=2, flash_attn=True, **settings)
    tokens = llama.tokenize("\n\n".join(topics[name] for name in sorted(topics)).encode())[:n_prompt]
    out = []
    for token in llama.generate(tokens, temp=0.0):
        out.append(token)
        if len(out) == N_ANSWER:
            return out, llama


@pytest.mark.parametrize("n_prompt", [40, 1500])
def test_a_budget_that_covers_the_context_changes_no_token(model, n_prompt):
    want, _ = answer(model, n_prompt)
    got, llama = answer(model, n_prompt, selection=SelectionSettings(budget=4096))
    assert got == want
    assert llama.stats().n_selections == 0


def test_behind_an_eviction_too(model):
    evicted = {"kv_evict": "qfilters", "kv_budget": 512}
    want, _ = answer(model, 1500, **evicted)
    got, llama = answer(model, 1500, **evicted, selection=SelectionSettings(budget=1024))
    assert llama.stats().n_evictions > 0
    assert got == want


def test_generous_settings_of_both_give_the_dense_text(model):
    """The same batches for both: `edgekv.Llama` reads the last token of a prompt by itself where eviction is on."""
    def text(eviction, selection):
        from pydoc_data.topics import topics

        filters = load_filters(GGUF(model))
        with Session(model, n_ctx=4096, flash_attn=True, settings=eviction, filters=filters, selection=selection) as s:
            tokens = s.tokenize("\n\n".join(topics[name] for name in sorted(topics)))[:1500]
            s.read(tokens[:-1])
            for _ in range(N_ANSWER):
                tokens.append(int(s.decode(tokens[-1:], len(tokens) - 1, logits="last")[0].argmax()))
            assert s.stats().n_evictions == s.stats().n_selections == 0
            return tokens

    composed = text(EvictionSettings("qfilters", 3072, 256, 4), SelectionSettings(budget=2048))
    assert composed == text(None, None)


def test_composed_the_text_begins_like_the_dense_one(model):
    """Later words may differ: a quantised model's rounding alone makes texts part (so do stock's own attention with and
    without flash attention)."""
    want, _ = answer(model, 1500)
    got, llama = answer(model, 1500, kv_evict="qfilters", kv_budget=900, selection=SelectionSettings(budget=512))
    stats = llama.stats()
    same = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), N_ANSWER)
    print(f"\ncomposed: the first {same} of {N_ANSWER} tokens are the dense ones; {stats.pages_read} of "
          f"{stats.pages_total} pages read")
    assert stats.n_evictions > 0 and stats.n_selections >= N_ANSWER - 1
    assert stats.pages_read < stats.pages_total and same > 0
