"""Tables and pictures of evaluations: figures against plain loops, what counts and what does not, formats, and what is
drawn where."""

import csv
import io
import json
import math
import random
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv import plot
from edgekv.errors import EdgekvError
from edgekv.eval import report
from edgekv.eval.report import Needles, Score, needle_report, needle_rows, table
from edgekv.eval.stats import paired

HEADER = {
    "model": {"file": "m.gguf", "sha256": "ab" * 32, "size": 7, "architecture": "llama"},
    "versions": {"edgekv": "0.1.0", "llama_cpp_python": "0.3.36"},
    "machine": {"name": "a machine", "cores": 2, "threads": 2, "cpu_variant": "ggml-cpu-zen4"},
    "started": "2026-01-01T00:00:00+00:00",
}
RIGHT = {"none": 0.9, "a": 0.75, "b": 0.55, "q8_0": 0.85}  # how often, in tasks that the model can do
SETTINGS = [("none", "none", 1.0), ("b x4", "b", 4.0), ("a x2", "a", 2.0), ("a x4", "a", 4.0), ("b x2", "b", 2.0),
            ("q8_0", "q8_0", 1.882)]


def made_up(tasks=("fact", "key"), hard=("variables",), lengths=(1024, 2048), documents=30, settings=SETTINGS, seed=0):
    rng = random.Random(seed)
    scores = []
    for length in lengths:
        for d in range(documents):
            for task in (*tasks, *hard):
                for k in range(2 if task == "key" else 1):  # two questions that are alike in all but the answer
                    depth = None if task in hard else d / documents
                    for label, method, smaller in settings:
                        p = 0.1 if task in hard else RIGHT[method] - 0.05 * smaller
                        scores.append(Score(f"{length} {d}", length, task, depth, label, method, smaller,
                                            float(rng.random() < p)))
    return scores


def mean_of(scores, **wanted):
    return statistics.fmean(s.value for s in scores if all(getattr(s, name) == v for name, v in wanted.items()))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_rows():
    scores = made_up()
    rows = needle_rows(scores)
    assert [row["compression"] for row in rows] == [1, 1.882, 2, 2, 4, 4]
    assert [row["label"] for row in rows] == ["none", "q8_0", "a x2", "b x2", "a x4", "b x4"]
    for row in rows:
        assert row["cases"] == 240 and row["documents"] == 60 and "p" not in row
        assert [(t["task"], t["length"], t["counted"]) for t in row["tasks"]] == [
            ("fact", 1024, True), ("fact", 2048, True), ("key", 1024, True), ("key", 2048, True),
            ("variables", 1024, False), ("variables", 2048, False)]
        for t in row["tasks"]:
            assert t["mean"] == pytest.approx(mean_of(scores, label=row["label"], task=t["task"], length=t["length"]))
            assert t["low"] <= t["mean"] <= t["high"] and t["documents"] == 30
        # key has twice the questions and yet counts as much
        assert row["mean"] == pytest.approx(statistics.fmean(t["mean"] for t in row["tasks"] if t["counted"]))
        assert row["low"] < row["mean"] < row["high"] and row["high"] - row["low"] < 0.3


def test_order_of_cases_does_not_matter():
    scores = made_up(documents=12)
    shuffled = [s for s in scores if s.label == "none"]  # the order of settings is that of the first cases
    rest = [s for s in scores if s.label != "none"]
    random.Random(1).shuffle(rest)
    shuffled += rest
    for a, b in zip(needle_rows(scores, against="b"), needle_rows(shuffled, against="b")):
        assert all(a[name] == b[name] for name in ("label", "against", "better", "worse"))
        assert a["mean"] == pytest.approx(b["mean"])
        assert a["difference"] == pytest.approx(b["difference"])


