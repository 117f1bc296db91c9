"""The share of the attention that evictions and selections hold: figures against plain loops in float64 over what an
unevicted session holds, choices against all there are.

The slow test prints its figures (`-s` shows them).
"""

import json
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv import attention, native
from edgekv.calibrate import default_text
from edgekv.errors import EdgekvError
from edgekv.eval import recall
from edgekv.eval.setting import Setting, plan
from edgekv.gguf_file import GGUF
from edgekv.session import Session
from edgekv.settings import EvictionSettings, SelectionSettings
from test_attention import TEXT, by_hand
from test_filters import random_filters
from tinymodel import write_tiny_model

measure = partial(recall.measure, n_threads=1)
HELD, BEST, TOP, RANDOM, WINDOW = range(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Attention as peaked as in real models."""
    return write_tiny_model(tmp_path_factory.mktemp("recall") / "tiny.gguf", n_ctx=2048, scale=3.0)


@pytest.fixture(scope="module")
def filters(model):
    return random_filters(GGUF(model))


def quest(budget: int, page_size: int = 16, dense_layers: int = 0, **more) -> Setting:
    return Setting(selection=SelectionSettings("quest", budget, page_size, dense_layers, **more))


# --- choices ---------------------------------------------------------------------------------------------------------


@st.composite
def evictions(draw, n_max=9):
    """Masses, what stays, sinks, window; what stays has the sinks and the window, unless it is too small."""
    mass = np.array(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=n_max)), np.float64)
    n = len(mass)
    keep, window = draw(st.integers(0, n)), draw(st.integers(0, n))
    duty = set(range(keep)) | set(range(n - window, n))
    kept = set(draw(st.lists(st.integers(0, n - 1), min_size=1))) | duty
    return mass, np.array(sorted(kept), np.int32), keep, window


@given(evictions())
def test_choices_against_all_there_are(case):
    mass, kept, keep, window = case
    n, total = len(mass), mass.sum()
    duty = set(range(keep)) | set(range(n - window, n))
    all_of_them = [(set(c), sum(mass[i] for i in c)) for c in combinations(range(n), len(kept))]
    dutiful = [part for c, part in all_of_them if duty <= c]
    sinks = min(keep, len(kept))
    streaming = [*range(sinks), *range(n - len(kept) + sinks, n)]
    expected = [mass[list(kept)].sum(), max(dutiful), max(part for _, part in all_of_them), np.mean(dutiful),
                mass[streaming].sum()]
    found = recall.eviction_shares(mass, kept, keep, window)
    np.testing.assert_allclose(found, np.array(expected) / total if total else np.ones(5), rtol=0, atol=1e-12)


@given(evictions(n_max=200), st.floats(1e-3, 1e3))
def test_order_of_shares(case, unit):
    mass, kept, keep, window = case
    found = recall.eviction_shares(unit * mass, kept, keep, window)
    eps = 1e-12
    assert (found >= 0).all() and (found <= 1 + eps).all()
    assert found[HELD] <= found[BEST] + eps and found[BEST] <= found[TOP] + eps
    assert found[RANDOM] <= found[BEST] + eps and found[WINDOW] <= found[TOP] + eps
    everything = recall.eviction_shares(mass, np.arange(len(mass)), keep, window)
    np.testing.assert_allclose(everything, 1, rtol=0, atol=eps)


def test_heads_with_less_than_their_duty():
    """Where less stays than sinks and window are, the best choice has to keep those of them that the eviction kept."""
    found = recall.eviction_shares(np.array([1.0, 2, 4, 8, 1]), np.array([0, 3]), 1, 4)
    np.testing.assert_allclose(found, np.array([9, 9, 12, 9, 2]) / 16)
    found = recall.eviction_shares(np.array([1.0, 2, 4, 8, 1]), np.array([1, 4]), 3, 1)  # fewer than the sinks
    np.testing.assert_allclose(found, np.array([3, 3, 12, 3, 3]) / 16)


# --- evictions -------------------------------------------------------------------------------------------------------


def steps_of(path, length: int, n_steps: int):
    """What a session that evicts nothing holds and asks: per cache layer the steps' queries [n_steps, n_head, size],
    keys and values [n_head_kv][n, size] of all tokens, float64."""
    with Session(path, n_ctx=length, n_threads=1, flash_attn=True, tap_queries=True) as session:
        tokens, first = session.tokenize(TEXT)[:length], length - n_steps
        session.read(tokens[:first])
        layers, queries = session.layers(), []
        for i in range(first, length, 8):
            session.decode(tokens[i : i + 8], i)
            queries.append([native.last_step(session.ctx, j)[0].astype(np.float64) for j in range(len(layers))])
        rows = [[[session.rows(j, h, values=v).view(np.float16).astype(np.float64) for h in range(layer.n_head_kv)]
                 for j, layer in enumerate(layers)] for v in (False, True)]
    return [np.concatenate(q) for q in zip(*queries)], *rows


def masses(path, length: int, n_steps: int, scale: float, values: bool = False) -> list[list[np.ndarray]]:
    """What the steps pay to each token of the text, one query and one key at a time: [layer][KV head][length]."""
    queries, keys, vs = steps_of(path, length, n_steps)
    result = []
    for q, k, v in zip(queries, keys, vs):
        result.append([])
        for h, of_head in enumerate(k):
            group, mass = q.shape[1] // len(k), np.zeros(length)
            for t in range(n_steps):
                seen = length - n_steps + t + 1
                for query in q[t, h * group : (h + 1) * group]:
                    e = np.array([np.exp(scale * (query @ key)) for key in of_head[:seen]])
                    mass[:seen] += e / e.sum()
            if values:
                mass *= [np.sqrt((row**2).sum()) for row in v[h]]
            result[-1].append(mass)
    return result


def stays(path, settings: EvictionSettings, filters, n_prompt: int) -> list[list[np.ndarray]]:
    """The positions that a context of these settings keeps of a prompt."""
    with Session(path, n_ctx=512, n_threads=1, flash_attn=True, settings=settings, filters=filters) as session:
        session.read(session.tokenize(TEXT)[:n_prompt])
        session.evict()
        return [[session.positions(i, h) for h in range(layer.n_head_kv)] for i, layer in enumerate(session.layers())]


def expected_shares(mass, kept, n_prompt: int, keep: int, window: int) -> np.ndarray:
    """[5, n_layers, n_head_kv], by sorting lists."""
    result = np.zeros((5, len(mass), len(mass[0])))
    for i, layer in enumerate(mass):
        for h, of_text in enumerate(layer):
            m, mine = [float(x) for x in of_text[:n_prompt]], [int(p) for p in kept[i][h]]
            n = len(mine)
            duty = [p for p in range(n_prompt) if p < keep or p >= n_prompt - window]
            rest = sorted((m[p] for p in range(n_prompt) if p not in duty), reverse=True)
            fixed = sum(m[p] for p in duty)
            result[:, i, h] = [
                sum(m[p] for p in mine),
                fixed + sum(rest[: n - len(duty)]),
                sum(sorted(m, reverse=True)[:n]),
                fixed + sum(rest) * (n - len(duty)) / len(rest),
                sum(m[:keep]) + sum(m[-(n - keep) :]),
            ]
            result[:, i, h] /= sum(m)
    return result


def figures_of(result: recall.Recall) -> np.ndarray:
    return np.stack([result.figures[name] for name in recall.FIGURES])


@pytest.mark.parametrize("values", [False, True])
def test_evictions(model, filters, values):
    length, n_steps = 300, 20
    n_prompt = length - n_steps
    settings = [Setting("qfilters", "x4"), Setting("knorm", "32", window=0, keep=1), Setting("keydiff", "100", 64),
                Setting("streaming", "x8")]
    report = measure(model, TEXT, settings, length=length, n_steps=n_steps, filters=filters, values=values)
    mass = masses(model, length, n_steps, 32**-0.5, values)
    assert [r.setting for r in report.results] == settings and report.values == values
    for result in report.results:
        wanted = result.setting.eviction(n_prompt)
        kept = stays(model, wanted, filters, n_prompt)
        expected = expected_shares(mass, kept, n_prompt, wanted.keep, wanted.window)
        np.testing.assert_allclose(figures_of(result), expected, rtol=0, atol=1e-6)
        assert (expected[HELD] < 0.999).all() and result.layers == [0, 1]
        assert result.tokens == wanted.budget and result.part == wanted.budget / n_prompt
    streaming = report.results[-1]
    np.testing.assert_allclose(streaming.held, streaming.window, rtol=0, atol=1e-12)
    np.testing.assert_allclose(report.prompt, [[m[:n_prompt].sum() / m.sum() for m in layer] for layer in mass],
                               rtol=0, atol=1e-6)
    assert (report.sources, report.n_prompt, report.n_steps) == (["the text"], [n_prompt], n_steps)


def test_a_budget_that_covers_the_prompt(model):
    found = measure(model, TEXT, [Setting("knorm", "100"), Setting("streaming", "4000")], length=105, n_steps=5)
    for result in found.results:
        np.testing.assert_allclose(figures_of(result), 1, rtol=0, atol=1e-12)
        assert result.tokens == 100 and result.part == 1
    assert found.prompt.max() < 1


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_other_families(tmp_path, arch):
    """Layers with full attention only; a hybrid's recurrent half is copied with the rest."""
    path = write_tiny_model(tmp_path / "m.gguf", arch=arch, n_layer=4, scale=3.0,
                            **({"n_embd": 128} if arch == "lfm2" else {}))
    length, n_steps, settings = 200, 10, Setting("knorm", "40")
    found = measure(path, TEXT, [settings, quest(64)], length=length, n_steps=n_steps)
    mass = masses(path, length, n_steps, 1 if arch == "gemma3" else 32**-0.5)
    kept = stays(path, settings.eviction(190), None, 190)
    assert found.results[0].layers == [1, 3]
    np.testing.assert_allclose(figures_of(found.results[0]), expected_shares(mass, kept, 190, 4, 10), rtol=0, atol=1e-6)
    alone = attention.measure(path, TEXT, quest(64).selection, length=length, n_steps=n_steps, n_threads=1)
    np.testing.assert_allclose(found.results[1].held, alone.held, rtol=0, atol=1e-6)


# --- selections ------------------------------------------------------------------------------------------------------


def test_selections(model):
    """As plain loops have it, whether the text is read by a context that can evict or not."""
    setting = quest(100, page_size=8)
    expected = by_hand(model, setting.selection, 300, 9)
    for settings in ([setting], [Setting("knorm", "x4"), setting, quest(64, dense_layers=1)]):
        report = measure(model, TEXT, settings, length=300, n_steps=9)
        found = report.results[settings.index(setting)]
        np.testing.assert_allclose([found.held, found.best, found.window], expected, rtol=0, atol=1e-6)
        n_pages = np.mean([-(-n // 8) for n in range(292, 301)])
        assert found.tokens == 13 * 8 and found.part == pytest.approx(13 / n_pages)
        assert found.top is None and list(found.figures) == ["held", "best", "window"]
    assert report.results[2].layers == [1] and report.results[2].held.shape == (1, 2)
    covered = measure(model, TEXT, [quest(512)], length=300, n_steps=9)
    assert covered.prompt is None and covered.results[0].part == 1
    np.testing.assert_allclose(covered.results[0].held, 1, rtol=0, atol=1e-12)


def selected(path, selection, length: int, n_steps: int, values: bool) -> np.ndarray:
    """held, best, window [3, n_layers, n_head_kv] of a model with 4 query heads and 2 KV heads, from the pages that a
    session of its own chose, one query head at a time where these choose for themselves."""
    size, first = selection.page_size, length - n_steps
    with Session(path, n_ctx=length, n_threads=1, flash_attn=True, selection=selection, tap_queries=True) as session:
        tokens = session.tokenize(TEXT)[:length]
        session.read(tokens[:first])
        steps = []
        for i in range(first, length, 8):
            session.decode(tokens[i : i + 8], i)
            steps.append([native.last_step(session.ctx, il, selection.per_query_head) for il in range(2)])
        rows = [[[session.rows(il, h, values=v).view(np.float16).astype(float) for h in range(2)] for il in range(2)]
                for v in (False, True)]
    result = np.zeros((3, 2, 2))
    for il in range(2):
        queries, pages = (np.concatenate([step[il][j] for step in steps]) for j in range(2))
        sets = 4 if selection.per_query_head else 2
        assert pages.shape[:2] == (n_steps, sets)
        for c in range(sets):
            heads, h = range(c * 4 // sets, (c + 1) * 4 // sets), c * 2 // sets
            for t in range(n_steps):
                n_seen = first + t + 1
                mass = np.zeros(-(-n_seen // size))
                for j in heads:
                    e = [np.exp(queries[t, j].astype(float) @ key / np.sqrt(32)) for key in rows[0][il][h][:n_seen]]
                    for cell, weight in enumerate(e):
                        length_v = np.sqrt((rows[1][il][h][cell] ** 2).sum()) if values else 1
                        mass[cell // size] += weight / sum(e) * length_v
                chosen = [p for p in pages[t, c] if p >= 0]
                n = len(chosen)
                parts = np.array([mass[chosen].sum(), sum(sorted(mass)[len(mass) - n :]),
                                  mass[0] + mass[len(mass) - n + 1 :].sum()])
                result[:, il, h] += parts / mass.sum() / n_steps / (sets // 2)
    return result


@pytest.mark.parametrize(("per_query_head", "values"), [(False, True), (True, False), (True, True)])
def test_selections_per_query_head_and_by_values(model, per_query_head, values):
    setting = quest(64, per_query_head=per_query_head)
    report = measure(model, TEXT, [setting], length=300, n_steps=9, values=values)
    expected = selected(model, setting.selection, 300, 9, values)
    found = report.results[0]
    np.testing.assert_allclose([found.held, found.best, found.window], expected, rtol=0, atol=1e-6)
    assert found.tokens == 64 and (found.held <= found.best + 1e-12).all()


# --- reports ---------------------------------------------------------------------------------------------------------


def test_reports_of_several_texts(model):
    settings = plan(policies=["none", "knorm"], budgets=["x4", "x8"], selections=[quest(64).selection])
    texts = {"a": (TEXT, 200), "b": (TEXT[::-1], 301)}
    reports = [measure(model, text, settings + settings[:2], length=n, n_steps=9, source=name)
               for name, (text, n) in texts.items()]
    assert [r.setting for r in reports[0].results] == settings[1:]  # each once, and none but those that lose something
    both = recall.pooled(reports)
    assert (both.sources, both.n_prompt) == (["a", "b"], [191, 292])
    for i, result in enumerate(both.results):
        for name in result.figures:
            np.testing.assert_allclose(getattr(result, name), sum(getattr(r.results[i], name) for r in reports) / 2)
    assert both.results[0].tokens == (191 // 4 + 292 // 4) / 2
    np.testing.assert_allclose(both.prompt, (reports[0].prompt + reports[1].prompt) / 2)
    with pytest.raises(ValueError, match="different settings"):
        recall.pooled([reports[0], replace(reports[1], n_steps=8)])

    facts = json.loads(json.dumps(both.as_dict(), allow_nan=False))
    assert facts["texts"] == [{"text": "a", "n_prompt": 191}, {"text": "b", "n_prompt": 292}]
    assert [s["setting"] for s in facts["settings"]] == ["knorm x4", "knorm x8", "quest 64 dense 0"]
    assert [s["kind"] for s in facts["settings"]] == ["eviction", "eviction", "selection"]
    first, held = facts["settings"][0], both.results[0].held
    assert first["mean"].keys() == set(recall.FIGURES) and first["mean"]["held"] == pytest.approx(held.mean())
    layer, head = first["least_held_in"]
    assert first["least"]["held"] == held.min() == held[layer, head] == first["layers"][layer]["held"][head]


def test_layers_with_fewer_heads():
    held = np.array([[0.5, 0.25], [0.75, np.nan]])
    result = recall.Recall(Setting("knorm", "x4"), [3, 5], 1.0, 0.5, *[held] * 5)
    assert result.mean() == 0.5 and result.least() == (0.25, 3, 1)
    facts = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert [layer["held"] for layer in facts["layers"]] == [[0.5, 0.25], [0.75]]


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("why", "settings", "options"), [
    ("nothing to judge: give --kv-evict with --kv-budget, or --kv-select", [Setting()], {}),
    ("-ctk q8_0 -ctv f16: a cache that keeps every token", [Setting("knorm", "x4", type_k="q8_0")], {}),
    ("knorm x4, quest 64: an eviction and a selection are judged one by one",
     [Setting("knorm", "x4", selection=SelectionSettings("quest", 64))], {}),
    ("tiny.gguf: has no Q-Filters; edgekv convert", [Setting("qfilters", "x4")], {}),
    ("--kv-evict lru: unknown policy", [Setting("lru", "x4")], {}),
    ("--kv-budget x400: must leave at least 1 token", [Setting("knorm", "x400")], {}),
    ("--kv-window 90 exceed --kv-budget 75", [Setting("knorm", "x4", window=90)], {}),
    ("--kv-dense-layers 2: leaves no layer to judge", [quest(64, dense_layers=2)], {}),
    ("my.txt: 1264 tokens are too few, --length 2000 asks for more", [quest(64)], {"length": 2000}),
    ("--length 5000: the model was trained on 2048", [quest(64)], {"length": 5000}),
    ("--steps 364: leaves too little to read", [quest(64)], {"n_steps": 364}),
])
def test_bad_input(model, why, settings, options):
    with pytest.raises(EdgekvError) as error:
        measure(model, TEXT, settings, **{"length": 364, "source": "my.txt", **options})
    assert why in str(error.value) and "\n" not in str(error.value)


def test_filters_of_another_model(model, filters):
    with pytest.raises(EdgekvError, match="made for another model"):
        measure(model, TEXT, [Setting("qfilters", "x4")], filters=replace(filters, model_sha256="0" * 64))


@pytest.mark.parametrize("name", ["attn_k", "attn_v"])
def test_damaged_model(model, tmp_path, name):
    path, data = tmp_path / "nan.gguf", bytearray(model.read_bytes())
    tensor = GGUF(model).tensors[f"blk.1.{name}.weight"]
    data[tensor.offset : tensor.offset + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(EdgekvError, match="queries, keys or values of layer 1 are not finite"):
        measure(path, TEXT, [quest(64)], length=200, values=True)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_model(smollm2_qfilters):
    """At a quarter of the prompt Q-Filters hold far more than chance does, and chance holds what it should."""
    text = "\n\n".join(reversed(default_text().split("\n\n")))
    settings = plan(policies=["qfilters", "snapkv", "keydiff", "random"], budgets=["x4"],
                    selections=[SelectionSettings("quest", 256)])
    report = measure(smollm2_qfilters, text, settings, length=1024)
    print(f"\nof the attention {np.mean(report.prompt):.3f} goes to the prompt")
    for r in report.results:
        print(f"{r.setting.label}: " + ", ".join(f"{name} {r.mean(name):.3f}" for name in r.figures))
    found = {r.setting.method: r for r in report.results}
    q = found["qfilters"]
    assert q.held.shape == (30, 3) and (q.held <= q.best + 1e-9).all() and (q.best <= q.top + 1e-9).all()
    assert q.mean() > q.mean("random") + 0.1 and (q.held > q.random).mean() > 0.9
    assert found["random"].mean() == pytest.approx(q.mean("random"), abs=0.02)
    assert found["snapkv"].mean() > q.mean("random") + 0.1
    assert found["quest"].layers == list(range(2, 30)) and found["quest"].mean() > 0.6
