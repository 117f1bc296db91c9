"""``edgekv eval``: its tables are those of the library called by hand, what is wrong is one line, and what was killed
goes on. The model is random; where answers must not be all wrong, a checksum of what it says is its score."""

import csv
import dataclasses
import hashlib
import io
import json
import signal
import subprocess
import zlib

import numpy as np
import pytest

from edgekv import calibrate
from edgekv.convert import convert
from edgekv.eval import divergence, haystack, needles, perplexity, recall, tasks
from edgekv.eval.journal import Journal
from edgekv.eval.report import Needles
from edgekv.eval.setting import plan
from edgekv.gguf_file import GGUF
from edgekv.session import Session, Vocabulary
from edgekv.settings import SelectionSettings
from process import edgekv, fails, python
from test_filters import random_filters
from tinymodel import write_tiny_model

SWEEP = ["--kv-evict", "qfilters,streaming", "--kv-window", "9", "--keep", "3", "-t", "1"]
COMMANDS = ("niah", "ruler", "ppl", "kl", "attention")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("eval") / "tiny.gguf", n_layer=3, n_ctx=1024, scale=3)
    convert(path, path, random_filters(GGUF(path)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(calibrate.default_text()[20000:32000])
    return path


@pytest.fixture
def knowing(monkeypatch):
    """A model that is right often enough, more with some settings than with others."""
    monkeypatch.setattr(tasks.Question, "score", lambda self, answer: 0.65 + zlib.crc32(answer.encode()) % 30 / 100)


def out(*args):
    r = edgekv("eval", *args)
    assert r.exit_code == 0, r.output
    return r.stdout


def from_csv(text):
    return list(csv.DictReader(io.StringIO(text)))


def lines_of(markdown):
    """The cells of the first table, without its heading."""
    table = markdown.split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def as_json(value):
    return json.loads(json.dumps(value, default=lambda x: x.tolist()))


def documents_of(model, text, make):
    hay = haystack.Haystack(haystack.paragraphs([text]))
    with Vocabulary(model) as vocabulary:
        documents = list(make(hay, vocabulary.tokenize))
        return documents, [len(vocabulary.tokenize(d.text)) for d in documents]


def filters_of(model):
    return calibrate.filters_for(model)


# --- needles ---------------------------------------------------------------------------------------------------------


def test_niah(model, text, tmp_path, knowing):
    log = tmp_path / "log"
    args = ["niah", model, "-f", text, "-c", "400,600", "-n", "2", "-s", "5", "--tasks", "words,key", *SWEEP,
            "--kv-budget", "x4,80", "-ctk", "q8_0", "--kv-select", "quest", "--kv-select-budget", "64,auto",
            "--kv-page-size", "8", "--kv-dense-layers", "0", "--question-first", "--against", "streaming", "--log", log]
    found = json.loads(out(*args, "-o", "json"))

    documents, n_tokens = documents_of(model, text, lambda hay, tokenize: tasks.needle_documents(
        hay, tokenize, lengths=[400, 600], seeds=[5, 6], tasks=["words", "key"], question_first=True))
    selections = [SelectionSettings("quest", budget, 8, 0) for budget in (64, 0)]
    settings = plan(policies=["qfilters", "streaming"], budgets=["x4", "80"], window=9, keep=3, types=["q8_0"],
                    selections=selections)
    scores = needles.run(model, documents, settings, Journal({}), filters=filters_of(model), n_threads=1)
    expected = Needles(scores)
    assert found["settings"] == as_json(expected.rows("streaming"))
    assert found["methods"] == as_json(expected.method_rows("streaming"))
    rows = {row["label"]: row for row in found["settings"]}
    assert len({row["mean"] for row in rows.values()}) > 4 and rows["none"]["mean"] > 0.6
    assert rows["quest 64 page 8 dense 0"]["compression"] == pytest.approx(np.mean(n_tokens) / 64)
    assert rows["quest auto page 8 dense 0"]["compression"] == 1

    config, cases = found["header"]["config"], found["header"]["cases"]
    assert cases["lengths"] == [400, 600] and cases["seeds"] == [5, 2] and config["question_first"] is True
    assert config["filters"] == hashlib.sha256(filters_of(model).flat().tobytes()).hexdigest()
    tuned = config["settings"][1]
    assert (tuned["label"], tuned["window"], tuned["keep"]) == ("qfilters x4 window 9 keep 3", 9, 3)

    # other formats of what is in the log, which nothing is added to
    size = log.stat().st_size
    markdown = out(*args)
    assert [line[0] for line in lines_of(markdown)] == [row["label"] for row in found["settings"]]
    assert "against streaming" in markdown and "how many times fewer tokens a step reads" in markdown
    table = from_csv(out(*args, "-o", "csv"))
    assert {row["label"]: float(row["mean"]) for row in table if row["task"] == "pooled"} == {
        label: row["mean"] for label, row in rows.items()}
    assert log.stat().st_size == size


def test_more_cases_go_on_where_fewer_ended(model, text, tmp_path, knowing):
    """With the same log; and fewer of them are a part of it."""
    log = tmp_path / "log"

    def table(n, lengths="400", *more):
        return json.loads(out("niah", model, "-f", text, "-c", lengths, "-n", n, "--tasks", "key", *SWEEP, "--kv-budget", "x4",
                              "-o", "json", *more))["settings"]

    first = table(1, "400", "--log", log)
    begun = log.read_bytes()
    more = table(3, "400,500", "--log", log)
    assert log.read_bytes().startswith(begun) and more == table(3, "400,500") != first
    size = log.stat().st_size
    assert table(1, "400", "--log", log) == first and log.stat().st_size == size


def test_niah_bounded_at_depths_and_separate(model, text, tmp_path, knowing):
    plot = tmp_path / "map.svg"
    found = json.loads(out("niah", model, "-f", text, "-c", "400", "-n", "2", "--tasks", "key,words", "--depths",
                           "0,0.5", "--separate", *SWEEP, "--kv-budget", "x4", "--mode", "bounded", "-o", "json",
                           "--plot", plot))
    documents, _ = documents_of(model, text, lambda hay, tokenize: tasks.needle_documents(
        hay, tokenize, lengths=[400], seeds=[0, 1], tasks=["key", "words"], depths=[0.0, 0.5], separate=True))
    settings = plan(policies=["qfilters", "streaming"], budgets=["x4"], window=9, keep=3)
    scores = needles.run(model, documents, settings, Journal({}), filters=filters_of(model), mode="bounded",
                         n_threads=1)
    assert len(documents) == 8 and found["settings"] == as_json(Needles(scores).rows())
    assert "depth of the needle" in plot.read_text() and "qfilters x4" in plot.read_text()


def test_ruler(model, text, tmp_path, knowing):
    plot = tmp_path / "curves.svg"
    found = json.loads(out("ruler", model, "-f", text, "-c", "800", "-n", "2", "--tasks", "vt,niah_single_word", *SWEEP,
                           "--kv-budget", "x4,x2", "--chains", "2", "--hops", "3", "-o", "json", "--plot", plot))
    documents, _ = documents_of(model, text, lambda hay, tokenize: [
        d for task in ("vt", "niah_single_word")
        for d in tasks.ruler_documents(task, hay, tokenize, lengths=[800], seeds=[0, 1], chains=2, hops=3)])
    settings = plan(policies=["qfilters", "streaming"], budgets=["x4", "x2"], window=9, keep=3)
    scores = needles.run(model, documents, settings, Journal({}), filters=filters_of(model), n_threads=1)
    assert found["settings"] == as_json(Needles(scores).rows())
    assert "how many times smaller" in plot.read_text()


def test_a_model_at_the_floor_is_no_success(model, text):
    args = ["niah", model, "-f", text, "-c", "300", "-n", "1", "--tasks", "key", "-t", "1", "--kv-budget", "x4"]
    markdown = out(*args)
    assert "The model itself fails" in markdown and "pooled" not in markdown and "(key 300)" in markdown
    assert all(row["mean"] is None for row in json.loads(out(*args, "-o", "json"))["settings"])


# --- texts -----------------------------------------------------------------------------------------------------------


def windows_of(model, text, length, n):
    return perplexity.read_texts(model, [text], length=length, n=n)


def test_ppl(model, text, tmp_path):
    plot, log = tmp_path / "loss.svg", tmp_path / "log"
    args = ["ppl", model, "-f", text, "--length", "250", "-n", "2", "-ub", "16", *SWEEP, "--kv-budget", "64,x2", "-ctk",
            "q4_0", "--log", log]
    found = json.loads(out(*args, "-o", "json", "--plot", plot))
    settings = plan(policies=["qfilters", "streaming"], budgets=["64", "x2"], window=9, keep=3, types=["q4_0"])
    results = perplexity.evaluate(model, windows_of(model, text, 250, 2), settings, length=250, journal=Journal({}),
                                  n_ubatch=16, filters=filters_of(model), n_threads=1)
    assert found["settings"] == as_json(perplexity.rows(results))
    assert len({row["loss"] for row in found["settings"]}) == 6
    first = results[0].curve()
    assert found["curves"]["none"] == {"position": first[0].tolist(), "loss": first[1].tolist()}
    assert "loss (nats per token)" in plot.read_text() and "qfilters 64" in plot.read_text()

    table = lines_of(out(*args))
    assert [line[0] for line in table] == [s.label for s in settings]
    assert [line[1] for line in table] == [f"{r.perplexity:.3f}" for r in results]
    added = perplexity.difference(results[1], results[0])
    assert table[1][3] == f"{added.mean:+.3f} [{added.low:+.3f}, {added.high:+.3f}]"
    table = from_csv(out(*args, "-o", "csv"))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in found["settings"]]


def test_kl(model, text, tmp_path):
    log = tmp_path / "log"
    args = ["kl", model, "-f", text, "--length", "250", "-ub", "8", *SWEEP, "--kv-budget", "64", "--at-once", "2",
            "--kv-select", "quest", "--kv-select-budget", "64", "--kv-dense-layers", "0", "--log", log]
    found = json.loads(out(*args, "-o", "json", "--plot", tmp_path / "loss.png"))
    settings = plan(policies=["qfilters", "streaming"], budgets=["64"], window=9, keep=3,
                    selections=[SelectionSettings("quest", 64, 16, 0)])
    results = divergence.evaluate(model, windows_of(model, text, 250, 1), settings[1:], length=250, journal=Journal({}),
                                  n_ubatch=8, filters=filters_of(model), n_threads=1)
    assert found["settings"] == as_json(divergence.rows(results))
    assert len(found["settings"]) == 3 and all(row["kld_mean"] > 1e-6 for row in found["settings"])
    assert (tmp_path / "loss.png").stat().st_size > 1000

    markdown = out(*args)
    kld, same = (found["settings"][0][name] for name in ("kld_mean", "same_top"))
    assert lines_of(markdown)[0][1].split()[0] == f"{kld:.3f}" and f"{100 * same:.1f} [" in lines_of(markdown)[0][6]
    assert f"Mean PPL(base): {found['settings'][0]['ppl_base']:.3f}" in markdown
    assert [float(row["kld_mean"]) for row in from_csv(out(*args, "-o", "csv"))] == [
        row["kld_mean"] for row in found["settings"]]


def test_attention(model, text):
    args = ["attention", model, "-f", text, "-f", text, "--length", "300", "--steps", "16", "--values", *SWEEP,
            "--kv-budget", "x4", "--kv-select", "quest", "--kv-select-budget", "64", "--kv-dense-layers", "0"]
    found = json.loads(out(*args, "-o", "json"))
    settings = plan(policies=["qfilters", "streaming"], budgets=["x4"], window=9, keep=3,
                    selections=[SelectionSettings("quest", 64, 16, 0)])
    report = recall.measure(model, text.read_text(), settings, length=300, n_steps=16, values=True,
                            filters=filters_of(model), n_threads=1, source=str(text))
    expected = as_json(recall.pooled([report, report]).as_dict())
    assert {name: found[name] for name in expected} == expected and len(expected["texts"]) == 2
    assert found["header"]["config"]["values"] is True

    markdown, table = out(*args), from_csv(out(*args, "-o", "csv"))
    for line, row, result in zip(lines_of(markdown), table, report.results, strict=True):
        (least, layer, head) = result.least()
        assert line[0] == row["setting"] == result.setting.label
        assert line[3] == f"{100 * result.mean():.1f}" and float(row["held"]) == pytest.approx(result.mean())
        assert (int(row["least_layer"]), int(row["least_head"])) == (layer, head)
        assert float(row["least"]) == pytest.approx(least)
    assert [row["top"] == "" for row in table] == [False, False, True]
    assert "norm of V" in markdown and "284 tokens of" in markdown


def test_without_a_text(model, text, monkeypatch):
    monkeypatch.setattr(haystack, "default_paragraphs", lambda: haystack.paragraphs([text]))
    r = edgekv("eval", "ppl", model, "--length", "60", "-t", "1", "--kv-evict", "none")
    assert r.exit_code == 0 and "no -f, so the text is the docstrings" in r.stderr
    found = json.loads(out("niah", model, "-c", "300", "-n", "1", "--tasks", "key", "-t", "1", "--kv-evict", "none",
                           "-o", "json"))
    assert found["header"]["config"]["haystack"] == haystack.Haystack(haystack.paragraphs([text])).sha256


def test_filters_made_from_the_same_text(model, text, tmp_path):
    flattered = tmp_path / "flattered.gguf"
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    convert(model, flattered, dataclasses.replace(filters_of(model), text_sha256=[digest]))
    for command in ("niah", "ppl"):
        length = ["-c", "300", "-n", "1", "--tasks", "key"] if command == "niah" else ["--length", "100"]
        args = ["-f", text, *length, "-t", "1", "--kv-evict", "qfilters", "--kv-budget", "40"]
        assert f"calibrated on {text}" in edgekv("eval", command, flattered, *args).stderr
        assert "calibrated on" not in edgekv("eval", command, model, *args).stderr


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("args, why", [
    (["--kv-evict", "frob"], "--kv-evict frob: unknown policy"),
    (["--kv-budget", "many"], "--kv-budget many"),
    (["--kv-window", "90", "--kv-budget", "64"], "--kv-window 90"),
    (["--kv-select-budget", "64"], "add --kv-select quest"),
    (["--kv-select-heads", "query"], "add --kv-select quest"),
    (["--kv-select", "quest", "--kv-select-budget", "8"], "--kv-select-budget 8"),
    (["-f", "nope.txt"], "nope.txt"),
])
def test_wrong_settings(model, monkeypatch, command, args, why):
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("the model is loaded"))
    monkeypatch.setattr(haystack, "default_paragraphs", lambda: pytest.fail("there is work already"))
    fails(why, "eval", command, model, *(["-c", "900"] if command in ("niah", "ruler") else []), *args)


