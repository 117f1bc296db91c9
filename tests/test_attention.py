"""The share of the attention that selection holds: figures against float64 from plain loops, and what people see.

The slow test prints its figures (`-s` shows them).
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import oracle
from edgekv import attention, native
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.session import Session
from edgekv.settings import SelectionSettings
from process import EDGEKV, edgekv, fails
from tinymodel import write_tiny_model

ROOT = Path(__file__).parents[1]
TEXT = "The pages that a step reads are those whose bound on the score is highest. " * 12  # about 900 tokens here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Attention as peaked as in real models."""
    return write_tiny_model(tmp_path_factory.mktemp("attention") / "tiny.gguf", n_ctx=2048, scale=3.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("attention") / "text.txt"
    path.write_text(TEXT)
    return path


def by_hand(path, selection: SelectionSettings, length: int, n_steps: int) -> np.ndarray:
    """held, best, window [3, n_layers, n_head_kv], one token and one cell at a time; the pages are checked as well."""
    size = selection.page_size
    with Session(path, n_ctx=length, n_threads=1, flash_attn=True, selection=selection, tap_queries=True) as session:
        tokens = session.tokenize(TEXT)[:length]
        first = length - n_steps
        session.read(tokens[:first])
        steps = []  # per token: per layer its queries [n_head, head_size] and pages [n_head_kv, n_chosen]
        for i in range(0, n_steps, 8):  # as the runtime batches: the same kernels, the same last bits
            batch = tokens[first + i : first + min(i + 8, n_steps)]
            session.decode(batch, first + i)
            found = [native.last_step(session.ctx, il) for il in range(2)]
            steps += [[(q[t], None if p is None else p[t]) for q, p in found] for t in range(len(batch))]
        keys = [[session.rows(il, h, values=False).view(np.float16).astype(float) for h in range(2)] for il in range(2)]

    result = np.zeros((3, 2, 2))
    for il in range(2):
        for h in range(2):
            for t, step in enumerate(steps):
                queries, pages = step[il]
                seen = keys[il][h][: first + t + 1]
                n_pages = -(-len(seen) // size)
                mass = np.zeros(n_pages)
                for q in queries[2 * h : 2 * h + 2].astype(float):
                    weights = np.array([np.exp(q @ key / np.sqrt(32)) for key in seen])
                    for cell, weight in enumerate(weights / weights.sum()):
                        mass[cell // size] += weight / 2
                chosen = list(range(n_pages)) if pages is None else [p for p in pages[h] if p >= 0]
                if pages is not None:
                    assert_quest(queries[2 * h : 2 * h + 2], seen, chosen, selection.budget, size)
                n = len(chosen)
                window = [0, *range(n_pages - n + 1, n_pages)]
                parts = mass[chosen].sum(), np.sort(mass)[n_pages - n :].sum(), mass[window].sum()
                result[:, il, h] += np.array(parts) / n_steps
    return result


def assert_quest(queries, keys, chosen, budget, size) -> None:
    """The choice of the oracle, but for scores that float32 cannot tell apart."""
    scores = oracle.page_scores(queries.astype(float), oracle.summaries(keys, size))
    wanted = oracle.choose_pages(scores, np.ones(len(keys), bool), size, 1, -(-budget // size))
    wanted = [p for p in wanted if p >= 0]
    assert len(chosen) == len(wanted) and chosen[0] == 0 and chosen[-1] == wanted[-1]
    assert abs(scores[np.setdiff1d(chosen, wanted)].sum() - scores[np.setdiff1d(wanted, chosen)].sum()) < 1e-3


@pytest.mark.parametrize(("budget", "page_size", "length", "n_steps"), [
    (64, 16, 400, 12),
    (100, 8, 259, 5),   # a budget that is no whole number of pages, a last page that is not full
    (384, 64, 390, 20),
])
def test_figures(model, budget, page_size, length, n_steps):
    selection = SelectionSettings(budget=budget, page_size=page_size, dense_layers=0)
    found = attention.measure(model, TEXT, selection, length=length, n_steps=n_steps, n_threads=1)
    held, best, window = by_hand(model, selection, length, n_steps)
    for ours, theirs in ((found.held, held), (found.best, best), (found.window, window)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        assert (ours <= found.best + 1e-12).all() and (ours > 0).all() and (ours < 1).all()
    assert found.layers == [0, 1] and (found.n_tokens, found.n_steps, found.n_selecting) == (length, n_steps, n_steps)
    n_chosen = -(-budget // page_size)
    assert found.budget == n_chosen * page_size and found.page_size == page_size
    assert found.pages_read == 4 * n_steps * n_chosen
    assert found.pages_total == 4 * sum(-(-(length - i) // page_size) for i in range(n_steps))


def test_all_is_held_where_the_budget_covers_the_cache(model):
    selection = SelectionSettings(budget=512, dense_layers=0)
    found = attention.measure(model, TEXT, selection, length=500, n_steps=10, n_threads=1)
    assert found.n_selecting == 0 and found.budget == 512 and found.pages_read == found.pages_total
    for share in (found.held, found.best, found.window):
        np.testing.assert_allclose(share, 1, atol=1e-12)

    # the cache is read in runs of 256 cells: the first step selects nothing, those behind 512 tokens do
    found = attention.measure(model, TEXT, selection, length=520, n_steps=24, n_threads=1)
    assert found.n_selecting == 8 and found.pages_read < found.pages_total and found.held.min() < 1


def test_dense_layers_are_not_judged(model):
    found = attention.measure(model, TEXT, SelectionSettings(budget=64, dense_layers=1), length=400, n_steps=8)
    assert found.layers == [1] and found.held.shape == (1, 2) and found.held.max() < 1
    with pytest.raises(EdgekvError, match="--kv-dense-layers 2: leaves no layer"):
        attention.measure(model, TEXT, SelectionSettings(dense_layers=2), length=400)


def test_sliding_windows(tmp_path):
    """Only layers with full attention are selected from; the queries of Gemma are scaled before the cache sees them."""
    path = write_tiny_model(tmp_path / "gemma.gguf", arch="gemma3", n_layer=4)
    found = attention.measure(path, TEXT, SelectionSettings(budget=64, dense_layers=0), length=400, n_steps=8)
    assert found.layers == [1, 3] and (found.held <= found.best + 1e-12).all()
    assert attention.Score.of(GGUF(path)).scale == 1


def test_scores_of_other_models(model):
    assert attention.Score.of(GGUF(model)) == attention.Score()

    class Other(GGUF):
        architecture = "gemma2"

    assert attention.Score.of(Other(model)) == attention.Score(1.0, 50.0)
    Other.architecture = "grok"
    with pytest.raises(EdgekvError, match="not known"):
        attention.Score.of(Other(model))

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 1, 8)), rng.standard_normal((40, 8))
    weights = np.exp(5 * np.tanh(k @ q[0, 0] * 2 / 5))
    mass = attention.page_mass(q, k, np.array([39]), 16, attention.Score(2.0, 5.0))
    np.testing.assert_allclose(mass[0], [part.sum() / weights.sum() for part in np.split(weights, [16, 32])])


# --- edgekv inspect --attention --------------------------------------------------------------------------------------

SMALL = ["--kv-select-budget", 64, "--length", 400, "--steps", 8]


def test_command(model, text):
    plain = edgekv("inspect", model, "--attention", "-f", text, *SMALL)
    assert plain.exit_code == 0, plain.output
    assert all(part in plain.stdout for part in ("400 tokens, the last 8", "budget 64 tokens", "KV head 1"))
    assert [line.split()[0] for line in plain.stdout.splitlines()[-3:]] == ["0", "1", "all"]

    facts = json.loads(edgekv("inspect", model, "--attention", "-f", text, *SMALL, "-o", "json").stdout)
    found = attention.measure(model, TEXT, SelectionSettings(budget=64, dense_layers=0), length=400, n_steps=8)
    assert facts["mean"]["held"] == pytest.approx(found.held.mean(), abs=1e-6)
    assert facts["layers"][1]["best"] == pytest.approx(found.best[1], abs=1e-6) and facts["n_selecting"] == 8

    command = [*EDGEKV, "inspect", str(model), "--attention", "-f", "-", *map(str, SMALL)]
    piped = subprocess.run(command, input=TEXT, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stdout == plain.stdout and piped.stderr == ""
    covered = edgekv("inspect", model, "--attention", "-f", text, "--length", 300, "--steps", 8)
    assert "8 of 8 steps the budget covered the cache" in covered.stdout and "1.000/1.000" in covered.stdout


def test_many_heads(tmp_path, text):
    path = write_tiny_model(tmp_path / "heads.gguf", n_head=12, n_head_kv=12)
    r = edgekv("inspect", path, "--attention", "-f", text, *SMALL)
    assert r.exit_code == 0 and "least KV head" in r.stdout and "KV head 0" not in r.stdout


@pytest.mark.parametrize(("why", "arguments", "status"), [
    ("--attention needs a text: -f FILE", ["--attention"], 2),
    ("-f is for --attention", ["-f", "TEXT"], 2),
    ("--steps is for --attention", ["--steps", 8], 2),
    ("--kv-select-budget is for --attention", ["--kv-select-budget", 64], 2),
    ("--kv-budget is not for --attention", ["--attention", "-f", "TEXT", "--kv-budget", 64], 2),
    ("--ctx-size is not for --attention", ["--attention", "-f", "TEXT", "-c", 64], 2),
    ("-f nope.txt: No such file", ["--attention", "-f", "nope.txt"], 1),
    ("-f EMPTY: the text is empty", ["--attention", "-f", "EMPTY"], 1),
    ("tokens are too few, --length 2000 asks for more", ["--attention", "-f", "TEXT", "--length", 2000], 1),
    ("tokens are too few, more than --steps 1500 are needed", ["--attention", "-f", "TEXT", "--steps", 1500], 1),
    ("--length 5000: the model was trained on 2048", ["--attention", "-f", "TEXT", "--length", 5000], 1),
    ("--steps 64: leaves too little to read", ["--attention", "-f", "TEXT", "--length", 64], 1),
    ("--kv-dense-layers 9: leaves no layer", ["--attention", "-f", "TEXT", "--kv-dense-layers", 9], 1),
    ("--kv-select-budget 31: must be two pages", ["--attention", "-f", "TEXT", "--kv-select-budget", 31], 1),
    ("--kv-select-budget x8: give a number", ["--attention", "-f", "TEXT", "--kv-select-budget", "x8"], 1),
])
def test_bad_input(model, text, tmp_path, why, arguments, status):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    files = {"TEXT": text, "EMPTY": empty}
    fails(why.replace("EMPTY", str(empty)), "inspect", model, *(files.get(a, a) for a in arguments), status=status)


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", ["the documentation", "Python's help"])
def test_real_model_holds_its_attention(smollm2, source):
    """An eighth of 2,048 tokens is read; the best choice of as many pages would hold about 0.8."""
    if source == "the documentation":
        names = ("eviction", "architecture", "conversations")
        text = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in names)
    else:
        from edgekv.calibrate import default_text

        text = default_text()[:20000]
    found = attention.measure(smollm2, text, SelectionSettings(budget=256, dense_layers=0), length=2048)
    held, best, window = (share.mean() for share in (found.held, found.best, found.window))
    least = found.held.mean(axis=1).min()
    print(f"\n{source}: held {held:.3f}, best possible {best:.3f}, window {window:.3f}; least layer {least:.3f}")
    assert found.n_selecting == found.n_steps == 64 and found.budget == 256
    assert found.held.shape == (30, 3) and (found.held <= found.best + 1e-9).all()
    assert held >= 0.70 and best <= 0.95 and held >= 0.85 * best
