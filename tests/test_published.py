"""Published Q-Filters in and out, and ``edgekv filters``."""

import json
import os
import socket
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from edgekv import hub, native, published
from edgekv.convert import convert, save_filters
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters, model_fingerprint, read
from edgekv.gguf_file import GGUF
from hub_server import Hub
from process import edgekv, edgekv_apart, fails
from test_filters import REFERENCE, random_filters
from tinymodel import write_tiny_model

# kept in order, and in pairs; all layers, those between windows, those between convolutions -> (model, evicted layers)
LAYOUTS = {
    "llama": (dict(n_layer=4), [0, 1, 2, 3]),
    "qwen3": (dict(n_layer=4), [0, 1, 2, 3]),
    "gemma3": (dict(n_layer=4), [1, 3]),
    "lfm2": (dict(n_layer=4, head_size=16), [1, 3]),
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    return {arch: GGUF(write_tiny_model(folder / f"{arch}.gguf", arch=arch, **kw)) for arch, (kw, _) in LAYOUTS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return GGUF(write_tiny_model(tmp_path_factory.mktemp("published") / "tiny.gguf"))


def random_rows(shape=(2, 2, 32), seed=3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- in ------------------------------------------------------------------------------------------------------------


def rope_in_halves(x, angle):
    """Rotary embedding as in transformers: channel i with i + d/2."""
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def rope_in_pairs(x, angle):
    """Rotary embedding as in ggml's normal mode: channel 2i with 2i + 1."""
    y = np.empty_like(x)
    a, b = x[..., ::2], x[..., 1::2]
    y[..., ::2], y[..., 1::2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return y


def converters_permutation(rows):
    """What llama.cpp's converter does to the rows of one head of Q or K."""
    return rows.reshape(2, len(rows) // 2).swapaxes(0, 1).reshape(rows.shape)


def test_import_meets_the_cached_keys(model, tmp_path):
    """Scores of keys cached by llama.cpp order like the published rule's on transformers' keys."""
    rng = np.random.default_rng(7)
    theirs = random_rows(seed=7)
    save_file({"q_filters": theirs}, tmp_path / "f.safetensors")
    f = published.load(tmp_path / "f.safetensors", model)
    assert f.layers == [0, 1] and "f.safetensors" in f.method
    for il in range(2):
        for h in range(2):
            key = rng.standard_normal(32)  # a key before RoPE
            angle = rng.uniform(0, 6, 16)
            score = -(theirs[il, h] @ rope_in_halves(key, angle))
            ours = f.vectors[il][h] @ rope_in_pairs(converters_permutation(key), angle)
            np.testing.assert_allclose(ours, score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", LAYOUTS)
def test_import_takes_the_layers_that_are_evicted_from(layouts, tmp_path, arch):
    g, (kw, layers) = layouts[arch], LAYOUTS[arch]
    theirs = random_rows((4, 2, kw.get("head_size", 32)))
    for il in set(range(4)) - set(layers):
        theirs[il] = 0
    save_file({"q_filters": theirs}, tmp_path / "f.safetensors")
    f = published.load(tmp_path / "f.safetensors", g)
    assert f.layers == layers
    for il, v in zip(layers, f.vectors):
        expected = [converters_permutation(row) for row in theirs[il]] if arch == "llama" else theirs[il]
        np.testing.assert_array_equal(v, -np.array(expected))


def test_import_of_other_types(model, tmp_path):
    theirs = random_rows().astype(np.float16)
    for dtype in (np.float16, np.float64):
        save_file({"q_filters": theirs.astype(dtype)}, tmp_path / "f.safetensors")
        got = np.stack(published.load(tmp_path / "f.safetensors", model).vectors)
        np.testing.assert_array_equal(got[..., ::2], -theirs[..., :16].astype(np.float32))

    bits = theirs.astype(np.float32).view(np.uint32) >> 16  # truncated to bfloat16
    head = b'{"q_filters":{"dtype":"BF16","shape":[2,2,32],"data_offsets":[0,256]}}'
    (tmp_path / "bf16.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bits.astype("<u2").tobytes())
    got = np.stack(published.load(tmp_path / "bf16.safetensors", model).vectors)
    np.testing.assert_array_equal(got[..., 1::2], -(bits << 16).astype(np.uint32).view(np.float32)[..., 16:])


@pytest.mark.skipif(not (REFERENCE / "smollm2-135m.npz").exists(), reason="the reference folder is not here")
def test_import_of_the_reference_filters(tmp_path):
    theirs = np.load(REFERENCE / "smollm2-135m.npz")["q_filters_kvpress"]
    save_file({"q_filters": theirs}, tmp_path / "f.safetensors")
    g = GGUF(write_tiny_model(tmp_path / "m.gguf", n_layer=30, n_head=9, n_head_kv=3, head_size=64, n_embd=32, n_ff=32))
    f = published.load(tmp_path / "f.safetensors", g)
    for il in range(30):
        for h in range(3):
            np.testing.assert_array_equal(f.vectors[il][h], converters_permutation(-theirs[il, h]))


def test_import_from_a_folder(model, tmp_path):
    def refused(why):
        with pytest.raises(EdgekvError, match=why) as e:
            published.load(tmp_path, model)
        assert str(e.value).startswith(f"--qfilters {tmp_path}: ") and "\n" not in str(e.value)

    refused("holds no .safetensors file")
    theirs = random_rows()
    save_file({"q_filters": theirs}, tmp_path / "model.safetensors")
    one = published.load(tmp_path, model)
    save_file({"weight": theirs}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"damaged")
    several = published.load(tmp_path, model)
    assert one.flat().tobytes() == several.flat().tobytes()
    assert one.method == several.method and "model.safetensors" in one.method
    save_file({"q_filters": theirs}, tmp_path / "c.safetensors")
    refused(r"holds 2 files with a tensor q_filters; name one of them \(c.safetensors, model.safetensors\)")
    for name in "model", "c":
        (tmp_path / f"{name}.safetensors").unlink()
    refused("holds no files with a tensor q_filters")
    (tmp_path / "b.safetensors").unlink()
    refused("a.safetensors: has no tensor q_filters")


def test_import_from_the_hub(model, tmp_path, monkeypatch):
    save_file({"q_filters": random_rows()}, tmp_path / "model.safetensors")
    asked = []

    def snapshot(repo_id, patterns, max_bytes):
        asked.append((repo_id, list(patterns), max_bytes))
        return tmp_path

    monkeypatch.setattr(hub, "snapshot", snapshot)
    monkeypatch.chdir(tmp_path)
    expected = published.load(tmp_path, model).flat().tobytes()
    for name in ("org/name_qfilt", "hf:org/name_qfilt"):
        assert published.load(name, model).flat().tobytes() == expected
    assert asked == [("org/name_qfilt", ["*.safetensors"], published.MAX_BYTES)] * 2
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name_qfilt").mkdir()  # a path comes first
    with pytest.raises(EdgekvError, match="--qfilters org/name_qfilt: holds no .safetensors file"):
        published.load("org/name_qfilt", model)
    assert len(asked) == 2


def said(**changes) -> dict[str, str]:
    """The metadata of an exported file."""
    text = {"version": 1, "sign": "negated", "layers": [0, 1], "method": "m", "n_tokens": 1, "n_queries": 1,
            "runtime": "", "model_sha256": "0" * 64, "text_sha256": [], "report": {}}
    text.update(changes)
    return {"edgekv.qfilters": json.dumps({key: value for key, value in text.items() if value is not None})}


GOOD = np.ones((2, 2, 32), np.float32)


def with_(index, value) -> np.ndarray:
    rows = GOOD.astype(np.float64)
    rows[index] = value
    return rows


@pytest.mark.parametrize("contents, why", [
    (None, "no such file or folder"),
    (b"", "not a safetensors file"),
    (b"no safetensors at all, just text", "not a safetensors file"),
    (struct.pack("<Q", 2**62) + b"{}", "not a safetensors file"),
    (b"cut", "not a safetensors file"),
    ({"other": GOOD}, "has no tensor q_filters"),
    ({"q_filters": GOOD.astype(np.int32)}, "has type I32; F16, BF16, F32 or F64"),
    ({"q_filters": np.ones((3, 2, 32), np.float32)}, r"shape \[3, 2, 32\], but .*tiny.gguf needs \[2, 2, 32\]"),
    ({"q_filters": np.ones((2, 3, 32), np.float32)}, r"shape \[2, 3, 32\], but .*tiny.gguf needs \[2, 2, 32\]"),
    ({"q_filters": np.ones((2, 2, 16), np.float32)}, r"shape \[2, 2, 16\], but .*tiny.gguf needs \[2, 2, 32\]"),
    ({"q_filters": np.ones((2, 64), np.float32)}, r"shape \[2, 64\], but .*tiny.gguf needs \[2, 2, 32\]"),
    ({"q_filters": np.ones((0,), np.float32)}, r"shape \[0\], but .*tiny.gguf needs \[2, 2, 32\]"),
    ({"q_filters": with_((1, 0, 3), np.nan)}, "holds NaN or infinity in layer 1"),
    ({"q_filters": with_((0, 1, 3), -np.inf)}, "holds NaN or infinity in layer 0"),
    ({"q_filters": with_((0, 1, 3), 1e300)}, "holds NaN or infinity in layer 0"),
    ({"q_filters": with_((1, 1), 0)}, "hold an all-zero vector in layer 1"),
    ({"q_filters": with_((1, 1), 1e-300)}, "hold an all-zero vector in layer 1"),
    (({"q_filters": GOOD}, said()), r"made for another model \(model_sha256 differs\)"),
    (({"q_filters": GOOD}, {"edgekv.qfilters": "{"}), "damaged metadata edgekv.qfilters: is no JSON"),
    (({"q_filters": GOOD}, {"edgekv.qfilters": "[" * 100000}), "damaged metadata edgekv.qfilters: is no JSON"),
    (({"q_filters": GOOD}, {"edgekv.qfilters": "[]"}), "damaged metadata edgekv.qfilters: is no object"),
    (({"q_filters": GOOD}, said(version=2)), "has version 2, this edgekv reads 1"),
    (({"q_filters": GOOD}, said(sign="keep-high")), "sign is not 'negated'"),
    (({"q_filters": GOOD}, said(method=None)), "method is missing"),
    (({"q_filters": GOOD}, said(n_tokens=True)), "n_tokens is missing or of the wrong type"),
    (({"q_filters": GOOD}, said(n_queries=-1)), "n_queries is missing or of the wrong type"),
    (({"q_filters": GOOD}, said(n_queries=2**64)), "n_queries is missing or of the wrong type"),
    (({"q_filters": GOOD}, said(text_sha256=[1])), "text_sha256 is missing or no list"),
    (({"q_filters": GOOD}, said(report={"energy": ["x"]})), "report is missing or holds more"),
    (({"q_filters": GOOD}, said(report={"energy": [0.5]})), "energy has 1 numbers for 4 KV heads"),
    (({"q_filters": GOOD}, said(report={"energy": [0.5, 0.5, 0.5, float("nan")]})), "not between 0 and 1"),
    (({"q_filters": GOOD}, said(report={"energy": [0.5, 0.5, 0.5, 1e300]})), "not between 0 and 1"),
])
def test_import_refuses(model, tmp_path, contents, why):
    path = tmp_path / "f.safetensors"
    if contents == b"cut":
        save_file({"q_filters": GOOD}, path)
        path.write_bytes(path.read_bytes()[:-4])
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    elif contents is not None:
        tensors, metadata = contents if isinstance(contents, tuple) else (contents, None)
        save_file(tensors, path, metadata)
    with pytest.raises(EdgekvError, match=why) as e:
        published.load(path, model)
    assert str(e.value).startswith(f"--qfilters {path}") and "\n" not in str(e.value)


def test_import_refuses_nan_in_layers_without_eviction(layouts, tmp_path):
    theirs = random_rows((4, 2, 32))
    theirs[2, 1, 5] = np.nan
    save_file({"q_filters": theirs}, tmp_path / "f.safetensors")
    with pytest.raises(EdgekvError, match="NaN or infinity in layer 2"):
        published.load(tmp_path / "f.safetensors", layouts["gemma3"])


def test_import_refuses_what_is_too_large(model, tmp_path):
    path = tmp_path / "f.safetensors"
    path.touch()
    os.truncate(path, published.MAX_BYTES + 1)  # sparse
    with pytest.raises(EdgekvError, match="f.safetensors: too large"):
        published.load(path, model)


def test_models_without_a_published_form(model, tmp_path, monkeypatch):
    save_file({"q_filters": GOOD}, tmp_path / "f.safetensors")
    for arch in ("deepseek2", "no-such-architecture"):
        other = GGUF(write_tiny_model(tmp_path / "m.gguf", arch=arch))
        with pytest.raises(EdgekvError, match=f"architecture '{arch}': .* is not known .*calibrate instead"):
            published.load(tmp_path / "f.safetensors", other)

    one, two = native.cache_layers(model.path)
    for changed in (dict(n_head_kv=1), dict(head_size_k=64)):
        uneven = [one, native.CacheLayer(**{**two.__dict__, **changed})]
        monkeypatch.setattr(native, "cache_layers", lambda path: uneven)
        with pytest.raises(EdgekvError, match="tiny.gguf: .*differs between layers; calibrate instead"):
            published.load(tmp_path / "f.safetensors", model)
        with pytest.raises(EdgekvError, match="tiny.gguf: .*differs between layers; calibrate instead"):
            published.save(tmp_path / "o.safetensors", random_filters(model), model)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["f.safetensors"]


def test_blocks_behind_the_model_have_no_row(layouts, tmp_path, monkeypatch):
    g = GGUF(layouts["gemma3"].path)
    get, more = g.get, {"gemma3.nextn_predict_layers": 1}
    monkeypatch.setattr(g, "get", lambda key, default=None: more.get(key) or get(key, default))
    monkeypatch.setattr(native, "cache_layers", lambda path: layers[:1])
    layers = [native.CacheLayer(1, 4, 2, 32, 32, 64, 64)]
    save_file({"q_filters": random_rows((3, 2, 32))}, tmp_path / "f.safetensors")
    assert published.load(tmp_path / "f.safetensors", g).layers == [1]
    save_file({"q_filters": random_rows((4, 2, 32))}, tmp_path / "f.safetensors")
    with pytest.raises(EdgekvError, match=r"needs \[3, 2, 32\]"):
        published.load(tmp_path / "f.safetensors", g)


# --- out -----------------------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("arch", LAYOUTS)
def test_what_is_exported_is_imported_bit_for_bit(layouts, tmp_path_factory, arch, data):
    g, (_, layers) = layouts[arch], LAYOUTS[arch]
    shape = (len(layers), 2, g.key_length)
    rows = data.draw(hnp.arrays(np.float32, shape, elements=finite, fill=finite))
    rows[..., 0] = np.where((rows == 0).all(axis=-1), 1, rows[..., 0])
    text = st.text(max_size=8)
    report = data.draw(st.dictionaries(st.sampled_from(["energy", "spearman"]), hnp.arrays(np.float32, 2 * len(layers),
                                                                                            elements=shares)))
    f = QFilters(list(rows), layers, method=data.draw(text), text_sha256=data.draw(st.lists(text, max_size=2)),
                 n_tokens=data.draw(st.integers(0, 2**64 - 1)), n_queries=data.draw(st.integers(0, 2**64 - 1)),
                 runtime=data.draw(text), model_sha256=model_fingerprint(g), report=report)
    path = tmp_path_factory.mktemp("out") / "f.safetensors"
    published.save(path, f, g)
    back = published.load(path, g)
    assert back.flat().tobytes() == f.flat().tobytes()
    assert {name: values.tobytes() for name, values in back.report.items()} == {
        name: values.tobytes() for name, values in f.report.items()}
    assert {**back.__dict__, "vectors": 0, "report": 0} == {**f.__dict__, "vectors": 0, "report": 0}


@pytest.mark.parametrize("arch", LAYOUTS)
def test_export_as_others_read_it(layouts, tmp_path, arch):
    g, (_, layers) = layouts[arch], LAYOUTS[arch]
    size = g.key_length
    rows = random_rows((len(layers), 2, size))
    f = QFilters(list(rows), layers, "by hand", model_sha256=model_fingerprint(g))
    published.save(tmp_path / "f.safetensors", f, g)
    (name, tensor), = load_file(tmp_path / "f.safetensors").items()
    assert (name, tensor.dtype, tensor.shape) == ("q_filters", np.float32, (4, 2, size))
    for il in range(4):
        for c in range(size):
            # c is one of a pair (i, i + size/2), which are 2i and 2i + 1 where they are next to each other
            there = 2 * (c % (size // 2)) + c // (size // 2) if arch == "llama" else c
            expected = -rows[layers.index(il), :, there] if il in layers else np.zeros(2)
            np.testing.assert_array_equal(tensor[il, :, c], expected)
    data = (tmp_path / "f.safetensors").read_bytes()
    text = json.loads(data[8:8 + struct.unpack_from("<Q", data)[0]])["__metadata__"]["edgekv.qfilters"]
    assert {"sign": "negated", "layers": layers, "method": "by hand", "model_sha256": model_fingerprint(g)}.items() <= (
        json.loads(text).items())


def test_export_refuses(model, layouts, tmp_path):
    def refused(why, filters, g=model, path=tmp_path / "f.safetensors"):
        with pytest.raises(EdgekvError, match=why) as e:
            published.save(path, filters, g)
        assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []

    f = random_filters(model)
    refused("no/f.safetensors: cannot be written", f, path=tmp_path / "no" / "f.safetensors")
    refused("is a folder", f, path=tmp_path)
    f.vectors[0][0] = np.nan
    refused("tiny.gguf: Q-Filters hold NaN", f)
    refused("made for another model", random_filters(model, model_sha256="0" * 64))


def test_another_models_export_is_refused(model, tmp_path):
    published.save(tmp_path / "f.safetensors", random_filters(model), model)
    other = GGUF(write_tiny_model(tmp_path / "other.gguf", seed=1))
    with pytest.raises(EdgekvError, match="f.safetensors: Q-Filters were made for another model"):
        published.load(tmp_path / "f.safetensors", other)
    half = GGUF(write_tiny_model(tmp_path / "half.gguf", dtype="f16"))  # the same in another precision
    assert published.load(tmp_path / "f.safetensors", half).flat().tobytes() == random_filters(model).flat().tobytes()


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def with_filters(model, tmp_path):
    path = tmp_path / "a.gguf"
    convert(model.path, path, random_filters(model))
    return path


def test_export_and_convert(model, with_filters, tmp_path):
    r = edgekv_apart("filters", "export", with_filters, "-o", tmp_path / "f.safetensors")
    assert (r.returncode, r.stdout, r.stderr) == (0, f"{tmp_path / 'f.safetensors'}\n", "")
    r = edgekv_apart("convert", model.path, "--with-qfilters", "--qfilters", tmp_path / "f.safetensors", "-o",
                     tmp_path / "b.gguf")
    assert r.returncode == 0, r.stderr
    assert (tmp_path / "b.gguf").read_bytes() == with_filters.read_bytes()


def test_export_errors(model, with_filters, tmp_path):
    before = with_filters.read_bytes()
    out = tmp_path / "f.safetensors"
    fails("tiny.gguf: holds no Q-Filters; edgekv convert", "filters", "export", model.path, "-o", out)
    fails("nope.gguf: no such file", "filters", "export", tmp_path / "nope.gguf", "-o", out)
    fails("Missing option '-o'", "filters", "export", with_filters, status=2)
    fails("is no folder that can be written to", "filters", "export", with_filters, "-o", tmp_path / "no" / "f")
    fails("is MODEL itself", "filters", "export", with_filters, "-o", with_filters)
    assert with_filters.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_convert_from_the_hub(model, tmp_path):
    """A repository of published filters through the command line, and one that is not there."""
    theirs = random_rows()
    folder = tmp_path / "hub" / "org" / "tiny_qfilt"
    folder.mkdir(parents=True)
    save_file({"q_filters": theirs}, folder / "model.safetensors")
    (folder / "README.md").write_text("words")
    convert_to = ("convert", model.path, "--with-qfilters", "-o", tmp_path / "out.gguf", "--qfilters")
    with Hub(tmp_path / "hub") as server:
        there = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="", NO_PROXY="127.0.0.1")
        fails("--qfilters org/none: no such model on the hub", *convert_to, "org/none", **there)
        assert not (tmp_path / "out.gguf").exists()
        r = edgekv_apart(*convert_to, "org/tiny_qfilt", **there)
        assert r.returncode == 0, r.stderr
        assert server.sent() == ["model.safetensors"]
    got = np.stack(read(GGUF(tmp_path / "out.gguf")).vectors)
    np.testing.assert_array_equal(got[..., ::2], -theirs[..., :16])


def test_no_network(model, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}"
    fails("--qfilters org/name: the hub cannot be reached", "convert", model.path, "--with-qfilters",
          "-o", tmp_path / "out.gguf", "--qfilters", "org/name",
          HF_ENDPOINT=nobody, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="", NO_PROXY="127.0.0.1")
    assert not (tmp_path / "out.gguf").exists()


def test_diff_is_numpys(model, with_filters, tmp_path):
    a = random_filters(model)
    b = random_filters(model, seed=1, method="otherwise", n_tokens=7, report=a.report)
    b.vectors = [(u + 3 * v).astype(np.float32) for u, v in zip(b.vectors, a.vectors)]
    convert(model.path, tmp_path / "b.gguf", b)
    published.save(tmp_path / "b.safetensors", b, model)
    save_filters(tmp_path / "alone.gguf", model, b)

    u, v = np.array(a.vectors, np.float64), np.array(b.vectors, np.float64)
    cosine = np.einsum("lhc,lhc->lh", u, v) / np.linalg.norm(u, axis=2) / np.linalg.norm(v, axis=2)
    ratio = np.linalg.norm(v, axis=2) / np.linalg.norm(u, axis=2)
    for other in ("b.gguf", "b.safetensors", "alone.gguf"):
        r = edgekv_apart("filters", "diff", with_filters, tmp_path / other, "-o", "json")
        assert (r.returncode, r.stderr) == (0, "")
        facts = json.loads(r.stdout)
        assert facts["a"] == str(with_filters) and facts["b"] == str(tmp_path / other) and not facts["identical"]
        np.testing.assert_allclose([row["cosine"] for row in facts["layers"]], cosine, rtol=1e-12)
        assert [row["layer"] for row in facts["layers"]] == [0, 1]
        np.testing.assert_allclose([row["least"] for row in facts["layers"]], cosine.min(axis=1), rtol=1e-12)
        np.testing.assert_allclose([row["median"] for row in facts["layers"]], np.median(cosine, axis=1), rtol=1e-12)
        np.testing.assert_allclose([row["norm_ratio"] for row in facts["layers"]], np.median(ratio, axis=1), rtol=1e-12)
        np.testing.assert_allclose([facts["least"], facts["median"]], [cosine.min(), np.median(cosine)], rtol=1e-12)
        np.testing.assert_allclose([facts["norm_ratio"][key] for key in ("least", "median", "most")],
                                   [ratio.min(), np.median(ratio), ratio.max()], rtol=1e-12)
        assert facts["metadata"] == {"method": ["random", "otherwise"], "n_tokens": [12000, 7]}

    text = edgekv_apart("filters", "diff", with_filters, tmp_path / "b.safetensors").stdout.splitlines()
    assert text[3].split() == ["all", f"{cosine.min():.4f}", f"{np.median(cosine):.4f}", f"{np.median(ratio):.4f}"]
    assert {"method of A         random", "method of B         otherwise"} < set(text)


def test_diff_of_published_filters(model, with_filters, tmp_path):
    theirs = random_rows()
    save_file({"q_filters": theirs}, tmp_path / "f.safetensors")
    save_file({"q_filters": 2 * theirs}, tmp_path / "g.safetensors")
    save_file({"q_filters": -theirs}, tmp_path / "h.safetensors")

    def facts(*args):
        r = edgekv("filters", "diff", *args, "-o", "json")
        assert r.exit_code == 0, r.stderr
        return json.loads(r.stdout)

    reports = facts(with_filters, tmp_path / "f.safetensors")["metadata"]["report"]
    assert reports == [sorted(random_filters(model).report), []]
    same = facts(tmp_path / "f.safetensors", tmp_path / "f.safetensors", "--model", model.path)
    assert same["identical"] and same["metadata"] == {} and abs(same["least"] - 1) < 1e-12
    doubled = facts(tmp_path / "f.safetensors", tmp_path / "g.safetensors", "--model", model.path)
    assert not doubled["identical"] and abs(doubled["least"] - 1) < 1e-12 and doubled["norm_ratio"]["most"] == 2
    opposite = facts(tmp_path / "f.safetensors", tmp_path / "h.safetensors", "--model", model.path)
    assert abs(opposite["median"] + 1) < 1e-12
    # the order of the arguments does not say whose model serves
    assert facts(tmp_path / "f.safetensors", with_filters)["layers"][0]["cosine"] == pytest.approx(
        facts(with_filters, tmp_path / "f.safetensors")["layers"][0]["cosine"], rel=1e-12)


def test_diff_errors(model, with_filters, tmp_path):
    save_file({"q_filters": GOOD}, tmp_path / "f.safetensors")
    save_file({"q_filters": GOOD[:1]}, tmp_path / "short.safetensors")
    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    convert(other, other, random_filters(GGUF(other)))
    save_filters(tmp_path / "alone.gguf", model, random_filters(model))
    bad = random_filters(model)
    bad.vectors[1][0] = 0
    save_filters(tmp_path / "zero.gguf", model, bad)
    fewer = random_filters(model, report={})
    fewer.vectors.pop(), fewer.layers.pop()
    save_filters(tmp_path / "fewer.gguf", model, fewer)

    fails("Missing argument 'B'", "filters", "diff", with_filters, status=2)
    fails("f.safetensors: published filters do not say which model", "filters", "diff", tmp_path / "f.safetensors",
          tmp_path / "f.safetensors")
    fails("f.safetensors: published filters do not say which model", "filters", "diff", tmp_path / "alone.gguf",
          tmp_path / "f.safetensors")
    fails("short.safetensors: q_filters has shape [1, 2, 32]", "filters", "diff", with_filters,
          tmp_path / "short.safetensors")
    fails("belong to different models", "filters", "diff", with_filters, other)
    fails("are of different shape: 2 layers from 0 to 1, 2 KV heads of 32, and 1 layers from 0 to 0", "filters", "diff",
          tmp_path / "alone.gguf", tmp_path / "fewer.gguf")
    fails(f"B {model.path}: holds no Q-Filters", "filters", "diff", with_filters, model.path)
    fails("A nope: no such file", "filters", "diff", "nope", with_filters)
    fails("zero.gguf: holds NaN, infinity or an all-zero vector", "filters", "diff", tmp_path / "alone.gguf",
          tmp_path / "zero.gguf")
    fails("zero.gguf: Q-Filters hold an all-zero vector in layer 1", "filters", "diff", with_filters,
          tmp_path / "zero.gguf")
    fails("nope.gguf: no such file", "filters", "diff", with_filters, with_filters, "--model", "nope.gguf")