@pytest.mark.parametrize("args, why", [
    (["niah", "-ctk", "f17"], "-ctk f17"),
    (["niah", "-c", "2000"], "--lengths 2000: the model was trained on 1024"),
    (["niah", "-c", "100"], "--lengths 100: too short"),
    (["niah", "--against", "keydiff"],
     "--against keydiff: is not measured here; choose one of none, kvdiff+qfilters+recency, streaming"),
    (["niah", "-c", "400", "--kv-window", "60", "--kv-budget", "x8"], "exceed --kv-budget 50"),
    (["ruler", "-c", "100", "--tasks", "fwe"], "--lengths 100: too short for fwe"),
    (["ppl", "--length", "2000"], "--length 2000: the model was trained on 1024"),
    (["ppl", "--kv-select", "quest"], "-ub 8"),
    (["ppl", "--length", "900", "--plot", "loss.txt"], "--plot loss.txt"),
    (["kl", "--kv-evict", "none"], "nothing to compare"),
    (["kl", "--length", "2000"], "--length 2000"),
    (["attention", "--kv-evict", "none"], "--kv-evict none"),
    (["attention", "--length", "100", "--steps", "100"], "--steps 100"),
    (["attention", "--length", "2000"], "--length 2000"),
    (["niah", "--tasks", "key", "--log", "no/such/folder"], "another --log file"),
])
def test_wrong_wishes(model, text, monkeypatch, args, why):
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("the model is loaded"))
    command, *args = args
    length = [] if command not in ("niah", "ruler") or "-c" in args else ["-c", "300"]
    fails(why, "eval", command, model, "-f", text, *length, *args)


