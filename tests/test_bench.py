"""``edgekv bench``: what is measured and how it is written. Nothing here depends on how fast the machine is."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from edgekv import bench, plot
from edgekv.convert import convert
from edgekv.gguf_file import GGUF
from edgekv.settings import EvictionSettings
from test_filters import random_filters
from process import EDGEKV, edgekv, fails
from tinymodel import write_tiny_model

CELL = 2 * 2 * 2 * 32 * 2  # bytes of a cell of the tiny model in f16: layers, K and V, KV heads, channels, bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny.gguf")
    convert(path, path, random_filters(GGUF(path)))
    return path


def rows_of(*args):
    r = edgekv("bench", *args, "-o", "json")
    assert r.exit_code == 0, r.output
    return json.loads(r.stdout)


def pad(cells):
    return -(-cells // 256) * 256


@pytest.fixture(scope="module")
def rows(model):
    return rows_of(model, "--kv-evict", "none,qfilters", "--kv-budget", "200,300", "-d", "0,150,1200", "-n", 8,
                   "-p", 24, "-r", 2, "-ub", 32, "-t", 1)


def test_one_row_per_setting_and_test(rows):
    key = ["kv_evict", "kv_budget", "depth", "test"]
    got = [tuple(row[k] for k in key) for row in rows]
    tests = {0: ["tg8", "pp24"], **{d: [f"prompt @ d{d}", f"tg8 @ d{d}", f"pp24 @ d{d}"] for d in (150, 1200)}}
    want = [(policy, budget, d, test) for policy, budget in (("none", None), ("qfilters", 200), ("qfilters", 300))
            for d in tests for test in tests[d]]
    assert got == want  # `none` once, however many budgets
    assert all(row["kv_select"] == "none" and row["backend"] and row["model"] == "tiny.gguf" for row in rows)
    assert all(row["threads"] == 1 and row["flash_attn"] is True and row["type_k"] == row["type_v"] == "f16"
               for row in rows)
    assert all(row["t_s"] > 0 and row["t_s_sd"] >= 0 and row["reps"] == len(row["samples_ts"]) == 2 for row in rows)


def test_memory_is_what_the_formula_says(rows):
    for row in rows:
        d, budget = row["depth"], row["kv_budget"]
        if budget is None:
            cells = pad(d + 24)
        elif d <= budget:
            cells = pad(min(d + 24, budget + 32))
        else:
            cells = pad(budget + 32)
        assert row["cells_allocated"] == cells
        assert row["kv_bytes"] == cells * CELL
        assert row["peak_rss_bytes"] > row["kv_bytes"]


def test_cells_and_evictions(rows):
    for row in rows:
        d, budget, test = row["depth"], row["kv_budget"], row["test"].split(" ")[0]
        if budget is None or d <= budget:  # nothing is evicted
            n = {"prompt": d, "tg8": 8, "pp24": 24}[test]
            assert (row["n_tokens"], row["n_evictions"], row["evict_share"]) == (n, 0, 0)
            assert row["cells_used"] == d + (0 if test == "prompt" else n)
        elif test == "tg8":  # one whole cycle, wherever it began
            assert (row["n_tokens"], row["n_evictions"]) == (32, 1)
            assert row["cells_mean"] == budget + (32 + 1) / 2
        elif test == "pp24":  # as many prompts of 24 as fill a cycle
            assert row["n_tokens"] == 48 and row["n_evictions"] in (1, 2)
        else:
            assert row["n_tokens"] == d and row["n_evictions"] == -(-(d - budget - 32) // 32)
            assert budget <= row["cells_used"] <= budget + 32
        if row["n_evictions"]:
            assert row["evict_ms"] > 0 and 0 < row["evict_share"] < 1
        assert (row["gb_s"] is not None) == (test == "tg8")


def test_formats(model):
    args = [model, "--kv-evict", "none,streaming", "--kv-budget", "40", "-d", "60", "-n", 4, "-p", 0, "-r", 1,
            "-ub", 16, "-t", 1]
    want = [("none", None, "prompt @ d60"), ("none", None, "tg4 @ d60"),
            ("streaming", 40, "prompt @ d60"), ("streaming", 40, "tg4 @ d60")]

    def summary(rows):
        return [(row["kv_evict"], int(row["kv_budget"]) if row["kv_budget"] else None, row["test"]) for row in rows]

    assert summary(rows_of(*args)) == want

    r = edgekv("bench", *args, "-o", "jsonl")
    lines = r.stdout.splitlines()
    assert r.exit_code == 0 and summary(map(json.loads, lines)) == want
    names = list(json.loads(lines[0]))

    r = edgekv("bench", *args, "-o", "csv")
    table = list(csv.DictReader(io.StringIO(r.stdout)))
    assert r.exit_code == 0 and summary(table) == want and list(table[0]) == names
    assert float(table[0]["t_s"]) > 0 and table[0]["kv_budget"] == "" and table[0]["flash_attn"] == "1"

    r = edgekv("bench", *args, "-o", "md", "--progress", "--bandwidth")
    head, rule, *body = [[cell.strip() for cell in line.strip("|").split(" | ")]
                         for line in r.stdout.splitlines() if line.startswith("|")]
    assert r.exit_code == 0 and len(body) == 4 and all(len(line) == len(head) for line in [rule, *body])
    assert [line[head.index("test")] for line in body] == [test for _, _, test in want]
    assert all(" ± " in line[head.index("t/s")] and float(line[head.index("memory GB/s")]) > 0 for line in body)
    assert "edgekv" in r.stdout.splitlines()[-1] and "repetition 1 of 1, setting 2 of 2" in r.stderr


def test_every_combination_once(model):
    settings = bench.plan(GGUF(model), depths=(0, 9, 0), n_threads=(1, 2), flash_attn=(True, False),
                          types_k=("f16", "q8_0"), types_v=("f16", "f32"), n_ubatch=(16, 32))
    assert len(settings) == len(set(settings)) == 2 ** 6
    got = rows_of(model, "-n", "2,3,0", "-p", "0", "-r", 1, "-t", 1, "-fa", "on,0", "-ctk", "f16,q8_0")
    assert [(row["type_k"], row["flash_attn"], row["test"]) for row in got] == [
        (k, fa, test) for fa in (True, False) for k in ("f16", "q8_0") for test in ("tg2", "tg3")]
    assert {row["kv_bytes"] for row in got if row["type_k"] == "q8_0"} == {256 * (CELL // 2 + CELL // 4 * 34 // 32)}


def test_a_budget_may_be_a_share_of_the_depth_or_a_size(model):
    settings = bench.plan(GGUF(model), kv_evict=("streaming",), kv_budget=("x4", f"{100 * CELL}B"), depths=(80, 400))
    assert [s.eviction.budget for s in settings] == [20, 100, 100]  # the two at depth 400 are the same
    assert len({s.depth for s in settings}) == 2


def test_selection(model):
    rows = rows_of(model, "--kv-evict", "none,streaming", "--kv-budget", 300, "--kv-select", "none,quest",
                   "--kv-select-budget", 64, "--kv-dense-layers", 1, "-d", 600, "-n", 8, "-p", 0, "-r", 1, "-ub", 32,
                   "-t", 1, "-fa", "on,off")
    assert [(row["kv_evict"], row["flash_attn"], row["kv_select"]) for row in rows[1::2]] == [
        (evict, fa, select) for evict in ("none", "streaming") for fa, select in
        ((True, "none"), (True, "quest"), (False, "none"))]  # selection needs flash attention
    for row in rows:
        cells = pad(608 if row["kv_evict"] == "none" else 332)
        selects = row["kv_select"] == "quest"
        assert row["summary_bytes"] == (cells // 16 * 2 * 2 * 32 * 2 if selects else 0)  # one layer of two KV heads
        assert row["kv_bytes"] == cells * CELL + row["summary_bytes"]
        assert (row["kv_select_budget"], row["kv_page_size"], row["kv_dense_layers"]) == (
            (64, 16, 1) if selects else (None, None, None))
        if not row["test"].startswith("tg") or not selects:
            assert row["n_selections"] == 0 and row["pages_read"] is None and row["attn_ms"] == 0
            continue
        assert row["n_selections"] == row["n_tokens"] == (8 if row["kv_evict"] == "none" else 32)
        assert row["pages_read"] == 4 * 2
        seen = [600 + i + 1 for i in range(8)] if row["kv_evict"] == "none" else [300 + i + 1 for i in range(32)]
        assert row["pages_total"] == pytest.approx(sum(-(-n // 16) for n in seen) / len(seen) * 2, abs=0.1)
        assert row["bytes_read"] == row["pages_read"] * 16 * 32 * 4 + row["pages_total"] * 2 * 32 * 2
        assert row["scores_ms"] > 0 and row["choice_ms"] > 0 and row["attn_ms"] > 0 and row["dense_ms"] > 0


def test_grouped_attention(model):
    rows = rows_of(model, "--kv-grouped-attn", "on,off", "-d", 40, "-n", 4, "-p", 0, "-r", 1, "-t", 1)
    assert [(row["kv_grouped_attn"], row["dense_ms"] > 0) for row in rows[1::2]] == [(True, True), (False, False)]


@pytest.mark.parametrize("args, why", [
    (["--kv-select", "frob"], "--kv-select frob"),
    (["--kv-select", "quest", "--kv-select-budget", "31"], "--kv-select-budget 31"),
    (["--kv-select", "quest", "--kv-page-size", "12"], "--kv-page-size 12"),
    (["--kv-select", "quest", "-fa", "off"], "add on to -fa"),
    (["--kv-select-budget", "64"], "--kv-select-budget is for selection"),
    (["--kv-page-size", "8,16"], "--kv-page-size is for selection"),
    (["--kv-dense-layers", "0"], "--kv-dense-layers is for selection"),
    (["--kv-evict", "none,frob"], "--kv-evict frob"),
    (["--kv-evict", "qfilters"], "--kv-budget"),
    (["--kv-evict", "streaming", "--kv-budget", "0"], "--kv-budget 0"),
    (["--kv-evict", "streaming", "--kv-budget", "-5"], "--kv-budget -5"),
    (["--kv-evict", "streaming", "--kv-budget", "64", "--kv-window", "80"], "--kv-window 80"),
    (["-ctk", "f16,q9_9"], "-ctk q9_9"),
    (["-ctv", "frob"], "-ctv frob"),
    (["-ctv", "q8_0", "-fa", "on,off"], "-ctv q8_0"),
    (["-n", "0", "-p", "0"], "nothing to measure"),
])
def test_wrong_settings(model, args, why):
    fails(why, "bench", model, *args)


@pytest.mark.parametrize("args, flag", [
    (["-n", "-3"], "-n"), (["-d", "1,,2"], "-d"), (["-d", "many"], "-d"), (["-t", "0"], "-t"),
    (["-fa", "maybe"], "-fa"), (["-r", "0"], "-r"), (["-o", "xml"], "-o"), (["-ub", "0"], "-ub"), (["--keep", "-1"], "--keep"),
    (["-p", "99999999999"], "-p"),
])
def test_wrong_usage(model, args, flag):
    fails(f"'{flag}'", "bench", model, *args, status=2)


def test_models_that_cannot_be_measured(model, tmp_path):
    bare = write_tiny_model(tmp_path / "bare.gguf")
    fails("bare.gguf: has no Q-Filters", "bench", bare, "--kv-evict", "none,qfilters", "--kv-budget", "64")
    fails("nope.gguf", "bench", tmp_path / "nope.gguf")
    odd = write_tiny_model(tmp_path / "odd.gguf", head_size=80)  # found out by the worker, when it makes the context
    fails("odd.gguf", "bench", odd, "-ctk", "q8_0", "-n", 1, "-p", 0, "-r", 1)


def test_copies_fill_what_is_not_evicted(model):
    rows = rows_of(model, "--kv-evict", "none,streaming", "--kv-budget", "200", "-d", "1024,3000", "-n", 8, "-p", 24,
                   "-r", 2, "-ub", 64, "-t", 1, "--fill", "copies")
    got = {}
    for row in rows:
        got.setdefault((row["kv_evict"], row["depth"]), []).append((row["test"].split()[0], row["copied_from"]))
    assert got == {
        ("none", 1024): [("prompt", None), ("tg8", None), ("pp24", None)],  # as many as are read
        ("none", 3000): [("tg8", 1024), ("pp24", 1024)],
        **{("streaming", d): [("prompt", None), ("tg8", None), ("pp24", None)] for d in (1024, 3000)},
    }
    copied = [row for row in rows if row["copied_from"]]
    assert [(row["cells_used"], row["cells_mean"], row["n_tokens"]) for row in copied] == [
        (3008, 3004.5, 8), (3024, 3024.0, 24)]
    assert all(row["kv_bytes"] >= 3024 * CELL for row in copied)


def test_a_cache_that_cannot_be_filled_with_copies(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf", arch="gemma3")
    fails("--fill copies (none, ", "bench", path, "-d", 2000, "-n", 1, "-p", 0, "-r", 1, "--fill", "copies")


def test_trace_and_plot(model, tmp_path):
    trace, plot = tmp_path / "trace.csv", tmp_path / "plot.svg"
    r = edgekv("bench", model, "--kv-evict", "none,streaming", "--kv-budget", "200", "-d", "64,500", "-n", 40, "-p", 0,
               "-r", 2, "-ub", 50, "-t", 1, "--rope-scale", 2, "--trace", trace, "--plot", plot)
    assert r.exit_code == 0, r.output
    with open(trace, newline="") as file:
        samples = list(csv.DictReader(file))
    runs = {}
    for s in samples:
        assert s["rope"] == "freq_scale 0.5" and int(s["rss_bytes"]) > 1 << 20 and s["device_bytes"] == ""
        runs.setdefault((s["kv_evict"], s["depth"], s["repetition"]), []).append(
            (s["label"], int(s["tokens"]), int(s["cells"]), float(s["seconds"])))
    assert len(runs) == 8
    for (policy, depth, _), run in runs.items():
        assert [x[3] for x in run] == sorted(x[3] for x in run) and run[0][:3] == ("start", 0, 0)
        prompt = [x[1] for x in run if x[0] == "prompt"]
        assert prompt == [*range(50, int(depth), 50), int(depth)]
        # under eviction a whole cycle is decoded, which is a ubatch
        decoded = [x[1] - int(depth) for x in run if x[0] == "tg40"]
        assert decoded == ([16, 32, 48] if (policy, depth) == ("streaming", "500") else [16, 32])
        assert all(cells <= (250 if policy == "streaming" else tokens) for _, tokens, cells, _ in run)
        assert run[-1][2] == run[-1][1] or policy == "streaming"
    picture = plot.read_text()
    for text in ("full cache", "streaming 200", "decoding (tokens/s)", "reading the prompt (tokens/s)", "tiny.gguf"):
        assert text in picture

    again = tmp_path / "again.svg"
    edgekv("bench", model, "-d", "0,64", "-n", 8, "-p", 0, "-r", 1, "-t", 1, "--plot", again)
    assert "reading the prompt" not in again.read_text() and "peak memory (MiB)" in again.read_text()


def test_the_picture_of_a_gpu(tmp_path):
    """Rows as a machine with a GPU gives them; settings are named by what differs."""
    row = dict(kv_evict="none", kv_budget=None, kv_select="none", kv_select_budget=None, kv_page_size=None,
               kv_grouped_attn=False, flash_attn=True, type_k="f16", type_v="f16", threads=8, n_ubatch=512, n_gpu_layers=99,
               rope=None, copied_from=None, test="tg32 @ d4096", depth=4096, t_s=50.0, t_s_sd=1.0, peak_rss_bytes=1 << 30,
               peak_device_bytes=5 << 30)
    rows = [row, row | dict(depth=65536, t_s=9.0, peak_device_bytes=9 << 30), row | dict(type_k="q8_0"),
            row | dict(kv_evict="keydiff", kv_budget=2048, kv_select="quest", kv_select_budget="auto")]
    plot.bench_curves(rows, tmp_path / "a.svg", "a model")
    text = (tmp_path / "a.svg").read_text()
    for name in ("full cache, -ctk f16", "full cache, -ctk q8_0", "keydiff 2,048, quest auto, -ctk f16",
                 "of the GPU dashed", "64k"):
        assert name in text
    with pytest.raises(bench.EdgekvError, match="needs decode speeds"):
        plot.bench_curves([row | dict(test="pp512")], tmp_path / "b.svg", "a model")
    assert not (tmp_path / "b.svg").exists()


def test_an_interrupted_fill_leaves_nothing(model, tmp_path):
    """The file of copies is the worker's, who is killed: its folder is not."""
    p = subprocess.Popen([*EDGEKV, "bench", str(model), "-d", "200000", "-n", "1", "-p", "0", "-t", "1", "--fill", "copies"],
                         env={**os.environ, "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: list(tmp_path.rglob("long")) or p.poll() is not None)
        p.send_signal(signal.SIGINT)
        assert "interrupted" in p.communicate(timeout=30)[1] and p.returncode == 130
    finally:
        p.kill()
        p.communicate()
    wait_for(lambda: not list(tmp_path.iterdir()))


@pytest.mark.parametrize(("arguments", "why"), [
    (["-d", "2000", "-n", "0", "-p", "0", "--fill", "copies"], "with --fill copies -n or -p"),
    (["--plot", "x.gif"], "--plot x.gif: give a file that ends in"),
    (["--plot", "x.svg", "-n", "0"], "--plot x.svg: draws how fast it decodes"),
    (["--trace", "nowhere/x.csv"], "--trace nowhere/x.csv:"),
    (["--trace", "."], "--trace .: is a folder"),
    (["--rope-scaling", "none", "--rope-scale", "2"], "--rope-scaling none stretches nothing"),
])
def test_what_cannot_be_written_is_said_first(model, arguments, why):
    fails(why, "bench", model, *arguments)


def test_a_depth_beyond_the_trained_context_is_a_note(tmp_path):
    short = write_tiny_model(tmp_path / "short.gguf", n_ctx=64, tokenizer="none")
    r = edgekv("bench", short, "-d", "100", "-n", 0, "-p", 0, "-r", 1, "-o", "json")
    assert r.exit_code == 0 and "note: -d 100" in r.stderr and [row["test"] for row in json.loads(r.stdout)] == [
        "prompt @ d100"]


def test_a_failed_check_is_an_error(model, monkeypatch):
    """The checks see a runtime that does not do what the setting says, here because it is told something else."""
    setting = bench.plan(GGUF(model), kv_evict=("streaming",), kv_budget=(80,), depths=(200,), n_threads=(1,),
                         n_ubatch=(16,))[0]
    bench._check(str(model), setting)
    real = bench._open

    def wrong(to):
        def open_(model, s, n_ctx, eviction, selection):
            return real(model, s, n_ctx, to(eviction) if eviction.policy != "none" else eviction, selection)
        return open_

    def error(task, *args):
        with pytest.raises(bench.EdgekvError, match="check failed") as e:
            task(str(model), setting, *args)
        return str(e.value)

    # a smaller window, fewer sinks, a smaller budget
    monkeypatch.setattr(bench, "_open", wrong(lambda e: EvictionSettings("knorm", e.budget, 1, e.keep)))
    assert "has not kept" in error(bench._check)
    monkeypatch.setattr(bench, "_open", wrong(lambda e: EvictionSettings(e.policy, e.budget, e.window, 0)))
    assert "has not kept" in error(bench._check)
    monkeypatch.setattr(bench, "_open", wrong(lambda e: EvictionSettings(e.policy, e.budget - 8, e.window, e.keep)))
    assert "cells" in error(bench._check)
    assert "evictions" in error(bench._run, [4], [])
    monkeypatch.setattr(bench, "_open", real)
    # logits that differ in one bit
    decode = bench.Session.decode

    def other_bits(self, *args, **kwargs):
        out = decode(self, *args, **kwargs)
        if out is not None and self.eviction_here:
            out.view("u4")[0, 0] ^= 1
        return out

    def marked(model, s, n_ctx, eviction, selection):
        session = real(model, s, n_ctx, eviction, selection)
        session.eviction_here = eviction.policy != "none"
        return session

    monkeypatch.setattr(bench, "_open", marked)
    monkeypatch.setattr(bench.Session, "decode", other_bits)
    assert "logits differ" in error(bench._check)


def test_a_worker_that_dies(model, monkeypatch, tmp_path):
    """The one line names the model and what the runtime said last, not its backtrace."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ops.cpp:7: GGML_ASSERT(n > 0) failed\n#1 0x7f0 in main' >&2\nkill -ABRT $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(script))
    setting = bench.plan(GGUF(model), n_threads=(1,))[0]
    why = r"tiny.gguf: .* ended with SIGABRT: ops.cpp:7: GGML_ASSERT\(n > 0\) failed$"
    with pytest.raises(bench.EdgekvError, match=why):
        bench.bench(model, [setting], repetitions=1)


def children(pid):
    out = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(p) for p, parent in (line.split() for line in out.splitlines()) if int(parent) == pid]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # a zombie that nobody has waited for yet is not running either
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state == "" or state.startswith("Z")


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_behind(model, how):
    """Ctrl-C, or an end without a chance to clean up, in the middle of a long run."""
    p = subprocess.Popen([*EDGEKV, "bench", str(model), "-d", "200000", "-n", "1", "-p", "0"],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
    wait_for(lambda: children(p.pid) or p.poll() is not None)
    workers = children(p.pid)
    assert workers
    p.send_signal(how)
    out, err = p.communicate(timeout=30)
    assert out == ""
    if how == signal.SIGINT:
        assert p.returncode == 130 and err.splitlines()[-1] == "edgekv: error: interrupted" and "Traceback" not in err
    wait_for(lambda: all(map(is_gone, workers)))


def test_weight_bytes(model):
    """All but the embeddings, of which a token reads one row."""
    sizes = {t.name: t.nbytes for t in GGUF(model).tensors.values()}
    assert bench.weight_bytes(GGUF(model)) == sum(sizes.values()) - sizes["token_embd.weight"]
