"""Loss along a text and divergence from the full cache: against logits of plain sessions and sums by hand."""

import functools
import hashlib
import json
import math

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.errors import EdgekvError
from edgekv.eval import divergence, perplexity
from edgekv.eval.divergence import Divergence, Predictions
from edgekv.eval.journal import Journal
from edgekv.eval.perplexity import Loss, Text
from edgekv.eval.setting import Setting, plan
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from edgekv.session import Session, Vocabulary
from edgekv.settings import EvictionSettings, SelectionSettings
from test_filters import random_filters
from tinymodel import write_tiny_model

LENGTH, UBATCH = 331, 16  # the last ubatch is not full
FULL = Setting()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # attention so peaked that a token more or less shows
    return write_tiny_model(tmp_path_factory.mktemp("loss") / "tiny.gguf", n_ctx=512, scale=3)


@pytest.fixture(scope="module")
def filters(model):
    return random_filters(GGUF(model))


def text(seed: int, length: int = LENGTH) -> Text:
    return Text(f"text {seed}", (1, *np.random.default_rng(seed).integers(3, 259, length - 1).tolist()))


TEXTS = [text(0), text(1)]


def run(module, model, settings, journal=None, texts=TEXTS, **options):
    options = {"length": LENGTH, "n_ubatch": UBATCH, "n_threads": 1, **options}
    return module.evaluate(model, texts, settings, journal=journal or Journal({}), **options)


measure = functools.partial(run, perplexity)
diverge = functools.partial(run, divergence)


def nll_of(logits, token) -> float:
    """By definition, with sums that do not round."""
    top = max(logits)
    return top + math.log(math.fsum(math.exp(float(x) - top) for x in logits)) - float(logits[token])


def losses(session, tokens, n: int) -> np.ndarray:
    """What a session that is read n tokens at a time says of each next token."""
    found = []
    for start in range(0, len(tokens), n):
        logits = session.decode(tokens[start : start + n], start, logits="all").astype(np.float64)
        found += [nll_of(row, tokens[start + i + 1]) for i, row in enumerate(logits) if start + i + 1 < len(tokens)]
    return np.array(found)


def bounded(model, settings=None, filters=None, n=UBATCH, **options) -> Session:
    return Session(model, n_ctx=LENGTH, n_ubatch=n, n_threads=1, flash_attn=True, settings=settings, filters=filters,
                   **options)


@pytest.fixture(scope="module")
def results(model, filters):
    """The full cache, two policies with two budgets, and a quantised cache."""
    settings = plan(policies=["none", "streaming", "qfilters"], budgets=["100", "x8"], types=["f16", "q8_0"])
    return measure(model, settings, filters=filters)


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_of_the_full_cache(model, results):
    full = results[0]
    assert full.setting == FULL and full.nll.shape == (2, LENGTH - 1) and full.texts == ["text 0", "text 1"]
    with bounded(model) as session:
        for found, t in zip(full.nll, TEXTS):
            session.clear()
            np.testing.assert_allclose(found, losses(session, t.tokens, UBATCH), rtol=0, atol=1e-6)
    with bounded(model, n=1) as session:  # other batches round otherwise
        np.testing.assert_allclose(full.nll[0], losses(session, TEXTS[0].tokens, 1), rtol=0, atol=5e-3)
    assert full.mean == pytest.approx(full.nll.sum() / full.nll.size)
    assert full.perplexity == pytest.approx(math.exp(full.mean))


