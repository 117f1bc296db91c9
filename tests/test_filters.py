import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import filters
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from tinymodel import write_tiny_model

REFERENCE = Path(os.environ.get("EDGEKV_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))


def random_filters(g: GGUF, seed: int = 0, **changes) -> QFilters:
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal((g.head_count_kv[il], g.key_length)).astype(np.float32)
               for il in g.attention_layers]
    n_heads = sum(map(len, vectors))
    report = {name: rng.uniform(low, high, n_heads) for name, (low, high) in filters.REPORT.items()}
    values = dict(method="random", text_sha256=["ab" * 32, "cd" * 32], n_tokens=12000, n_queries=3000,
                  runtime="test", model_sha256=filters.model_fingerprint(g), report=report)
    return QFilters(vectors, g.attention_layers, **{**values, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return GGUF(write_tiny_model(tmp_path_factory.mktemp("filters") / "tiny.gguf"))


# --- the form in GGUF metadata ---------------------------------------------------------------------------------------

def test_metadata_as_the_gguf_package_reads_it(model, tmp_path):
    f = random_filters(model)
    convert(model.path, tmp_path / "f.gguf", f)
    fields = gguf.GGUFReader(tmp_path / "f.gguf").fields
    T = gguf.GGUFValueType
    expected = {
        "version": ([T.UINT32], 1), "layers": ([T.ARRAY, T.INT32], [0, 1]),
        "head_count_kv": ([T.ARRAY, T.INT32], [2, 2]), "head_size": ([T.ARRAY, T.INT32], [32, 32]),
        "vectors": ([T.ARRAY, T.FLOAT32], np.stack(f.vectors).ravel().tolist()), "sign": ([T.STRING], "keep-high"),
        "method": ([T.STRING], "random"), "model_sha256": ([T.STRING], f.model_sha256),
        "text_sha256": ([T.ARRAY, T.STRING], ["ab" * 32, "cd" * 32]), "n_tokens": ([T.UINT64], 12000),
        "n_queries": ([T.UINT64], 3000), "runtime": ([T.STRING], "test"),
        **{f"report.{name}": ([T.ARRAY, T.FLOAT32], f.report[name].tolist())
           for name in ("energy", "one_sided", "spearman", "spearman_knorm")},
    }
    ours = {k.removeprefix(filters.PREFIX): v for k, v in fields.items() if k.startswith(filters.PREFIX)}
    assert {k: (v.types, v.contents()) for k, v in ours.items()} == expected


def test_round_trip(model, tmp_path):
    f = random_filters(model)
    convert(model.path, tmp_path / "f.gguf", f)
    g = GGUF(tmp_path / "f.gguf")
    back = filters.read(g)
    back.validate(g)
    np.testing.assert_array_equal(back.flat(), f.flat())
    assert {**back.__dict__, "vectors": 0, "report": 0} == {**f.__dict__, "vectors": 0, "report": 0}
    assert back.report.keys() == f.report.keys()
    for name, values in f.report.items():
        assert values.dtype == np.float32 and back.report[name].tobytes() == values.tobytes()
    assert filters.read(model) is None

    f.report = {"energy": f.report["energy"]}  # all are optional
    convert(model.path, tmp_path / "f.gguf", f)
    assert list(filters.read(GGUF(tmp_path / "f.gguf")).report) == ["energy"]


def test_flat():
    f = QFilters([np.arange(6).reshape(2, 3), 6 + np.arange(4).reshape(1, 4)], [0, 2])
    assert f.flat().dtype == np.float32 and f.flat().tolist() == list(range(10))
    assert (f.head_count_kv, f.head_size) == ([2, 1], [3, 4])
    f.report = filters.join_reports([{"energy": np.array([0.1, 0.2])}, {"energy": np.array([0.3])}])
    assert [part.tolist() for part in f.by_layer("energy")] == [[0.1, 0.2], [0.3]]


@pytest.mark.parametrize("change, why", [
    (lambda f: f.vectors[1].__setitem__((0, 3), np.nan), "NaN or infinity in layer 1"),
    (lambda f: f.vectors[0].__setitem__((1, 0), -np.inf), "NaN or infinity in layer 0"),
    (lambda f: f.vectors[1].__setitem__(0, 0), "all-zero vector in layer 1"),
    (lambda f: setattr(f, "layers", [0, 2]), "layers 0 to 1"),
    (lambda f: setattr(f, "layers", [-1, 0]), "layers 0 to 1"),
    (lambda f: setattr(f, "layers", [1, 0]), "layers 1, 0"),
    (lambda f: setattr(f, "layers", [0]), "name 1 layers and hold vectors for 2"),
    (lambda f: (f.layers.pop(), f.vectors.pop()), "cover 1 of the model's 2 layers"),
    (lambda f: f.vectors.__setitem__(0, np.ones((2, 16), np.float32)), "another model"),
    (lambda f: f.vectors.__setitem__(0, np.ones((3, 32), np.float32)), "another model"),
    (lambda f: setattr(f, "model_sha256", "0" * 64), "another model"),
    (lambda f: (f.layers.clear(), f.vectors.clear()), "name 0 layers"),
    (lambda f: f.report.update(energy=f.report["energy"][:3]), "report.energy has 3 numbers for 4 KV heads"),
    (lambda f: f.report["one_sided"].__setitem__(2, -0.01), "report.one_sided holds numbers .* between 0 and 1"),
    (lambda f: f.report["spearman"].__setitem__(0, np.nan), "report.spearman holds numbers .* between -1 and 1"),
    (lambda f: f.report["spearman_knorm"].__setitem__(3, np.inf), "report.spearman_knorm holds numbers"),
])
def test_validate_refuses(model, tmp_path, change, why):
    f = random_filters(model)
    f.validate(model)
    change(f)
    with pytest.raises(EdgekvError, match=f"tiny.gguf: Q-Filters .*{why}") as e:
        f.validate(model)
    assert "\n" not in str(e.value)
    with pytest.raises(EdgekvError):  # convert never writes what read and validate would refuse
        convert(model.path, tmp_path / "f.gguf", f)
    assert not list(tmp_path.iterdir())


def patched(data: bytes, key: str, old: bytes, new: bytes) -> bytes:
    """The value of a key replaced by one of the same length."""
    at = data.index(key.encode()) + len(key)
    start = data.index(old, at)
    assert len(old) == len(new) and start - at < 64
    return data[:start] + new + data[start + len(old):]


ENERGY = struct.pack("<4f", 0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("key, old, new, why", [
    ("version", struct.pack("<I", 1), struct.pack("<I", 2), "format version 2"),
    ("version", struct.pack("<I", 4), struct.pack("<I", 5), "version is missing or of the wrong type"),
    ("sign", b"keep-high", b"keep-low!", "sign"),
    ("head_size", struct.pack("<II", 32, 32), struct.pack("<II", 32, 31), "127 numbers|128 numbers"),
    ("head_size", struct.pack("<II", 32, 32), struct.pack("<Ii", 32, -32), "do not match"),
    ("n_queries", struct.pack("<I", 10), struct.pack("<I", 11), "n_queries"),
    ("report.energy", struct.pack("<I", 6), struct.pack("<I", 5), "report.energy is missing or of the wrong type"),
    ("report.energy", ENERGY, b"\xff" * 4 + ENERGY[4:], "report.energy holds numbers that are not between 0 and 1"),
    ("report.energy", ENERGY, struct.pack("<4f", 0.1, 0.2, 0.3, 1.5), "report.energy holds numbers"),
])
def test_read_refuses(model, tmp_path, key, old, new, why):
    path = tmp_path / "f.gguf"
    convert(model.path, path, random_filters(model, report={"energy": [0.1, 0.2, 0.3, 0.4]}))
    path.write_bytes(patched(path.read_bytes(), filters.PREFIX + key, old, new))
    with pytest.raises(EdgekvError, match=f"f.gguf: .*({why})"):
        filters.read(GGUF(path))


# --- fingerprint -------------------------------------------------------------------------------------------------------

def test_fingerprint_survives_requantisation_and_tells_models_apart(tmp_path):
    def of(**kw):
        return filters.model_fingerprint(GGUF(write_tiny_model(tmp_path / "m.gguf", **kw)))

    base = of()
    assert base == of(dtype="f16") == of(n_ctx=8192)
    assert len({base, of(seed=1), of(n_head=2), of(n_head_kv=1), of(n_layer=1), of(head_size=16)}) == 6


def test_fingerprint_as_documented(model):
    import hashlib

    reader = gguf.GGUFReader(model.path)
    h = hashlib.sha256(b"edgekv model 1\nllama\n4,4\n2,2\n32,32\n")
    for t in sorted((t for t in reader.tensors if "norm" in t.name), key=lambda t: t.name):
        h.update(f"{t.name} {','.join(str(d) for d in t.shape)}\n".encode() + t.data.astype("<f4").tobytes())
    assert filters.model_fingerprint(model) == h.hexdigest()


# --- from statistics of queries ------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_kv=st.integers(1, 3), group=st.integers(1, 4), size=st.sampled_from([2, 8, 32]))
def test_from_moments_is_the_first_right_singular_vector(seed, n_kv, group, size):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((n_kv * group, 200, size)) + 2 * rng.standard_normal((n_kv * group, 1, size))
    moments, sums = np.einsum("htc,htd->hcd", queries, queries), queries.sum(axis=1)
    got, report = filters.from_moments(moments, sums, group, 200)
    directions, energy, one_sided = [], [], []
    for q in queries:  # the paper's procedure: SVD of the queries, sign by the majority of projections or their mean
        _, s, v = np.linalg.svd(q, full_matrices=False)
        projections = q @ v[0] * np.sign((q @ v[0]).sum())
        directions.append(v[0] * np.sign((q @ v[0]).sum()))
        energy.append(s[0] ** 2 / (s**2).sum())
        one_sided.append(projections.mean() / np.sqrt((projections**2).mean()))
    expected = np.reshape(directions, (n_kv, group, size)).mean(axis=1)
    assert got.dtype == np.float32 and got.shape == (n_kv, size)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for name, values in (("energy", energy), ("one_sided", one_sided)):
        assert report[name].dtype == np.float32 and (report[name] >= 0).all() and (report[name] <= 1).all()
        np.testing.assert_allclose(report[name], np.reshape(values, (n_kv, group)).mean(axis=1), atol=1e-5)
    assert report.keys() == {"energy", "one_sided"}


def test_reports_of_queries_that_are_all_alike():
    """Rounding, of sums in float32 too, does not push a share past 1, which no reader would take."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        q = np.repeat(rng.standard_normal((3, 1, 16)), 100, axis=1)
        moments, sums = np.einsum("htc,htd->hcd", q, q), q.sum(axis=1)
        noise = rng.uniform(1 - 1e-6, 1 + 1e-6, (2, *moments.shape))
        _, report = filters.from_moments(moments * noise[0], sums * noise[1, :, 0], 1, 100)
        for values in report.values():
            assert (values <= 1).all() and (values > 1 - 1e-5).all()


def test_from_moments_is_deterministic_and_keeps_the_sign():
    q = np.random.default_rng(0).standard_normal((2, 50, 8)) + 3
    moments, sums = np.einsum("htc,htd->hcd", q, q), q.sum(axis=1)
    one, report = filters.from_moments(moments, sums, 2, 50)
    assert one.tobytes() == filters.from_moments(moments.copy(), sums.copy(), 2, 50)[0].tobytes()
    assert (one @ sums.mean(axis=0) > 0).all()
    other, same = filters.from_moments(moments, -sums, 2, 50)
    np.testing.assert_allclose(other, -one, atol=1e-7)  # the sums alone give the sign
    assert same == report
    assert np.linalg.norm(one) < 1 + 1e-6  # a mean of unit vectors, not normalised again


def test_from_moments_refuses_nothing_and_nan():
    with pytest.raises(EdgekvError, match="no queries"):
        filters.from_moments(np.zeros((2, 4, 4)), np.zeros((2, 4)), 1, 10)
    with pytest.raises(EdgekvError, match="not finite"):
        filters.from_moments(np.full((2, 4, 4), np.nan), np.zeros((2, 4)), 1, 10)
    with pytest.raises(ValueError):
        filters.from_moments(np.ones((3, 4, 4)), np.ones((3, 4)), 2, 10)
