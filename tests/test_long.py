"""The scripts of long contexts in benchmarks/: what they measure on tiny models, and what they make of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv import plot
from process import edgekv
from tinymodel import write_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    return subprocess.run([sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)], capture_output=True,
                          text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("long") / "tiny.gguf", arch="gemma3", n_ctx=8192)


def test_every_setting_reads_the_same_document(model, tmp_path):
    only = "full cache; full cache, windows only; full cache, q8_0; kvdiff+qfilters+recency 256; streaming 256"
    r = run("long", model, "-c", 3000, "--kv-budget", 256, "--only", only, "-t", 1, "-o", tmp_path / "r.json", "--plot",
            tmp_path / "r.svg")
    assert r.returncode == 0, r.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    rows = record["rows"]
    assert list(rows) == only.split("; ")
    assert len({row["n_tokens"] for row in rows.values()}) == 1 and 2900 < rows["full cache"]["n_tokens"] < 3100
    for name, row in rows.items():
        evicts = name[-3:] == "256"
        assert (row["n_evictions"] > 0) == evicts and (row["cells"] < 1100) == evicts
        read = [sample["tokens"] for sample in row["trace"] if sample["label"] == "prompt"]
        assert read == [*range(512, row["n_tokens"], 512), row["n_tokens"]]
        assert all(sample["cells"] <= (768 if evicts else sample["tokens"]) for sample in row["trace"])
        assert [len(entries) for entries in row["answers"].values()] == [3, 3, 3]
        assert row["answers"]["middle"][1]["question"] == "Which city did Irene visit?"
    assert rows["full cache, windows only"]["kv_bytes"] < rows["full cache"]["kv_bytes"]
    assert rows["full cache, q8_0"]["kv_bytes"] * 32 == rows["full cache"]["kv_bytes"] * 17
    lines = [line for line in r.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(rows) and "memory added" in lines[0] and " of 3 " in lines[2]
    assert all(name in (tmp_path / "r.svg").read_text() for name in rows)
    again = run("long", "--record", tmp_path / "r.json", "--plot", tmp_path / "again.svg")
    assert again.returncode == 0 and again.stdout == r.stdout
    assert (tmp_path / "again.svg").read_text() == (tmp_path / "r.svg").read_text()


def test_the_document_holds_the_facts_where_it_says(model):
    long = script("long")
    llama = long.edgekv.Llama(model, n_ctx=256, n_threads=1)
    text = long.document(llama, 6000)
    assert text == long.document(llama, 6000) and abs(len(llama.tokenize(text.encode(), add_bos=False)) - 6000) < 100
    for share, known in long.PLACES.values():
        for i, (name, value) in enumerate(known):
            fact = f"{long.FACTS[i][0].format(name)} {value}.\n"
            assert text.count(fact.strip()) == 1 and text.count(name) == 1
            assert abs(text.index(fact.strip()) / len(text) - share) < 0.1


def test_what_is_made_of_a_trace():
    long = script("long")
    # 100 tokens at 10 ms each, then 100 at 20, 30, 40; memory grows by 7 bytes per 100 tokens
    trace, seconds = [dict(tokens=0, seconds=0.0, rss_bytes=1000)], 0.0
    for i in range(40):
        seconds += 10 * 0.01 * (i // 10 + 1)
        trace.append(dict(tokens=10 * (i + 1), seconds=seconds, rss_bytes=1000 + 7 * (i // 10)))
    assert long.quarters(trace) == pytest.approx([0.01, 0.02, 0.03, 0.04])
    trace[-1]["rss_bytes"] += 500  # the checkpoint at the end
    assert long.growth(trace) == 21
    assert long.right([{"value": "Lisbon", "answer": "lisbon, of course"}, {"value": "48213", "answer": "4821"}]) == 1


@pytest.mark.parametrize(("arguments", "why"), [
    (["--only", "full"], "--only full: choose from"), (["--plot", "x.gif"], "give a file that ends in"),
    (["--record", __file__], "give what -o wrote"), (["-o", "nowhere/x.json"], "no folder that can be written to")])
def test_bad_arguments(model, arguments, why):
    r = run("long", model, *arguments)
    assert r.returncode == 1 and why in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr


def test_figure_draws_what_bench_drew(tmp_path):
    tiny = write_tiny_model(tmp_path / "tiny.gguf")
    out = {}
    for name, arguments in {"a": ["--kv-evict", "none,streaming", "--kv-budget", 100, "-d", "64,1100"],
                            "b": ["-d", 1100, "--fill", "copies"]}.items():
        r = edgekv("bench", tiny, *arguments, "-n", 4, "-p", 0, "-r", 1, "-ub", 64, "-t", 1, "-o", "json", "--trace",
                   tmp_path / f"{name}.csv", "--plot", tmp_path / f"{name}.svg")
        assert r.exit_code == 0, r.output
        (tmp_path / f"{name}.json").write_text(r.stdout)
        out[name] = json.loads(r.stdout)
    r = run("figure", tmp_path / "a.json", "--trace", tmp_path / "a.csv", "-o", tmp_path / "again.svg")
    assert r.returncode == 0 and (tmp_path / "again.svg").read_text() == (tmp_path / "a.svg").read_text()

    # a depth that was read stands for the same one filled with copies, in whatever order they come
    figure = script("figure")
    samples = [s for name in "ba" for s in figure.read_trace(tmp_path / f"{name}.csv")]
    plot.bench_curves([*out["b"], *out["a"]], tmp_path / "both.svg", f"tiny.gguf: {out['a'][0]['machine']}", samples)
    assert (tmp_path / "both.svg").read_text() == (tmp_path / "a.svg").read_text()