@pytest.mark.parametrize("policy, budget, tokens", [("streaming", "100", 100), ("qfilters", "x8", 41)])
def test_loss_in_a_bounded_cache(model, filters, results, policy, budget, tokens):
    """The second text, so that what the first one left in the cache would show."""
    found = next(r for r in results if r.setting == Setting(policy, budget))
    settings = EvictionSettings(policy, tokens, tokens // 4, 4, "bounded")
    with bounded(model, settings, filters if policy == "qfilters" else None) as session:
        np.testing.assert_allclose(found.nll[1], losses(session, TEXTS[1].tokens, UBATCH), rtol=0, atol=1e-6)
        stats = session.stats(0)
    assert (found.cells_allocated, found.kv_bytes) == (stats.cells_allocated, stats.kv_bytes)

    # the rule: before a ubatch that exceeds budget + n_ubatch
    used = most = evictions = 0
    first = None
    for start in range(0, LENGTH, UBATCH):
        n = min(UBATCH, LENGTH - start)
        if used + n > tokens + UBATCH:
            used, evictions, first = tokens, evictions + 1, start if first is None else first
        used += n
        most = max(most, used)
    assert (found.cells_used, found.n_evictions) == (most, evictions) and evictions > 10
    full = results[0]
    np.testing.assert_array_equal(found.nll[:, :first], full.nll[:, :first])
    assert found.behind == tokens + UBATCH and first <= found.behind < first + 2 * UBATCH
    assert (found.nll[:, found.behind :] != full.nll[:, found.behind :]).mean() > 0.9
    assert found.mean_from(found.behind) == pytest.approx(found.nll[:, tokens + UBATCH :].mean())


def test_policies_and_cache_types_reach_the_cache(model, results):
    by_label = {r.setting.label: r for r in results}
    streaming, qfilters = (by_label[f"{policy} x8"].nll for policy in ("streaming", "qfilters"))
    assert (streaming != qfilters).mean() > 0.5
    full, q8 = by_label["none"], by_label["q8_0"]
    assert q8.n_evictions == 0 and q8.behind is None and q8.kv_bytes == full.kv_bytes * 34 // 64
    with bounded(model, type_k="q8_0", type_v="q8_0") as session:
        np.testing.assert_allclose(q8.nll[0], losses(session, TEXTS[0].tokens, UBATCH), rtol=0, atol=1e-6)
    assert (q8.nll != full.nll).any()


@pytest.mark.parametrize("budget", [str(LENGTH), "100000", "x1"])
def test_a_budget_that_covers_the_text_is_the_full_cache(model, results, budget):
    [found] = measure(model, [Setting("streaming", budget)])
    np.testing.assert_array_equal(found.nll, results[0].nll)
    assert (found.n_evictions, found.behind, found.cells_used) == (0, None, LENGTH)


def test_curve(results):
    full = results[0]
    starts, means = full.curve(32)
    assert starts.tolist() == list(range(0, LENGTH - 1, 32))
    by_hand = [math.fsum(full.nll[:, s : s + 32].ravel()) / full.nll[:, s : s + 32].size for s in starts]
    np.testing.assert_allclose(means, by_hand, rtol=1e-12)
    assert len(full.curve(1)[0]) == LENGTH - 1 and full.curve(1000)[1] == pytest.approx([full.mean])


def test_selection_reads_pages_of_short_steps(model):
    quest = Setting(selection=SelectionSettings("quest", 32, 8, 0))
    with pytest.raises(EdgekvError, match=r"^quest 32 page 8 dense 0: -ub 9 reads the whole cache, .* -ub 8$"):
        measure(model, [FULL, quest], n_ubatch=9)
    full, found = measure(model, [FULL, quest], texts=[text(0, 100)], length=100, n_ubatch=8)
    with bounded(model, n=8, selection=quest.selection) as session:
        np.testing.assert_allclose(found.nll[0], losses(session, text(0, 100).tokens, 8), rtol=0, atol=1e-6)
        assert session.stats().n_selections
    np.testing.assert_allclose(full.nll[:, :16], found.nll[:, :16], rtol=0, atol=0.02)  # by another kernel
    assert np.abs(full.nll[:, 48:] - found.nll[:, 48:]).max() > 0.1


# --- comparing losses ------------------------------------------------------------------------------------------------


def loss(setting: Setting, nll) -> Loss:
    nll = np.atleast_2d(np.asarray(nll, np.float64))
    return Loss(setting, [f"{i}" for i in range(len(nll))], nll, 32, 1, 1, 1, 0, 0)


@given(st.integers(1, 3), st.integers(1, 300))
def test_blocks(n_texts, n):
    found = perplexity.blocks((n_texts, n)).reshape(n_texts, n)
    for t in range(n_texts):
        for i in range(n):
            assert (found[t, i] == found[0, 0]) == (t == 0 and i < 64)
            assert i == 0 or (found[t, i] != found[t, i - 1]) == (i % 64 == 0)
    assert len(set(found.ravel().tolist())) == n_texts * math.ceil(n / 64)


def test_differences_are_paired_over_blocks():
    rng = np.random.default_rng(0)
    base = rng.exponential(2, (4, 640))
    level = np.repeat(rng.normal(0.1, 0.5, (4, 10)), 64, axis=1)  # the same within a block
    a, b = loss(Setting("streaming", "64"), base + level), loss(FULL, base)
    found = perplexity.difference(a, b)
    assert found.n == 40 and found.mean == pytest.approx(level.mean())
    # blocks of equal values: the interval is that of 40 independent values, however the losses themselves scatter
    error = level[:, ::64].std() / math.sqrt(40)
    assert found.mean - found.low == pytest.approx(1.96 * error, rel=0.1)
    assert found.high - found.mean == pytest.approx(1.96 * error, rel=0.1)
    later = perplexity.difference(a, b, start=320)
    assert later.n == 20 and later.mean == pytest.approx(level[:, 320:].mean())

    tested = perplexity.compare(b, a)
    assert tested.difference == pytest.approx(found.mean) and (tested.n, tested.better + tested.worse) == (40, 40)
    assert tested.better == (level[:, ::64] > 0).sum()


def test_removed_share():
    rng = np.random.default_rng(1)
    full = rng.exponential(2, (2, 1280))
    added = np.abs(rng.normal(0.2, 0.05, full.shape))
    results = [loss(FULL, full), loss(Setting("streaming", "64"), full + added),
               loss(Setting("knorm", "64"), full + added * 0.35), loss(Setting("knorm", "128"), full),
               loss(Setting("knorm", "64", window=9), full)]
    shares = perplexity.removed_share(results, "knorm")
    assert list(shares) == ["knorm 64"]  # the others have no baseline of their budget and window
    share = shares["knorm 64"]
    assert (share.mean, share.low, share.high) == pytest.approx((0.65,) * 3) and share.n == 40
    assert perplexity.removed_share(results, "streaming")["streaming 64"].mean == 0

    # what varies from block to block gives the interval a width; by hand, the delta method for a ratio of means
    removed = np.repeat(rng.normal(0.1, 0.05, (2, 20)), 64, axis=1)
    results[2] = loss(Setting("knorm", "64"), results[1].nll - removed)
    share = perplexity.removed_share(results, "knorm")["knorm 64"]
    a, r = (values.reshape(40, 64).mean(axis=1) for values in (added, removed))
    error = (r - share.mean * a).std() / a.mean() / math.sqrt(40)
    assert share.mean == pytest.approx(removed.sum() / added.sum())
    assert (share.mean - share.low, share.high - share.mean) == pytest.approx((1.96 * error,) * 2, rel=0.15)


def test_no_share_of_nothing():
    noise = np.random.default_rng(2).normal(0, 1, (1, 640))
    noise += 0.01 - noise.mean()
    full = loss(FULL, np.ones((1, 640)))
    streaming, policy = Setting("streaming", "64"), Setting("knorm", "64")
    for lower in (0, 0.1):
        results = [full, loss(streaming, full.nll - lower), loss(policy, full.nll)]
        assert perplexity.removed_share(results, "knorm") == {"knorm 64": None}
    share = perplexity.removed_share([full, loss(streaming, full.nll + noise), loss(policy, full.nll)], "knorm")
    assert share["knorm 64"].mean == pytest.approx(1) and math.isnan(share["knorm 64"].low)
    with pytest.raises(ValueError, match="full cache"):
        perplexity.removed_share([loss(policy, full.nll)], "knorm")


def test_rows(results):
    table = perplexity.rows(results)
    json.dumps(table, allow_nan=False)
    assert [row["setting"] for row in table] == [r.setting.label for r in results]
    full, rest = results[0], dict(zip([r.setting.label for r in results], zip(results, table)))
    for r, row in rest.values():
        assert row["loss"] == r.mean and row["ppl"] == math.exp(r.mean)
        assert row["budget"] == {"100": 100, "x8": 41, "": None}[r.setting.budget]
        if r is full:
            assert row["added"] is None
            continue
        assert row["added"] == pytest.approx(r.mean - full.mean)
        assert row["added_low"] <= row["added"] <= row["added_high"]
        if row["behind"]:
            later = r.nll[:, row["behind"] :].mean() - full.nll[:, row["behind"] :].mean()
            assert row["added_behind"] == pytest.approx(later)
            assert row["loss_behind"] - row["full_loss_behind"] == pytest.approx(later)
    q, s = rest["qfilters 100"][0], rest["streaming 100"][0]
    share = rest["qfilters 100"][1]["removed_share"]
    assert share is None if s.mean <= full.mean else share == pytest.approx((s.mean - q.mean) / (s.mean - full.mean))
    assert rest["streaming 100"][1]["removed_share"] is None


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divergences(model, filters):
    settings = [FULL, Setting("qfilters", "x8"), Setting("streaming", "100"), Setting(type_k="q4_0", type_v="q4_0")]
    return diverge(model, settings, filters=filters, at_once=3)


def test_nothing_diverges_from_itself(model, divergences):
    zero = diverge(model, [Setting("streaming", str(LENGTH))])
    for r in (divergences[0], *zero):
        assert r.kld.shape == (2, LENGTH - 1)
        assert not r.kld.any() and not r.delta_p.any() and r.same_top.all()
        np.testing.assert_array_equal(r.nll, r.nll_base)


def test_divergence_by_hand(model, filters, divergences):
    """Of the second text, from logits of sessions on their own."""
    tokens = TEXTS[1].tokens
    of = {"qfilters x8": dict(settings=EvictionSettings("qfilters", 41, 10, 4, "bounded"), filters=filters),
          "q4_0": dict(type_k="q4_0", type_v="q4_0")}

    def probabilities(**options):
        with bounded(model, **options) as session:
            parts = [session.decode(tokens[i : i + UBATCH], i, logits="all") for i in range(0, LENGTH, UBATCH)]
        p = np.exp(np.concatenate(parts)[:-1].astype(np.longdouble))
        return p / p.sum(axis=1, keepdims=True)

    p, follow = probabilities(), (np.arange(LENGTH - 1), np.array(tokens[1:]))
    for label, options in of.items():
        q, r = probabilities(**options), next(r for r in divergences if r.setting.label == label)
        np.testing.assert_allclose(r.kld[1], (p * np.log(p / q)).sum(axis=1).astype(float), rtol=1e-6, atol=1e-13)
        np.testing.assert_allclose(r.delta_p[1], (q - p)[follow].astype(float), rtol=0, atol=6e-7)
        np.testing.assert_array_equal(r.same_top[1], p.argmax(axis=1) == q.argmax(axis=1))
        np.testing.assert_allclose(r.nll[1], -np.log(q[follow]).astype(float), rtol=0, atol=6e-7)
        np.testing.assert_allclose(r.nll_base[1], -np.log(p[follow]).astype(float), rtol=0, atol=6e-7)
        assert (r.kld >= 0).all() and r.kld.max() > 0


def test_divergence_and_loss_agree(results, divergences):
    losses = {r.setting: r for r in results}
    for r in divergences[:3]:
        np.testing.assert_array_equal(r.nll, losses[r.setting].nll)
        np.testing.assert_array_equal(r.nll_base, losses[FULL].nll)
        for name in ("cells_used", "cells_allocated", "kv_bytes", "scratch_bytes", "n_evictions", "behind", "length"):
            assert getattr(r, name) == getattr(losses[r.setting], name)
    assert not divergences[2].kld[:, :100].any() and divergences[2].kld[:, 116:].all()


logits = st.lists(st.one_of(st.floats(-30, 30), st.just(-math.inf)), min_size=7, max_size=7).filter(
    lambda row: max(row) > -math.inf)


@given(logits, logits)
def test_divergence_of_any_predictions(a, b):
    def predictions(row):
        log_p = perplexity.log_softmax(np.array([row], np.float32), "here")
        return Predictions(log_p, -log_p[:, 0])

    found = divergence.compare(predictions(a), predictions(b))
    p, q = (np.exp(np.array(row, np.float32).astype(np.longdouble)) for row in (a, b))
    p, q = p / p.sum(), q / q.sum()
    want = sum((x * (np.log(x) - np.log(y)) if y else math.inf) for x, y in zip(p, q) if x)
    assert found["kld"][0] >= 0 and found["kld"][0] == pytest.approx(float(want), rel=1e-9, abs=1e-9)
    assert found["delta_p"][0] == pytest.approx(float(q[0] - p[0]), abs=1e-12)
    assert divergence.compare(predictions(a), predictions(a))["kld"][0] == 0


def test_logits_that_are_no_numbers():
    for bad in (math.nan, math.inf):
        with pytest.raises(EdgekvError, match="^here: the logits are NaN or infinite"):
            perplexity.log_softmax(np.array([[0, bad, 1]], np.float32), "here")


def test_statistics_under_the_names_of_llama_perplexity():
    rng = np.random.default_rng(3)
    kld, delta_p = rng.exponential(0.1, (2, 1000)), rng.normal(0, 0.1, (2, 1000))
    same, nll, base = rng.random((2, 1000)) < 0.9, rng.exponential(2, (2, 1000)), rng.exponential(2, (2, 1000))
    r = Divergence(Setting("streaming", "64"), ["a", "b"], kld, delta_p, same, nll, base, 32, 1, 1, 1, 0, 0)
    for start in (0, 500):
        found = r.statistics(start)
        assert set(divergence.NAMES) <= set(found)
        n, ordered = 2 * (1000 - start), sorted(kld[:, start:].ravel())

        def percentile(share):
            at = share * (n - 1)
            low = ordered[int(at)]
            return low + (at - int(at)) * (ordered[min(int(at) + 1, n - 1)] - low)

        assert found["kld_mean"] == pytest.approx(math.fsum(ordered) / n) and found["kld_max"] == ordered[-1]
        assert found["kld_median"] == pytest.approx((ordered[n // 2 - 1] + ordered[n // 2]) / 2)
        assert found["kld_99"] == pytest.approx(percentile(0.99))
        assert found["kld_999"] == pytest.approx(percentile(0.999))
        assert found["same_top"] == pytest.approx(sum(same[:, start:].ravel()) / n)
        changes = delta_p[:, start:].ravel()
        assert found["delta_p_rms"] == pytest.approx(math.sqrt(math.fsum(x * x for x in changes) / n))
        assert found["delta_p_mean"] == pytest.approx(math.fsum(changes) / n)
        assert found["ln_ppl_ratio"] == pytest.approx(math.log(found["ppl"] / found["ppl_base"]))
        assert found["ppl"] == pytest.approx(math.exp(nll[:, start:].sum() / n))
        assert found["kld_mean_low"] < found["kld_mean"] < found["kld_mean_high"]
        assert found["same_top_low"] < found["same_top"] < found["same_top_high"]


def test_rows_of_divergences(divergences):
    table = divergence.rows(divergences)
    json.dumps(table, allow_nan=False)
    assert [row["setting"] for row in table] == ["none", "qfilters x8", "streaming 100", "q4_0"]
    assert table[0]["kld_mean"] == table[0]["kld_max"] == 0 and table[0]["same_top"] == 1
    assert [row["behind"] for row in table] == [None, 57, 116, None]
    for r, row in zip(divergences, table):
        assert row["kld_mean"] == pytest.approx(r.kld.mean())
        assert row["behind_kld_mean"] == (pytest.approx(r.kld[:, r.behind :].mean()) if r.behind else None)


# --- going on --------------------------------------------------------------------------------------------------------


class Stopped(Journal):
    """Is interrupted when it has its nth record of this run."""

    left = 0

    def add(self, key, record):
        super().add(key, record)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def figures(result) -> tuple:
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(result).values())


@pytest.mark.parametrize("module, options",
                         [(perplexity, {}), (divergence, {"at_once": 1}), (divergence, {"at_once": 2})])
@pytest.mark.parametrize("n", [1, 4])
def test_goes_on_where_it_was_stopped(model, filters, results, divergences, tmp_path, monkeypatch, module, options, n):
    settings = [r.setting for r in divergences[:3]]
    whole = [r for s in settings for r in (results if module is perplexity else divergences) if r.setting == s]
    file = tmp_path / "journal.jsonl"
    read = []
    decode = Session.decode
    monkeypatch.setattr(Session, "decode", lambda self, tokens, pos, **k: read.append(len(tokens))
                        or decode(self, tokens, pos, **k))
    with Stopped.open(file, {"edgekv_eval": 1, "config": {}}) as journal:
        journal.left = n
        with pytest.raises(KeyboardInterrupt):
            run(module, model, settings, journal, filters=filters, **options)
    with Journal.open(file, {"edgekv_eval": 1, "config": {}}) as journal:
        assert len(journal.done) == n  # with settings side by side it may end between those of one text
        read.clear()
        found = run(module, model, settings, journal, filters=filters, **options)
        assert list(map(figures, found)) == list(map(figures, whole))
        assert len(journal.done) == 6
        if module is perplexity:
            assert sum(read) == (6 - n) * LENGTH
        read.clear()
        assert list(map(figures, run(module, model, settings, journal, filters=filters, **options))) == \
            list(map(figures, whole))
        assert not read


def test_another_text_of_the_same_number_is_read(model):
    journal = Journal({})
    first = measure(model, [FULL], journal)[0]
    both = measure(model, [FULL], journal, texts=[TEXTS[0], text(7)])[0]
    assert len(journal.done) == 3
    np.testing.assert_array_equal(both.nll[0], first.nll[0])
    assert (both.nll[1] != first.nll[1]).all()


# --- texts -----------------------------------------------------------------------------------------------------------


class Letters:
    """Tokenises to one token per letter behind ``n`` that begin a text."""

    def __init__(self, n):
        self.begin = list(range(1000, 1000 + n))

    def tokenize(self, text):
        return self.begin + [ord(c) for c in text]


@given(st.integers(0, 2), st.integers(3, 12), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 5)))
def test_windows(n_begin, length, n_letters, n):
    words = "".join(chr(i) for i in range(100, 100 + n_letters))
    size = length - n_begin
    if n_letters < size:
        with pytest.raises(EdgekvError, match=f"^book.txt: has {n_letters} tokens, {size} are needed"):
            perplexity.windows(Letters(n_begin), words, "book.txt", length=length, n=n)
        return
    found = perplexity.windows(Letters(n_begin), words, "book.txt", length=length, n=n)
    assert len(found) == min(n or 99, n_letters // size) and len({t.name for t in found}) == len(found)
    end = 0
    for t in found:
        assert len(t.tokens) == length and list(t.tokens[:n_begin]) == Letters(n_begin).begin
        body = t.tokens[n_begin:]
        assert body == tuple(range(body[0], body[0] + size)) and body[0] - 100 >= end
        end = body[-1] - 100 + 1
    assert found[0].tokens[n_begin] == 100 and (len(found) == 1 or end == n_letters)


def test_texts_of_files(model, tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("0123456789" * 10, encoding="utf-8")
    b.write_text("é" * 20, encoding="utf-8")
    found = perplexity.read_texts(model, [a, b], length=32, n=2)
    assert [t.name for t in found] == [f"{a}, window 1 of 2", f"{a}, window 2 of 2", str(b)]
    with bounded(model) as session:
        for t, text in zip((found[0], found[2]), (a.read_text(encoding="utf-8"), b.read_text(encoding="utf-8"))):
            assert t.tokens == tuple(session.tokenize(text)[:32]) and t.tokens[0] == 1  # <s>
    assert len({t.digest for t in found}) == 3

    for file, why in ((tmp_path / "none.txt", "no such file"), (tmp_path, "cannot be read"), (b, "has 43 tokens, 199")):
        with pytest.raises(EdgekvError, match=f"^{file}: {why}") as error:
            perplexity.read_texts(model, [file], length=200)
        assert "\n" not in str(error.value)
    with pytest.raises(EdgekvError, match=f"^{a}: .*GGUF"):
        perplexity.read_texts(a, [a], length=32)
    with pytest.raises(EdgekvError, match="^a: windows of 1 tokens are too short"):
        perplexity.windows(Letters(1), "abc", "a", length=1)


def test_vocabulary_without_weights(model):
    """What the file says, and what a model with weights does."""
    gguf, text = GGUF(model), "Ein Satz, mit ä und 東."
    with Vocabulary(model) as vocabulary, bounded(model) as session:
        assert llama_cpp.llama_model_n_layer(vocabulary.model) == 0 < llama_cpp.llama_model_n_layer(session.model)
        assert vocabulary.n_vocab == len(gguf.get("tokenizer.ggml.tokens")) == session.n_vocab
        assert [i for i in range(vocabulary.n_vocab) if vocabulary.ends(i)] == [gguf.get("tokenizer.ggml.eos_token_id")]
        tokens = vocabulary.tokenize(text)
        assert tokens == session.tokenize(text) and tokens[0] == gguf.get("tokenizer.ggml.bos_token_id")
        assert vocabulary.tokenize(text, special=False) == tokens[1:]
        assert vocabulary.text(tokens) == session.text(tokens) == "▁" + text.replace(" ", "▁")
    assert vocabulary.model is None
    vocabulary.close()  # once more does no harm


def test_texts_of_the_calibration():
    book = "Ein Text, den die Filter kennen: ä.\n"
    filters = QFilters([], [], text_sha256=["00" * 32, hashlib.sha256(book.encode()).hexdigest()])
    assert perplexity.calibrated_on(filters, book)
    assert not perplexity.calibrated_on(filters, book.strip()) and not perplexity.calibrated_on(None, book)


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [perplexity, divergence])
@pytest.mark.parametrize("options, why", [
    (dict(n_ubatch=0), "-ub 0: must be at least 1"),
    (dict(length=1), "a length of 1 tokens has nothing to predict"),
    (dict(length=513, texts=[text(0, 513)]), r"tiny.gguf: was trained on 512 tokens of context, 513 are too many"),
    (dict(texts=[]), "there is no text to read"),
    (dict(texts=[TEXTS[0], text(5, 99)]), r"^text 5: has 99 tokens, 331 are needed"),
    (dict(settings=[Setting("clairvoyant", "64")]), r"^--kv-evict clairvoyant: unknown policy"),
    (dict(settings=[Setting("streaming")]), r"^--kv-evict streaming needs --kv-budget"),
    (dict(settings=[Setting("streaming", "-3")]), r"^--kv-budget -3:"),
    (dict(settings=[Setting("streaming", "8", window=9)]), r"^--keep 4 and --kv-window 9 exceed"),
    (dict(settings=[FULL, Setting(type_k="q9_0")]), r"^-ctk q9_0: unknown cache type"),
    (dict(settings=[Setting(type_v="q9_0")]), r"^-ctv q9_0: unknown cache type"),
    (dict(settings=[Setting(type_v="q8_0")], flash_attn=False), r"^-ctv q8_0: a quantised V needs flash attention"),
    (dict(settings=[Setting(selection=SelectionSettings())], flash_attn=False, n_ubatch=4),
     "^quest auto: needs flash attention"),
    (dict(settings=[Setting("qfilters", "64")]), r"tiny.gguf: has no Q-Filters for qfilters 64"),
])
def test_errors_in_one_line_before_anything_is_read(model, monkeypatch, module, options, why):
    monkeypatch.setattr(perplexity, "Session", None)
    with pytest.raises(EdgekvError, match=why) as error:
        run(module, model, **{"settings": [FULL], **options})
    assert "\n" not in str(error.value)


def test_other_errors(model, tmp_path):
    with pytest.raises(EdgekvError, match="none.gguf: "):
        measure(tmp_path / "none.gguf", [FULL])
    with pytest.raises(EdgekvError, match="^0 settings at once"):
        diverge(model, [FULL], at_once=0)
    with pytest.raises(ValueError, match="same label"):
        measure(model, [Setting("streaming", "64"), Setting("streaming", "64")])
    with pytest.raises(EdgekvError, match="^text 9, none: the text has a token that the model cannot give"):
        log_p = np.full((2, 3), -math.inf)
        perplexity.next_losses(log_p, np.array([0, 1, 2]), 0, "text 9, none")


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_a_real_model(smollm2):
    from edgekv.calibrate import default_text

    n = 384
    with Vocabulary(smollm2) as vocabulary:
        texts = perplexity.windows(vocabulary, default_text()[100_000:], "the default text", length=n, n=1)
    settings = plan(policies=["none", "streaming"], budgets=["96"], types=["f16", "q8_0"])
    options = dict(length=n, n_ubatch=32, texts=texts)
    full, streaming, q8 = measure(smollm2, settings, **options)
    print({r.setting.label: round(r.perplexity, 2) for r in (full, streaming, q8)})
    assert 1.5 < full.mean < 4 and abs(q8.mean - full.mean) < 0.02
    assert streaming.mean_from(streaming.behind) > full.mean_from(streaming.behind) + 0.02
    assert streaming.cells_used == 128

    kl = diverge(smollm2, settings[1:], **options)
    streamed, quantised = (r.statistics() for r in kl)
    print({name: (round(streamed[key], 4), round(quantised[key], 4)) for key, name in divergence.NAMES.items()})
    assert quantised["kld_mean"] < 0.01 < streamed["kld_mean"]
    assert quantised["same_top"] > 0.93 > streamed["same_top"]
    np.testing.assert_array_equal(kl[0].nll, streaming.nll)