@pytest.mark.parametrize("command", ["niah", "ruler", "attention"])
@pytest.mark.parametrize("policy", ["streaming", "qfilters"])  # no filters are made first
def test_documents_are_shorter_than_their_length(tmp_path, text, monkeypatch, command, policy):
    """Fits the length that was asked for, and not the shortest document."""
    model = write_tiny_model(tmp_path / "bare.gguf", n_ctx=1024)
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("the model is loaded"))
    monkeypatch.setattr("edgekv.calibrate.filters_for", lambda *_, **__: pytest.fail("filters are made"))
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:400])
    args, length = {"niah": (["-c", "800", "-n", "2"], 800), "ruler": (["-c", "800", "-n", "2", "--tasks", "vt"], 800),
                    "attention": (["-f", short, "--steps", "16"], 1024 - 16)}[command]
    fails(f"--keep 4 and --kv-window {length // 8 - 4} exceed --kv-budget", "eval", command, model, "-f", text, *args,
          "--kv-evict", policy, "--kv-budget", "x8", "--kv-window", length // 8 - 4)


@pytest.mark.parametrize("args, flag", [
    (["niah", "--depths", "0,1.5"], "--depths"), (["niah", "--depths", "low"], "--depths"),
    (["niah", "--depths", "nan"], "--depths"), (["niah", "--tasks", "words,frob"], "--tasks"),
    (["ruler", "--tasks", "words"], "--tasks"), (["niah", "-c", "1,,2"], "-c"), (["niah", "-n", "0"], "-n"),
    (["niah", "--mode", "never"], "--mode"), (["ppl", "-o", "xml"], "-o"), (["kl", "--at-once", "0"], "--at-once"),
    (["attention", "--kv-select-heads", "all"], "--kv-select-heads"),
])
def test_wrong_usage(model, args, flag):
    fails(f"'{flag}'", "eval", args[0], model, *args[1:], status=2)


def test_plots_need_matplotlib(model, monkeypatch, tmp_path):
    monkeypatch.setattr("edgekv.extras.find_spec", lambda name: None)
    for command in ("niah", "ruler", "ppl", "kl"):
        fails("--plot needs matplotlib; pip install 'edgekv[plot]'", "eval", command, model, "--plot",
              tmp_path / "a.png")


# --- going on --------------------------------------------------------------------------------------------------------


def going_on(command, model, text):
    args = {"niah": ["-c", "300,400", "-n", "3", "--tasks", "key,words", "-ctk", "q8_0", "--kv-budget", "x4"],
            "kl": ["--length", "200", "-n", "2", "-ub", "16", "--at-once", "1", "--kv-budget", "40,60"]}[command]
    return [command, model, "-f", text, *SWEEP, *args, "-o", "json"]


def result(printed):
    """All but the header, which has the time in it."""
    found = json.loads(printed)
    return found.pop("header")["config"], found


@pytest.mark.parametrize("command, n", [("niah", 12), ("kl", 8)])
def test_killed_and_started_again(model, text, tmp_path, monkeypatch, command, n):
    """SIGKILL to a real process in the middle, half a line written."""
    args, log = going_on(command, model, text), tmp_path / "log"
    code = ("import os, signal\nfrom edgekv.cli import main\nfrom edgekv.eval.journal import Journal\n"
            "add = Journal.add\n"
            "def killed(self, key, record):\n    add(self, key, record)\n    if len(self.done) == 3:\n"
            "        os.write(self._file.fileno(), b'{\"key\": \"half')\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "Journal.add = killed\nmain()")
    done = subprocess.run([*python(code), "eval", *map(str, args), "--log", log], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stdout == "", done.stderr
    lines = log.read_text().split("\n")
    assert len(lines) == 5 and lines[4] == '{"key": "half'
    assert json.loads(lines[0])["config"]["texts" if command == "kl" else "haystack"]

    # other tests may have loaded more variants into this process
    variant = json.loads(lines[0])["machine"]["cpu_variant"]
    monkeypatch.setattr("edgekv.native.cpu_variant", lambda: variant)
    added = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, key, record: (added.append(key), add(self, key, record)))
    went_on = result(out(*args, "--log", log))
    assert len(added) == n - 3
    assert went_on == result(out(*args)) and len(added) == n - 3 + n  # without a log, from the start
    assert log.read_text().startswith("\n".join(lines[:4])) and log.read_text().count("\n") == n + 1

    fails("was begun with other settings", "eval", *args, "--log", log, "--keep", "2")
    fails("was begun with another evaluation", "eval", "ppl", model, "-f", text, "--length", "100", "--log", log)


def test_ctrl_c(model, text, tmp_path, monkeypatch):
    args, log = going_on("niah", model, text), tmp_path / "log"
    expected = result(out(*args))
    add = Journal.add

    def interrupted(self, key, record):
        add(self, key, record)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Journal, "add", interrupted)
        r = edgekv("eval", *args)
        # behind an empty line: the terminal has shown ^C
        assert (r.exit_code, r.stdout, r.stderr) == (130, "", "\nedgekv: error: interrupted\n")
        r = edgekv("eval", *args, "--log", log)
        assert (r.exit_code, r.stdout) == (130, "") and r.stderr.split("\n") == [
            f"edgekv: {log} has what was found so far: run the same command again to go on", "",
            "edgekv: error: interrupted", ""]
    assert log.read_text().count("\n") == 3
    assert result(out(*args, "--log", log)) == expected