@pytest.mark.parametrize(("against", "opponents"), [
    ("b", {"a x2": "b x2", "a x4": "b x4"}),  # of a method: the setting of the same compression
    ("b x4", {"none": "b x4", "q8_0": "b x4", "a x2": "b x4", "b x2": "b x4", "a x4": "b x4"}),
    ("none", {label: "none" for label in ("q8_0", "a x2", "a x4", "b x2", "b x4")}),
])
def test_paired(against, opponents):
    scores = made_up(documents=15)
    for row in needle_rows(scores, against=against):
        other = opponents.get(row["label"])
        assert row["against"] == other
        if other is None:
            assert row["p"] is row["difference"] is row["difference_low"] is row["better"] is None
            continue
        sums = {}
        for sign, label in ((1, row["label"]), (-1, other)):
            for s in scores:
                if s.label == label and s.task != "variables":
                    share = sign * s.value / (30 if s.task == "key" else 15) / 4  # four cells
                    sums[s.document] = sums.get(s.document, 0) + share
        assert row["difference"] == pytest.approx(sum(sums.values()))
        tested = paired(list(sums.values()), [0.0] * len(sums))  # one value per document
        assert row["p"] == pytest.approx(tested.p, abs=0.02)
        assert row["better"] == sum(x > 1e-9 for x in sums.values())
        assert row["worse"] == sum(x < -1e-9 for x in sums.values())
        assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_methods():
    scores = made_up(documents=15)
    rows = Needles(scores).method_rows("b")
    assert [row["method"] for row in rows] == ["none", "q8_0", "a", "b"]
    by_name = {row["method"]: row for row in rows}
    of = {row["label"]: row for row in needle_rows(scores)}
    for method in "ab":
        assert by_name[method]["compressions"] == [2, 4]
        assert by_name[method]["mean"] == pytest.approx((of[f"{method} x2"]["mean"] + of[f"{method} x4"]["mean"]) / 2)
    assert by_name["a"]["difference"] == pytest.approx(by_name["a"]["mean"] - by_name["b"]["mean"])
    assert by_name["a"]["against"] == "b" and by_name["a"]["p"] < 0.01
    for method in ("none", "q8_0", "b"):
        assert by_name[method]["against"] is by_name[method]["p"] is None
    assert Needles(scores).method_rows("b x4") == rows  # a setting stands for its method

    # what is a setting and a method at once is an opponent at any compression
    by_name = {row["method"]: row for row in Needles(scores).method_rows("none")}
    assert by_name["a"]["difference"] == pytest.approx(by_name["a"]["mean"] - by_name["none"]["mean"])

    # only what both have
    some = [s for s in scores if s.label != "b x2"]
    by_name = {row["method"]: row for row in Needles(some).method_rows("b")}
    assert by_name["a"]["difference"] == pytest.approx(of["a x4"]["mean"] - of["b x4"]["mean"])
    assert {row["label"]: row["against"] for row in needle_rows(some, against="b")} == {
        "none": None, "q8_0": None, "a x2": None, "a x4": "b x4", "b x4": None}


def test_cases_that_one_setting_lacks():
    scores = made_up(documents=15)
    some = [s for s in scores if not (s.label == "a x4" and s.document.endswith("3"))]
    row = next(row for row in needle_rows(some, against="b x4") if row["label"] == "a x4")
    both = [s for s in scores if not s.document.endswith("3")]
    same = next(row for row in needle_rows(both, against="b x4") if row["label"] == "a x4")
    assert row["difference"] == pytest.approx(same["difference"]) and row["better"] == same["better"]
    text = needle_report(some, against="b x4")
    assert "Settings have different numbers of cases (a x4 104, others up to 120)" in text
    assert "different numbers" not in needle_report(scores)


# --- the floor of the model ------------------------------------------------------------------------------------------


def constant(values, label="none", method="none", compression=1.0, task="fact", length=1024):
    return [Score(str(i), length, task, 0.5, label, method, compression, v) for i, v in enumerate(values)]


def test_floor_is_not_enough():
    """Above it, not at it; per length; and by the reference alone."""
    scores = (constant([1, 1, 1, 0, 0]) + constant([1, 1, 1, 1, 0], length=2048)
              + constant([1] * 5, "a x4", "a", 4.0) + constant([0, 0, 0, 0, 1], "a x4", "a", 4.0, length=2048))
    rows = needle_rows(scores)
    assert [t["counted"] for t in rows[0]["tasks"]] == [False, True]
    assert [row["mean"] for row in rows] == pytest.approx([0.8, 0.2])
    assert [t["mean"] for t in rows[1]["tasks"]] == pytest.approx([1.0, 0.2])
    assert needle_rows(scores, floor=0.5)[1]["mean"] == pytest.approx(0.6)
    assert [t["counted"] for t in needle_rows(scores, reference="a x4")[0]["tasks"]] == [True, False]
    text = needle_report(scores)
    assert "(fact 1024)" in text.splitlines()[0] and " fact 2048 " in text.splitlines()[0]
    assert ("at the floor of the model and not in the pooled mean: fact 1024. The model itself fails at it: with the "
            "full cache it is right in at most 60 %") in text


