import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

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
    values = dict(method="random", text_sha256=["ab" * 32, "cd" * 32], n_tokens=12000, n_queries=3000,
                  runtime="test", model_sha256=filters.model_fingerprint(g))
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
    assert {**back.__dict__, "vectors": 0} == {**f.__dict__, "vectors": 0}
    assert filters.read(model) is None


def test_flat():
    f = QFilters([np.arange(6).reshape(2, 3), 6 + np.arange(4).reshape(1, 4)], [0, 2])
    assert f.flat().dtype == np.float32 and f.flat().tolist() == list(range(10))
    assert (f.head_count_kv, f.head_size) == ([2, 1], [3, 4])


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


@pytest.mark.parametrize("key, old, new, why", [
    ("version", struct.pack("<I", 1), struct.pack("<I", 2), "format version 2"),
    ("version", struct.pack("<I", 4), struct.pack("<I", 5), "version is missing or of the wrong type"),
    ("sign", b"keep-high", b"keep-low!", "sign"),
    ("head_size", struct.pack("<II", 32, 32), struct.pack("<II", 32, 31), "127 numbers|128 numbers"),
    ("head_size", struct.pack("<II", 32, 32), struct.pack("<Ii", 32, -32), "do not match"),
    ("n_queries", struct.pack("<I", 10), struct.pack("<I", 11), "n_queries"),
])
def test_read_refuses(model, tmp_path, key, old, new, why):
    path = tmp_path / "f.gguf"
    convert(model.path, path, random_filters(model))
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


# --- published files ---------------------------------------------------------------------------------------------------

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
    published = rng.standard_normal((2, 2, 32)).astype(np.float32)
    save_file({"q_filters": published}, tmp_path / "f.safetensors")
    f = filters.from_safetensors(tmp_path / "f.safetensors", model)
    f.validate(model)
    assert f.layers == [0, 1] and "f.safetensors" in f.method
    for il in range(2):
        for h in range(2):
            key = rng.standard_normal(32)  # a key before RoPE
            angle = rng.uniform(0, 6, 16)
            theirs = -(published[il, h] @ rope_in_halves(key, angle))
            ours = f.vectors[il][h] @ rope_in_pairs(converters_permutation(key), angle)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_import_without_permutation(tmp_path):
    g = GGUF(write_tiny_model(tmp_path / "m.gguf", arch="qwen2"))
    published = np.random.default_rng(3).standard_normal((2, 2, 32)).astype(np.float32)
    save_file({"q_filters": published}, tmp_path / "f.safetensors")
    np.testing.assert_array_equal(np.stack(filters.from_safetensors(tmp_path / "f.safetensors", g).vectors), -published)


def test_import_of_half_precision(model, tmp_path):
    published = np.random.default_rng(3).standard_normal((2, 2, 32)).astype(np.float16)
    save_file({"q_filters": published}, tmp_path / "f16.safetensors")
    got = np.stack(filters.from_safetensors(tmp_path / "f16.safetensors", model).vectors)
    np.testing.assert_array_equal(got[..., ::2], -published[..., :16].astype(np.float32))

    bits = published.astype(np.float32).view(np.uint32) >> 16  # truncated to bfloat16
    head = b'{"q_filters":{"dtype":"BF16","shape":[2,2,32],"data_offsets":[0,256]}}'
    (tmp_path / "bf16.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bits.astype("<u2").tobytes())
    got = np.stack(filters.from_safetensors(tmp_path / "bf16.safetensors", model).vectors)
    np.testing.assert_array_equal(got[..., 1::2], -(bits << 16).astype(np.uint32).view(np.float32)[..., 16:])


def test_import_refuses(model, tmp_path):
    path = tmp_path / "f.safetensors"

    def refuse(why, tensors=None, g=model):
        if tensors is not None:
            save_file(tensors, path)
        with pytest.raises(EdgekvError, match=why) as e:
            filters.from_safetensors(path, g)
        assert "\n" not in str(e.value)

    good = np.ones((2, 2, 32), np.float32)
    refuse("f.safetensors: no such file")
    path.write_bytes(b"no safetensors at all, just text")
    refuse("f.safetensors: not a safetensors file")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refuse("f.safetensors: not a safetensors file")
    refuse("has no tensor q_filters", {"other": good})
    refuse("has type I32", {"q_filters": good.astype(np.int32)})
    refuse(r"shape \[2, 3, 32\], .* needs \[2, 2, 32\]", {"q_filters": np.ones((2, 3, 32), np.float32)})
    refuse("f.safetensors: Q-Filters hold NaN", {"q_filters": good * np.nan})
    refuse("f.safetensors: Q-Filters hold an all-zero", {"q_filters": good * 0})
    other = GGUF(write_tiny_model(tmp_path / "m.gguf", arch="command-r"))
    refuse("not supported yet for the architecture 'command-r'", {"q_filters": good}, other)


@pytest.mark.skipif(not (REFERENCE / "smollm2-135m.npz").exists(), reason="the reference folder is not here")
def test_import_of_the_reference_filters(tmp_path):
    published = np.load(REFERENCE / "smollm2-135m.npz")["q_filters_kvpress"]
    save_file({"q_filters": published}, tmp_path / "f.safetensors")
    g = GGUF(write_tiny_model(tmp_path / "m.gguf", n_layer=30, n_head=9, n_head_kv=3, head_size=64, n_embd=32, n_ff=32))
    f = filters.from_safetensors(tmp_path / "f.safetensors", g)
    for il in range(30):
        for h in range(3):
            np.testing.assert_array_equal(f.vectors[il][h], converters_permutation(-published[il, h]))


# --- from statistics of queries ------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_kv=st.integers(1, 3), group=st.integers(1, 4), size=st.sampled_from([2, 8, 32]))
def test_from_moments_is_the_first_right_singular_vector(seed, n_kv, group, size):
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((n_kv * group, 200, size)) + 2 * rng.standard_normal((n_kv * group, 1, size))
    got = filters.from_moments(np.einsum("htc,htd->hcd", queries, queries), queries.sum(axis=1), group)
    directions = []
    for q in queries:  # the paper's procedure: SVD of the queries, sign by the majority of projections or their mean
        v = np.linalg.svd(q, full_matrices=False)[2][0]
        directions.append(v * np.sign((q @ v).sum()))
    expected = np.reshape(directions, (n_kv, group, size)).mean(axis=1)
    assert got.dtype == np.float32 and got.shape == (n_kv, size)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_from_moments_is_deterministic_and_keeps_the_sign():
    q = np.random.default_rng(0).standard_normal((2, 50, 8)) + 3
    moments, sums = np.einsum("htc,htd->hcd", q, q), q.sum(axis=1)
    one = filters.from_moments(moments, sums, 2)
    assert one.tobytes() == filters.from_moments(moments.copy(), sums.copy(), 2).tobytes()
    assert (one @ sums.mean(axis=0) > 0).all()
    np.testing.assert_allclose(filters.from_moments(moments, -sums, 2), -one, atol=1e-7)  # the sums alone give the sign
    assert np.linalg.norm(one) < 1 + 1e-6  # a mean of unit vectors, not normalised again


def test_from_moments_refuses_nothing_and_nan():
    with pytest.raises(EdgekvError, match="no queries"):
        filters.from_moments(np.zeros((2, 4, 4)), np.zeros((2, 4)), 1)
    with pytest.raises(EdgekvError, match="not finite"):
        filters.from_moments(np.full((2, 4, 4), np.nan), np.zeros((2, 4)), 1)
    with pytest.raises(ValueError):
        filters.from_moments(np.ones((3, 4, 4)), np.ones((3, 4)), 2)
