"""How well filters fit: figures against float64 NumPy, marks where they must be, tables, pictures, and what goes wrong.

The slow tests print their figures (`-s` shows them).
"""

import json
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv import calibrate as calibration
from edgekv import native, quality
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters, model_fingerprint, read
from edgekv.gguf_file import GGUF
from edgekv.quality import FilterQuality
from edgekv.session import Session
from process import EDGEKV, edgekv, fails
from test_calibrate import forward
from test_filters import random_filters
from tinymodel import write_tiny_model

TEXT = "The keys that stay are those whose projection on the filter is highest, and the rest is forgotten. " * 10
SINKS = 4


def ranks(x):
    """By definition: one more than the smaller ones, and half of the other equal ones."""
    x = np.asarray(x)
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


def correlation(a, b):
    return np.corrcoef(ranks(a), ranks(b))[0, 1]


# --- Spearman's correlation ------------------------------------------------------------------------------------------

series = st.lists(st.tuples(st.integers(-5, 5), st.integers(-50, 50)), min_size=2, max_size=40).map(
    lambda pairs: np.array(pairs, np.float64).T)


@given(series)
def test_spearman(pair):
    a, b = pair
    found = quality.spearman(a, b)
    assert -1 <= found <= 1 and found == pytest.approx(quality.spearman(b, a), abs=1e-12)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found == 0
        return
    assert found == pytest.approx(correlation(a, b), abs=1e-12)
    assert found == pytest.approx(quality.spearman(np.exp(a), b**3 + 7), abs=1e-12)
    assert found == pytest.approx(-quality.spearman(-a, b), abs=1e-12)
    assert quality.spearman(a, a) == pytest.approx(1)


def test_spearman_of_known_series():
    """Worked by hand: squared differences of the ranks 4 + 1 + 1 + 0 + 4; then with two that tie."""
    assert quality.spearman(np.array([1, 2, 3, 4, 5]), np.array([3, 1, 2, 4, 9])) == pytest.approx(1 - 6 * 6 / 120)
    assert quality.spearman(np.array([1, 2, 2]), np.array([10, 20, 30])) == pytest.approx(np.sqrt(3) / 2)


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Attention as peaked as in real models."""
    return write_tiny_model(tmp_path_factory.mktemp("quality") / "tiny.gguf", n_ctx=2048, scale=3.0)


def tokens_of(path, length):
    with Session(path, n_ctx=length, n_threads=1) as session:
        return session.tokenize(TEXT)[:length]


def figures(queries, keys, attention, filters, first):
    """spearman, spearman_knorm, positive [layer, KV head] from the queries of the steps [layer][step, head, channel],
    all keys [layer][token, KV head, channel], and the steps' attention [layer][head, step, token]."""
    result = np.zeros((3, len(filters), len(filters[0])))
    for il, layer in enumerate(filters):
        group = queries[il].shape[1] // len(layer)
        for h, f in enumerate(layer):
            mine = slice(h * group, (h + 1) * group)
            got = attention[il][mine].mean(axis=(0, 1))[SINKS:first]
            judged = keys[il][SINKS:first, h]
            result[:, il, h] = (correlation(judged @ f, got), correlation(-np.sqrt((judged**2).sum(-1)), got),
                                np.mean(queries[il][:, mine] @ f > 0))
    return result