def test_model_that_fails():
    scores = made_up(tasks=(), hard=("variables", "words"))
    rows = needle_rows(scores, against="b")
    assert all(row["mean"] is row["p"] is row["difference"] is None and row["documents"] == 0 for row in rows)
    assert [row["label"] for row in rows] == ["none", "q8_0", "a x2", "b x2", "b x4", "a x4"]  # as they came
    text = needle_report(scores, against="b")
    assert "The model itself fails: with the full cache it is right in at most 60 % of the cases of every task" in text
    assert "there is no ranking" in text and "pooled" not in text and "against" not in text and "Over all" not in text
    assert "(variables 1024)" in text and mean_text(scores, "a x2", "words", 2048) in text
    assert json.loads(needle_report(scores, "json"))["settings"][0]["mean"] is None


def mean_text(scores, label, task, length):
    return f" {round(100 * mean_of(scores, label=label, task=task, length=length))} ["


def test_task_that_the_reference_lacks():
    scores = made_up(documents=8)
    some = [s for s in scores if (s.label, s.task) != ("none", "key")]
    assert [t["counted"] for t in needle_rows(some)[1]["tasks"]] == [True, True, False, False, False, False]
    text = needle_report(some)
    assert "not in the pooled mean, as the full cache has no case of it yet: key 1024, key 2048." in text
    line = next(line for line in text.splitlines() if line.startswith("| none"))
    assert [cell.strip() for cell in line.split("|")[6:8]] == ["-", "-"]


@pytest.mark.parametrize(("why", "scores", "arguments"), [
    ("there is no case to report yet", [], {}),
    ("there is no case of the setting 'full'", constant([1, 0]), {"reference": "full"}),
    ("--against x: there is no such method; choose one of none", constant([1, 0]), {"against": "x"}),
])
def test_bad_input(why, scores, arguments):
    for make in (needle_rows, needle_report):
        with pytest.raises(EdgekvError) as e:
            make(scores, **arguments)
        assert why in str(e.value) and "\n" not in str(e.value)


# --- formats ---------------------------------------------------------------------------------------------------------


def test_md():
    scores = made_up()
    text = needle_report(scores, against="b", header=HEADER)
    first, second, notes, last = text.split("\n\n")[0], text.split("\n\n")[2], *text.split("\n\n")[3:]
    for part in (first, second):
        lines = part.splitlines()
        assert len({len(line) for line in lines}) == 1 and all(line[0] == line[-1] == "|" for line in lines)
        assert len({line.count("|") for line in lines}) == 1
    rows = {row["label"]: row for row in needle_rows(scores, against="b")}
    head, rule, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines())
    assert head == ["setting", "compression", "pooled", "against b", "p", "better, worse", "fact 1024", "fact 2048",
                    "key 1024", "key 2048", "(variables 1024)", "(variables 2048)"]
    assert [cell.endswith(":") for cell in rule] == [False] + [True] * 11
    for cells in body:
        row = rows[cells[0]]
        assert cells[1] == {1: "x1", 1.882: "x1.9", 2: "x2", 4: "x4"}[row["compression"]]
        whole = [round(100 * row[name]) for name in ("mean", "low", "high")]
        assert cells[2] == "{} [{}, {}]".format(*whole)
        if row["p"] is None:
            assert cells[3:6] == ["-", "-", "-"]
        else:
            assert cells[3].startswith(f"{round(100 * row['difference']):+} [")
            assert cells[5] == f"{row['better']}, {row['worse']}"
        assert cells[6].startswith(f"{round(100 * row['tasks'][0]['mean'])} [")
    assert [line.split("|")[1].strip() for line in second.splitlines()[2:]] == ["none", "q8_0", "a", "b"]
    assert "| x2, x4 " in second and "95 % intervals (bootstrap over documents, 60 of them); pooled: each task" in notes
    assert "not corrected for the number of comparisons" in notes
    assert last == ("m.gguf (llama, sha256 abababababab); edgekv 0.1.0, llama-cpp-python 0.3.36, ggml-cpu-zen4; a "
                    "machine, 2 threads; 2026-01-01T00:00:00+00:00\n")
    assert "against" not in needle_report(scores) and "sign flips" not in needle_report(scores)
    one = needle_report([s for s in scores if s.compression in (1, 4)])
    assert "Over all compressions" not in one and one.endswith("\n")


def test_json_and_csv():
    scores = made_up(documents=8)
    rows = needle_rows(scores, against="b")
    facts = json.loads(needle_report(scores, "json", against="b", header=HEADER))
    assert facts["settings"] == rows and facts["methods"] == Needles(scores).method_rows("b")
    assert facts["header"] == HEADER and facts["floor"] == 0.6 and facts["reference"] == "none"

    lines = list(csv.DictReader(io.StringIO(needle_report(scores, "csv", against="b"))))
    assert len(lines) == 6 * 7
    pooled = {line["label"]: line for line in lines if line["task"] == "pooled"}
    for row in rows:
        line = pooled[row["label"]]
        assert float(line["mean"]) == row["mean"] and line["p"] == ("" if row["p"] is None else str(row["p"]))
        own = [line for line in lines if line["label"] == row["label"] and line["task"] != "pooled"]
        assert [float(line["low"]) for line in own] == [t["low"] for t in row["tasks"]]
        assert [line["counted"] for line in own] == ["1", "1", "1", "1", "0", "0"]


def test_one_document_has_no_interval():
    """One document does not say how much documents differ."""
    scores = constant([1.0]) + constant([0.75], "a x2", "a", 2.0)
    text = needle_report(scores, against="none")
    assert "| 75 |" in " ".join(text.split()) and "nan" not in text and "-25" in text
    assert json.loads(needle_report(scores, "json"))["settings"][0]["low"] is None


def test_table():
    rows = [{"name": "none", "kl": np.float64(0.0), "extra": [1, 2], "same": True},
            {"name": "a|b", "kl": 0.125, "extra": None, "same": False}, {"name": "c", "kl": math.nan, "extra": [3]}]
    columns = [("setting", "name", str, False), ("KL", "kl", "{:.3f}".format, True)]
    assert table(rows, columns) == ("| setting |    KL |\n"
                                    "| ------- | ----: |\n"
                                    "| none    | 0.000 |\n"
                                    "| a\\|b    | 0.125 |\n"
                                    "| c       |     - |\n")
    assert json.loads(table(rows, columns, "json")) == [
        {"name": "none", "kl": 0.0, "extra": [1, 2], "same": True},
        {"name": "a|b", "kl": 0.125, "extra": None, "same": False}, {"name": "c", "kl": None, "extra": [3]}]
    assert table(rows, columns, "csv") == "name,kl,extra,same\nnone,0.0,1 2,1\na|b,0.125,,0\nc,,3,\n"
    assert table([], columns) == "| setting | KL |\n| ------- | -: |\n" and table([], columns, "json") == "[]\n"


@pytest.mark.parametrize(("p", "text"), [(1.0, "1.00"), (0.25, "0.25"), (0.0996, "0.10"), (0.05, "0.050"),
                                         (0.001, "0.001"), (0.0009, "< 0.001")])