@pytest.mark.parametrize(("length", "n_steps"), [(400, 12), (259, 64), (70, 1)])
def test_figures(model, length, n_steps):
    filters = random_filters(GGUF(model), seed=length)
    found = quality.measure(model, TEXT, filters=filters, length=length, n_steps=n_steps, n_threads=1)
    queries, keys, weights = forward(model, tokens_of(model, length))
    first = length - n_steps
    expected = figures([q[first:] for q in queries], keys, [w[:, first:] for w in weights], filters.vectors, first)
    # the runtime keeps keys as f16; in the first layer, norms of the same byte's keys are equal but for that
    np.testing.assert_allclose(found.spearman, expected[0], atol=5e-3)
    np.testing.assert_allclose(found.spearman_knorm, expected[1], atol=3e-2)
    np.testing.assert_allclose(found.positive, expected[2], atol=1.5 / n_steps / 2)
    assert found.layers == [0, 1] and (found.n_tokens, found.n_steps) == (length, n_steps)
    assert len({round(x, 3) for x in expected.ravel()}) > 4  # different figures, so that none passes for another


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_figures_of_other_families(tmp_path, arch):
    """Layers with full attention only, from what the runtime says of its queries and keys: exact, one key at a time."""
    path = write_tiny_model(tmp_path / "m.gguf", arch=arch, n_layer=4, scale=3.0,
                            **({"n_embd": 128} if arch == "lfm2" else {}))
    gguf, length, n_steps = GGUF(path), 300, 20
    rng = np.random.default_rng(1)
    filters = QFilters(rng.standard_normal((2, 2, 32)), [1, 3], model_sha256=model_fingerprint(gguf))
    found = quality.measure(path, TEXT, filters=filters, length=length, n_steps=n_steps, n_threads=1)

    with Session(path, n_ctx=length, n_threads=1, flash_attn=True, tap_queries=True) as session:
        tokens, first = session.tokenize(TEXT)[:length], length - n_steps
        session.read(tokens[:first])
        steps = []
        for i in range(first, length, 8):
            session.decode(tokens[i : i + 8], i)
            steps.append([native.last_step(session.ctx, j)[0].astype(np.float64) for j in range(2)])
        queries = [np.concatenate(q) for q in zip(*steps)]
        keys = [np.stack([session.rows(j, h, values=False).view(np.float16).astype(np.float64) for h in range(2)], 1)
                for j in range(2)]
    scale = 1 if arch == "gemma3" else 32**-0.5  # Gemma's queries are scaled before
    weights = np.zeros((2, 4, n_steps, length))
    for j in range(2):
        for h in range(4):
            for t in range(n_steps):
                e = [np.exp(scale * (queries[j][t, h] @ k)) for k in keys[j][: first + t + 1, h // 2]]
                weights[j, h, t, : first + t + 1] = np.array(e) / np.sum(e)
    expected = figures(queries, keys, weights, filters.vectors, first)
    np.testing.assert_allclose([found.spearman, found.spearman_knorm, found.positive], expected, atol=1e-9)
    assert found.layers == [1, 3]


def test_filters_for_layers_without_a_cache(tmp_path):
    """Filters of sliding-window layers, which published ones may hold, are passed over."""
    path = write_tiny_model(tmp_path / "m.gguf", arch="gemma3", n_layer=4)
    gguf = GGUF(path)
    all_layers = random_filters(gguf, report={})
    found = quality.measure(path, TEXT, filters=all_layers, length=200, n_steps=8)
    assert found.layers == [1, 3] and found.spearman.shape == (2, 2)
    windows = QFilters(all_layers.vectors[:1], [0], model_sha256=model_fingerprint(gguf))
    with pytest.raises(EdgekvError, match="m.gguf: its Q-Filters are for none of the layers that attend"):
        quality.measure(path, TEXT, filters=windows, length=200, n_steps=8)


# --- marks -----------------------------------------------------------------------------------------------------------


def test_negated_filters_are_marked(tmp_path):
    path = write_tiny_model(tmp_path / "m.gguf")

    def of(vectors):
        filters = QFilters(vectors, [0, 1], model_sha256=model_fingerprint(GGUF(path)))
        return quality.measure(path, TEXT, filters=filters, length=400)

    # what must fit, where attention is not peaked: the mean queries of the very steps that are judged
    queries = forward(path, tokens_of(path, 400))[0]
    vectors = [q[336:].mean(axis=0).reshape(2, 2, 32).mean(axis=1) for q in queries]
    good = of(vectors)
    assert good.spearman.min() > 0.5 and good.positive.min() > 0.5
    negated = of([-v for v in vectors])
    np.testing.assert_allclose(negated.spearman, -good.spearman, atol=1e-12)
    np.testing.assert_allclose(negated.positive, 1 - good.positive, atol=1e-12)
    np.testing.assert_array_equal(negated.spearman_knorm, good.spearman_knorm)
    assert negated.marked.all() and negated.marked_heads() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    one = of([vectors[0], np.stack([vectors[1][0], -vectors[1][1]])])
    assert (1, 1) in one.marked_heads() and one.spearman[1, 1] < 0 < one.spearman[1, 0]


def test_rule_for_marks():
    nan = np.nan
    good = FilterQuality([3, 5], spearman=np.array([[0.1, 0.9], [0.5, nan]]),
                         positive=np.array([[0.9, 1], [0.95, nan]]))
    assert good.marked_heads() == []
    for name, value in (("spearman", 0.0), ("spearman", -0.5), ("positive", 0.89)):
        figures = {"spearman": good.spearman.copy(), "positive": good.positive.copy()}
        figures[name][1, 0] = value
        assert FilterQuality([3, 5], **figures).marked_heads() == [(5, 0)]
    stored = FilterQuality([3, 5], energy=np.zeros((2, 2)), one_sided=np.array([[0.8, 0.78], [1, nan]]))
    assert stored.marked_heads() == [(3, 1)]
    assert FilterQuality([3], energy=np.zeros((1, 2))).marked_heads() == []


def test_bound_of_one_sidedness():
    """A tenth of normal projections below zero: the mean is 1.28 standard deviations."""
    projections = np.random.default_rng(0).normal(1.2816, 1, 1_000_000)
    assert (projections < 0).mean() == pytest.approx(0.1, abs=1e-3)
    assert projections.mean() / np.sqrt((projections**2).mean()) == pytest.approx(quality.MIN_ONE_SIDED, abs=5e-3)


def test_stored_report_with_uneven_layers():
    report = {"energy": [0.1, 0.2, 0.3], "spearman": [0.5, -0.5, 0.25]}
    found = quality.stored(QFilters([np.ones((1, 8)), np.ones((2, 8))], [4, 7], report=report))
    np.testing.assert_array_equal(found.energy, np.array([[0.1, np.nan], [0.2, 0.3]], np.float32))
    assert found.marked_heads() == [(7, 0)] and found.spearman_knorm is None and found.layers == [4, 7]
    assert quality.stored(QFilters([np.ones((1, 8))], [0])) is None


# --- the report of a calibration -------------------------------------------------------------------------------------


def test_calibration_judges_its_filters_on_text_it_did_not_read(model, tmp_path):
    numbers = " ".join(f"{i:05}" for i in range(2000))  # every piece is told from every other
    text = tmp_path / "text.txt"
    text.write_text(numbers)
    filters = calibration.calibrate(model, text_files=[text], n_threads=1)
    again = calibration.calibrate(model, text_files=[text], n_threads=1)
    assert filters.report.keys() == {"energy", "one_sided", "spearman", "spearman_knorm"}
    for name, values in filters.report.items():
        assert values.tobytes() == again.report[name].tobytes()

    with Session(model, n_ctx=2048, n_threads=1) as session:
        tokens = session.tokenize(numbers)
        sequences = calibration.token_sequences(session, [numbers], 2048, "")
        piece = calibration._held_out(session, [numbers], sequences)
    assert len(piece) == 1088 and piece[0] == tokens[0]  # begun as a text begins

    def at(run):
        (found,) = (i for i in range(1, len(tokens)) if tokens[i : i + len(run) - 1] == run[1:])
        return range(found, found + len(run) - 1)

    assert not any(set(at(piece)) & set(at(sequence)) for sequence in sequences)
    first = 1088 - 64
    queries, keys, weights = forward(model, piece)
    expected = figures([q[first:] for q in queries], keys, [w[:, first:] for w in weights], filters.vectors, first)
    for name, values, tolerance in zip(("spearman", "spearman_knorm"), expected, (5e-3, 3e-2)):
        np.testing.assert_allclose(np.stack(filters.by_layer(name)), values, atol=tolerance)


def test_no_correlations_where_the_scores_are_not_known(model, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("All human beings are born free and equal in dignity and rights. " * 160)
    assert "spearman" in calibration.calibrate(model, text_files=[text]).report
    monkeypatch.setattr("edgekv.attention._OTHER_SCORES", ("llama",))
    assert calibration.calibrate(model, text_files=[text]).report.keys() == {"energy", "one_sided"}


# --- edgekv inspect --------------------------------------------------------------------------------------------------

SMALL = ["--length", 300, "--steps", 8]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("quality") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def with_filters(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("quality") / "with.gguf"
    report = {"energy": [0.5, 0.25, 0.75, 0.5], "one_sided": [1, 0.95, 0.5, 0.98], "spearman": [0.8, 0.6, 0.4, -0.2],
              "spearman_knorm": [0.1, 0.2, 0.3, 0.4]}
    convert(model, path, random_filters(GGUF(model), report=report))
    return path


def test_quality(with_filters, text):
    plain = edgekv("inspect", with_filters, "--quality", "-f", text, *SMALL)
    assert plain.exit_code == 0, plain.output
    found = quality.measure(with_filters, TEXT, length=300, n_steps=8)
    lines = [line.split() for line in plain.stdout.splitlines() if line.startswith(("0", "1", "all"))]
    assert [line[0] for line in lines] == ["0", "1", "all"]
    for il in range(2):
        for h in range(2):
            mark = "*" if found.marked[il, h] else ""
            assert lines[il][1 + h] == f"{found.spearman[il, h]:.3f}/{found.spearman_knorm[il, h]:.3f}{mark}"
    assert found.marked.any()
    mean = f"{found.spearman.mean():.3f}/{found.spearman_knorm.mean():.3f}"
    assert lines[2][3:] == [mean, f"{found.positive.min():.3f}"]
    names = ", ".join(f"{il}/{h}" for il, h in found.marked_heads())
    assert f"does not fit: {len(found.marked_heads())} of 4 heads: {names} (layer/KV head)" in plain.stdout
    assert "300 tokens, the last 8" in plain.stdout and "the 288 keys" in plain.stdout
    assert "built-in" not in plain.stdout

    facts = json.loads(edgekv("inspect", with_filters, "--quality", "-f", text, *SMALL, "-o", "json").stdout)
    assert facts["mean"]["spearman"] == pytest.approx(found.spearman.mean(), abs=1e-9)
    assert facts["layers"][1]["positive"] == pytest.approx(found.positive[1].tolist()) and facts["text"] == str(text)
    assert facts["marked"] == [list(head) for head in found.marked_heads()] and facts["n_heads"] == 4
    assert facts["least"]["spearman_knorm"] == pytest.approx(found.spearman_knorm.min())

    command = [*EDGEKV, "inspect", str(with_filters), "--quality", "-f", "-", *map(str, SMALL)]
    piped = subprocess.run(command, input=TEXT, capture_output=True, text=True)
    assert piped.returncode == 0 and piped.stdout == plain.stdout and piped.stderr == ""


def test_quality_on_the_built_in_text(with_filters):
    r = edgekv("inspect", with_filters, "--quality", *SMALL)
    assert r.exit_code == 0 and "the text is the built-in one, of which calibration reads parts" in r.stdout
    facts = json.loads(edgekv("inspect", with_filters, "--quality", *SMALL, "-o", "json").stdout)
    found = quality.measure(with_filters, calibration.default_text(), length=300, n_steps=8)
    assert facts["text"] == "built-in" and facts["mean"]["spearman"] == pytest.approx(found.spearman.mean())


def test_many_heads(tmp_path, text):
    path = write_tiny_model(tmp_path / "heads.gguf", n_head=12, n_head_kv=12)
    convert(path, path, random_filters(GGUF(path)))
    r = edgekv("inspect", path, "--quality", "-f", text, *SMALL)
    found = quality.measure(path, TEXT, length=300, n_steps=8)
    assert r.exit_code == 0 and "least KV head" in r.stdout and "KV head 0" not in r.stdout
    head = found.spearman[1].argmin()
    line = next(line.split() for line in r.stdout.splitlines() if line.startswith("1 "))
    assert line[1] == f"{found.spearman[1, head]:.3f}/{found.spearman_knorm[1, head]:.3f}*"


def test_stored_report_is_shown(model, with_filters, tmp_path):
    shown = edgekv("inspect", with_filters).stdout
    for part in ("0.500 of the queries' second moment", "least 0.250", "0.858, least 0.500",
                 "0.400 with attention, least -0.200; K-norm 0.250", "2 of 4 heads: 1/0, 1/1 (layer/KV head)"):
        assert part in shown, part
    report = json.loads(edgekv("inspect", with_filters, "-o", "json").stdout)["qfilters"]["report"]
    assert report["mean"]["energy"] == 0.5 and report["marked"] == [[1, 0], [1, 1]]
    assert report["layers"][1]["one_sided"] == pytest.approx([0.5, 0.98])

    path = tmp_path / "without.gguf"
    convert(model, path, random_filters(GGUF(model), report={}))
    assert "no report of a calibration; --quality measures it" in edgekv("inspect", path).stdout
    assert json.loads(edgekv("inspect", path, "-o", "json").stdout)["qfilters"]["report"] is None
    convert(model, path, random_filters(GGUF(model), report={"energy": [0.5] * 4, "one_sided": [0.9] * 4}))
    shown = edgekv("inspect", path).stdout
    assert "none of 4 heads" in shown and "correlation" not in shown


@pytest.mark.parametrize(("why", "arguments", "status"), [
    ("-f is for --attention or --quality: add one of them or drop -f", ["-f", "TEXT"], 2),
    ("--steps is for --attention or --quality", ["--steps", 8], 2),
    ("--kv-page-size is for --attention: add it", ["--quality", "--kv-page-size", 16], 2),
    ("--kv-budget is not for --quality", ["--quality", "--kv-budget", 64], 2),
    ("--ctx-size is not for --quality", ["--quality", "-c", 64], 2),
    ("--attention and --quality exclude each other", ["--attention", "--quality", "-f", "TEXT"], 2),
    ("--plot is not for --attention", ["--attention", "-f", "TEXT", "--plot", "x.png"], 2),
    ("-f nope.txt: No such file", ["--quality", "-f", "nope.txt"], 1),
    ("-f EMPTY: the text is empty", ["--quality", "-f", "EMPTY"], 1),
    ("-f TEXT: 1354 tokens are too few, --length 2000 asks for more", ["--quality", "-f", "TEXT", "--length", 2000], 1),
    ("-f TEXT: 1354 tokens are too few, more than --steps 1500", ["--quality", "-f", "TEXT", "--steps", 1500], 1),
    ("--length 5000: the model was trained on 2048", ["--quality", "--length", 5000], 1),
    ("--steps 64: leaves too little to read", ["--quality", "--length", 69], 1),
    ("--plot x.pdf: give a file that ends in .png or .svg", ["--plot", "x.pdf"], 1),
    ("--plot x: give a file that ends in .png or .svg", ["--quality", "--plot", "x"], 1),
    ("no folder that can be written to", ["--quality", "--plot", "/nowhere/x.png"], 1),
])
def test_bad_input(with_filters, text, tmp_path, why, arguments, status):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    files = {"TEXT": text, "EMPTY": empty}
    for name, path in files.items():
        why = why.replace(name, str(path))
    fails(why, "inspect", with_filters, *(files.get(a, a) for a in arguments), status=status)


def test_model_without_filters(model, tmp_path):
    pytest.importorskip("matplotlib")
    fails("tiny.gguf: has no Q-Filters; edgekv convert", "inspect", model, "--quality")
    out = tmp_path / "x.png"
    fails("tiny.gguf: has no Q-Filters to plot", "inspect", model, "--plot", out)
    path = tmp_path / "without.gguf"
    convert(model, path, random_filters(GGUF(model), report={"energy": [0.5] * 4}))
    fails("carry no correlations to plot; --quality measures them", "inspect", path, "--plot", out)
    assert not out.exists()


def test_damaged_model(model, tmp_path):
    """Keys that are not finite are not ranked."""
    path, data = tmp_path / "nan.gguf", bytearray(model.read_bytes())
    tensor = GGUF(model).tensors["blk.1.attn_k.weight"]
    data[tensor.offset : tensor.offset + 4] = b"\xff" * 4
    path.write_bytes(data)
    with pytest.raises(EdgekvError, match="queries of layer 1 are not finite"):
        quality.measure(path, TEXT, filters=random_filters(GGUF(path)), length=200)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_plots(with_filters, text, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("matplotlib.image")
    png, svg, measured = tmp_path / "x.png", tmp_path / "x.SVG", tmp_path / "m.svg"
    shown = edgekv("inspect", with_filters)
    assert edgekv("inspect", with_filters, "--plot", png).stdout == shown.stdout
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 5000

    # layers from left to right, heads from top to bottom, in colours of their correlations
    pixels = (255 * matplotlib.image.imread(png)[..., :3]).round()
    colours = {c: np.round(255 * np.array(matplotlib.colormaps["RdBu"]((c + 1) / 2)[:3])) for c in (0.8, 0.6, -0.2)}
    (y0, x0), (y1, x1), (y2, x2) = (np.median(np.argwhere((abs(pixels - c) <= 1).all(-1)), 0) for c in colours.values())
    assert abs(x0 - x1) < 9 and x1 + 50 < x2 and y0 + 50 < y1 and abs(y1 - y2) < 9
    assert colours[-0.2][0] > colours[-0.2][2] and colours[0.8][0] < colours[0.8][2]  # red for what fails

    edgekv("inspect", with_filters, "--plot", svg)
    edgekv("inspect", with_filters, "--quality", "-f", text, *SMALL, "--plot", measured)
    before = svg.read_bytes()
    edgekv("inspect", with_filters, "--plot", svg)
    assert svg.read_bytes() == before  # the same figures, the same file

    def contents(path):
        return ["".join(e.itertext()) for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]

    words = contents(svg)
    for part in ("tiny, report of the calibration", "layer", "KV head", "rank correlation with attention",
                 "Q-Filters: projection of the key · mean 0.40", "K-norm: the smaller, the better · mean 0.25",
                 "outlined: 2 of 4 heads, which their filter does not fit"):
        assert part in words
    assert [w for w in words if w in ("0.80", "0.60", "-0.20")] == ["0.80", "0.60", "-0.20"]
    assert svg.read_text().count("stroke: #000000; stroke-width: 1.6") == 2
    found = quality.measure(with_filters, TEXT, length=300, n_steps=8)
    assert "tiny, 300 tokens of text.txt" in contents(measured)
    assert measured.read_text().count("stroke: #000000; stroke-width: 1.6") == len(found.marked_heads()) > 0


def test_plots_of_all_shapes(tmp_path):
    pytest.importorskip("matplotlib")
    from edgekv.plot import heat_map

    rng = np.random.default_rng(0)
    for n_layers, n_heads in ((1, 1), (80, 8), (2, 64)):
        values = rng.uniform(-1, 1, (2, n_layers, n_heads))
        values[:, -1, 1:] = np.nan
        layers = [3 * i + 2 for i in range(n_layers)]
        path = tmp_path / f"{n_layers}.svg"
        heat_map(FilterQuality(layers, *values), path, "名 $\\x$ " * 40)
        words = ["".join(e.itertext()) for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
        assert "2" in words and "nan" not in words


def test_plot_errors(with_filters, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    with monkeypatch.context() as m:
        m.setattr("os.fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        fails("x.png: the disk is full", "inspect", with_filters, "--plot", out)
    fails("is a folder", "inspect", with_filters, "--plot", _folder(tmp_path / "folder.png"))
    monkeypatch.setattr("edgekv.extras.find_spec", lambda name: None)
    fails("--plot needs matplotlib; pip install 'edgekv[plot]'", "inspect", with_filters, "--plot", out)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def _folder(path):
    path.mkdir()
    return path


# --- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", ["from its end", "Python's help"])
def test_real_model(smollm2_qfilters, source):
    """The filters tell attention apart far better than the norm does, and fit nearly every head."""
    text = calibration.default_text()
    if source == "from its end":
        text = "\n\n".join(reversed(text.split("\n\n")))
    found = quality.measure(smollm2_qfilters, text, length=2048)
    print(f"\n{source}: Q-Filters {found.spearman.mean():.3f}, K-norm {found.spearman_knorm.mean():.3f}, "
          f"least head {found.spearman.min():.3f}, marked {found.marked_heads()}")
    assert found.spearman.shape == (30, 3) and len(found.marked_heads()) <= 2 and found.positive.min() > 0.9
    assert found.spearman.mean() > 0.5 and found.spearman.mean() > found.spearman_knorm.mean() + 0.2

    stored = quality.stored(read(GGUF(smollm2_qfilters)))
    assert stored.one_sided.min() > 0.9 and stored.marked_heads() == [] and 0.3 < stored.energy.min() < 1
    assert stored.spearman.mean() > 0.5 and stored.spearman.mean() > stored.spearman_knorm.mean() + 0.2