def test_p_values(p, text):
    assert report.p_value(p) == text


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as they are saved."""
    pytest.importorskip("matplotlib")
    figures, save = [], plot._save

    def keep(figure, path):
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plot, "_save", keep)
    return figures


def texts(path):
    return ["".join(e.itertext()) for e in ElementTree.parse(path).iter() if e.tag.endswith("}text")]


CURVES = {"none": (np.arange(100, 200), np.linspace(3, 2, 100)), "a": (np.arange(100, 200), np.linspace(3, 2.5, 100))}


@pytest.mark.parametrize("make", [
    lambda path: plot.needle_map(made_up(documents=5, settings=SETTINGS[:2]), path, "a $title$ < b"),
    lambda path: plot.accuracy_curves(made_up(documents=5), path, "a $title$ < b"),
    lambda path: plot.loss_curves(CURVES, path, "a $title$ < b"),
])
def test_files(make, tmp_path):
    pytest.importorskip("matplotlib")
    make(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    make(tmp_path / "x.svg")
    make(tmp_path / "y.SVG")
    assert (tmp_path / "x.svg").read_bytes() == (tmp_path / "y.SVG").read_bytes()
    assert "a $title$ < b" in texts(tmp_path / "x.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png", "x.svg", "y.SVG"]
    for bad, why in (("x.pdf", "give a file that ends in .png or .svg"), ("no/x.png", "no folder that can be")):
        with pytest.raises(EdgekvError, match=why):
            make(tmp_path / bad)


def test_needle_map(drawn, tmp_path):
    scores = [Score("d", 1024, "t", depth, label, label, smaller, value)
              for label, smaller, value in (("b", 4.0, 0.25), ("none", 1.0, 1.0), ("a", 4.0, 0.5))
              for depth in (0.0, 0.09, 0.55, 1.0)]
    scores += [Score("d", 2048, "t", 0.95, "a", "a", 4.0, 1.0), Score("d", 2048, "t", None, "a", "a", 4.0, 1.0)]
    plot.needle_map(scores, tmp_path / "x.svg", "needles")
    panels = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == ["none: 100 %", "a: 60 %", "b: 25 %"]
    values = np.array(panels[1].images[0].get_array().filled(np.nan))
    expected = np.full((10, 2), np.nan)
    expected[[0, 5, 9], 0] = 0.5
    expected[9, 1] = 1.0
    np.testing.assert_array_equal(values, expected)
    found = texts(tmp_path / "x.svg")
    assert found.count("50") == found.count("25") == 4 and found.count("1k") == found.count("2k") == 3
    with pytest.raises(EdgekvError, match="none of these tasks has a needle at a depth of its own"):
        plot.needle_map([s for s in scores if s.depth is None], tmp_path / "y.svg", "x")
    assert not (tmp_path / "y.svg").exists()


def test_accuracy_curves(drawn, tmp_path):
    scores = made_up()
    plot.accuracy_curves(scores, tmp_path / "x.svg", "accuracy")
    axes = drawn[0].axes[0]
    rows = {row["label"]: row for row in needle_rows(scores)}
    lines = [line.get_xydata() for line in axes.lines if line.get_marker() not in ("None", "")]
    for method, line in zip(("b", "a", "q8_0"), lines, strict=True):
        own = [row for row in rows.values() if row["method"] == method]
        np.testing.assert_allclose(line, [(row["compression"], 100 * row["mean"]) for row in own])
    bands = [c.get_paths()[0].vertices[:, 1] for c in axes.collections if type(c).__name__.endswith("PolyCollection")]
    for method, band in zip("ba", bands, strict=True):
        own = [row for row in rows.values() if row["method"] == method]
        assert band.max() == pytest.approx(100 * max(row["high"] for row in own))
        assert band.min() == pytest.approx(100 * min(row["low"] for row in own))
    assert any(set(line.get_ydata()) == {100 * rows["none"]["mean"]} for line in axes.lines)
    assert axes.get_xscale() == "log"
    found = texts(tmp_path / "x.svg")
    assert {"a", "b", "q8_0", "the full cache", "x2", "x4"} <= set(found)
    assert "pooled over fact 1024, fact 2048, key 1024, key 2048" in found

    plot.accuracy_curves(made_up(tasks=()), tmp_path / "fails.svg", "accuracy")
    assert not drawn[1].axes[0].lines
    assert any("The model itself fails" in text for text in texts(tmp_path / "fails.svg"))
    plot.accuracy_curves(constant([1, 1, 0, 1]), tmp_path / "alone.svg", "accuracy")


def test_loss_curves(drawn, tmp_path):
    rng = np.random.default_rng(0)
    positions = np.arange(300, 400)
    curves = {"a x4": (positions[10:], rng.random(90)), "none": (positions, rng.random(100)), "b": ([1], [2.0])}
    plot.loss_curves(curves, tmp_path / "x.svg", "loss", smooth=5)
    above, below = drawn[0].axes
    line = {tuple(line.get_xdata()): line.get_ydata() for line in above.lines if len(line.get_xdata()) > 2}
    means = {name: {positions[j]: statistics.fmean(curves[name][1][k] for k in range(i - 4, i + 1))
                    for i, j in enumerate(range(first, 100)) if i >= 4} for name, first in (("a x4", 10), ("none", 0))}
    for name in ("a x4", "none"):
        np.testing.assert_allclose(line[tuple(means[name])], list(means[name].values()))
    difference = next(line for line in below.lines if len(line.get_xdata()) > 2)
    np.testing.assert_array_equal(difference.get_xdata(), list(means["a x4"]))
    np.testing.assert_allclose(difference.get_ydata(), [y - means["none"][x] for x, y in means["a x4"].items()])
    found = texts(tmp_path / "x.svg")
    assert found.count("a x4") == 2 and found.count("none") == 1 and "mean of the last 5 tokens" in found

    plot.loss_curves({"a": curves["a x4"]}, tmp_path / "alone.svg", "loss")  # nothing to compare with
    assert len(drawn[1].axes) == 1 and "mean of the last 4 tokens" in texts(tmp_path / "alone.svg")
    with pytest.raises(EdgekvError, match="there are no losses to plot yet"):
        plot.loss_curves({}, tmp_path / "y.svg", "x")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15).map(sorted), st.sampled_from([0.01, 0.05, 0.09]))
def test_names_keep_apart(places, apart):
    found = plot._spread(places, apart)
    assert all(b - a >= apart - 1e-9 for a, b in zip(found, found[1:]))
    if (len(places) - 1) * apart <= 1:
        assert -1e-9 <= found[0] and found[-1] <= 1 + 1e-9
    if all(b - a >= apart for a, b in zip(places, places[1:])):
        assert found == pytest.approx(places)


def test_names_move_little():
    assert plot._spread([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert plot._spread([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])


def test_lines_can_be_told_apart():
    looks = [plot._look(i) for i in range(12)]
    assert len({look[:2] for look in looks}) == 12
