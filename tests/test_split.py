"""Split models: read, found, loaded and calibrated as the whole ones; the parts are written by the gguf package."""

import ctypes
import itertools
import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekv as package
from edgekv import filters
from edgekv.calibrate import calibrate
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF, part_path, split_name
from edgekv.llama import window_layers
from edgekv.session import Session
from edgekv.settings import EvictionSettings
from process import edgekv, fails
from test_filters import random_filters
from tinymodel import write_tiny_model


def write_parts(path, metadata, tensors, sizes) -> list[Path]:
    """Write a model in parts of ``sizes`` tensors each; a model of one part is not split. The files in their order."""
    w = gguf.GGUFWriter(path, metadata["general.architecture"][0])
    for key, (value, *types) in metadata.items():
        if key != "general.architecture":  # written already
            w.add_key_value(key, value, *types)
    tensors = iter(tensors)
    for i, n in enumerate(sizes):
        if i > 0:
            w.tensors.append({})
        for name, data, kind in itertools.islice(tensors, n):
            w.add_tensor(name, data, raw_dtype=kind)
    assert next(tensors, None) is None
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return w.format_shard_names(Path(path))


def split_model(src, dst, n_parts=3, empty_first=False) -> list[Path]:
    """The model ``src`` in ``n_parts`` parts of about as many tensors, named after ``dst``."""
    reader = gguf.GGUFReader(src)
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            metadata[key] = (field.contents(), field.types[0], *field.types[1:2])
    tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors]
    n = n_parts - empty_first
    sizes = [0] * empty_first + [len(part) for part in np.array_split(np.arange(len(tensors)), n)]
    return write_parts(dst, metadata, tensors, sizes)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [
    ("m-00001-of-00003.gguf", ("m", 1, 3)), ("a-00001-of-00002-00002-of-00002.gguf", ("a-00001-of-00002", 2, 2)),
    ("m\n-00001-of-00003.gguf", ("m\n", 1, 3)), ("-00001-of-00003.gguf", None), ("m-0001-of-00003.gguf", None),
    ("m-000001-of-000003.gguf", None), ("m-00001-of-00003.GGUF", None), ("m-00001-of-00003.gguf.part", None),
    ("m-0000१-of-00003.gguf", None), ("m.gguf", None),
])
def test_names_of_parts(name, expected):
    assert split_name(name) == split_name(Path("folder") / name) == expected


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
       .filter(lambda name: name not in (".", "..")), st.integers(1, 65535), st.integers(1, 65535))
def test_names_are_those_of_llama_cpp(prefix, number, count):
    """Both directions, against llama_split_path and llama_split_prefix."""
    path = part_path("x/any.gguf", prefix, number, count)
    buffer = ctypes.create_string_buffer(1000)
    assert llama_cpp.llama_split_path(buffer, 1000, f"x/{prefix}".encode(), number - 1, count)
    assert buffer.value.decode() == str(path) and split_name(path) == (prefix, number, count)
    assert llama_cpp.llama_split_prefix(buffer, 1000, str(path).encode(), number - 1, count)
    assert buffer.value.decode() == f"x/{prefix}"


U32, STRING = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
KINDS = {np.float32: gguf.GGMLQuantizationType.F32, np.float16: gguf.GGMLQuantizationType.F16}


@st.composite
def models(draw):
    """Tensors (name, data, type) of a model and the sizes of its parts, also parts without any."""
    names = draw(st.lists(st.sampled_from([f"blk.{il}.{what}.weight" for il in range(4) for what in
                                           ("attn_norm", "ffn_norm", "attn_q", "ffn_up")]), unique=True, max_size=12))
    tensors = []
    for i, name in enumerate(names):
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        kind = draw(st.sampled_from(list(KINDS)))
        tensors.append((name, np.random.default_rng(i).standard_normal(shape).astype(kind), KINDS[kind]))
    ends = sorted(draw(st.lists(st.integers(0, len(names)), min_size=1, max_size=6)))
    sizes = np.diff([0, *ends, len(names)]).tolist()
    return tensors, sizes


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(models())
def test_any_split_reads_as_the_whole(tmp_path, model):
    tensors, sizes = model
    metadata = {"general.architecture": ("llama", STRING), "general.name": ("a name", STRING),
                "llama.block_count": (4, U32), "llama.embedding_length": (64, U32),
                "llama.attention.head_count": (4, U32), "llama.attention.head_count_kv": (2, U32)}
    for old in tmp_path.iterdir():
        old.unlink()
    (whole,) = write_parts(tmp_path / "whole.gguf", metadata, tensors, [len(tensors)])
    files = write_parts(tmp_path / "split.gguf", metadata, tensors, sizes)
    g, reference = GGUF(files[0]), GGUF(whole)
    assert [part.path for part in g.parts] == files and [len(part.tensors) for part in g.parts] == sizes
    assert list(g.tensors) == [name for name, _, _ in tensors] and g.size == sum(f.stat().st_size for f in files)
    for (name, data, kind), file in zip(tensors, [f for f, n in zip(files, sizes) for _ in range(n)]):
        t = g.tensors[name]
        assert (t.path, t.shape, t.type) == (file, data.shape[::-1], kind)
        assert b"".join(g.chunks(t)) == file.read_bytes()[t.offset:t.offset + t.nbytes] == data.tobytes()
        if kind == 0:
            np.testing.assert_array_equal(g.tensor_data(name), data)
    assert {k: g.get(k) for k in reference.fields} == {k: reference.get(k) for k in reference.fields}
    assert filters.model_fingerprint(g) == filters.model_fingerprint(reference)
    for file in files[1:]:
        with pytest.raises(EdgekvError, match=f"is part .* of {len(files)}; pass the first part, {files[0].name}$"):
            GGUF(file)


# --- the runtime -----------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": dict(dtype="f16"),
    "gemma3": dict(arch="gemma3", n_layer=4, n_swa=32),
    "lfm2": dict(arch="lfm2", n_layer=4, head_size=16),
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request, tmp_path_factory):
    """(whole, first part) of a model in three parts; that of the Llama has no tensors in the first."""
    folder = tmp_path_factory.mktemp(request.param)
    whole = write_tiny_model(folder / "whole.gguf", **ARCHITECTURES[request.param])
    return whole, split_model(whole, folder / "tiny.gguf", empty_first=request.param == "llama")[0]


TOKENS = np.random.default_rng(0).integers(3, 300, 200)


def logits(path, n_ubatch=32, **options):
    with Session(path, n_ctx=512, n_ubatch=n_ubatch, n_threads=1, **options) as s:
        out = [s.decode(TOKENS[i:i + n_ubatch], i, logits="all") for i in range(0, len(TOKENS), n_ubatch)]
        return np.concatenate(out), s.stats().n_evictions


def test_same_logits_and_facts(pair):
    whole, first = pair
    np.testing.assert_array_equal(logits(first)[0], logits(whole)[0])
    a, b = GGUF(first), GGUF(whole)
    assert len(a.parts) == 3 and window_layers(a) == window_layers(b)
    assert filters.model_fingerprint(a) == filters.model_fingerprint(b)


def test_filters_fit_both_ways_and_evict_the_same(pair, tmp_path):
    whole, first = pair
    g = GGUF(whole)
    layers = [il for il in g.attention_layers if il not in window_layers(g)]
    f = random_filters(g)
    f = filters.QFilters([v for il, v in zip(f.layers, f.vectors) if il in layers], layers, model_sha256=f.model_sha256)
    split, joined = tmp_path / "new-00001-of-00003.gguf", tmp_path / "whole.gguf"
    convert(first, split, f)  # made for the whole file
    convert(whole, joined, filters.read(GGUF(split)))

    rule = EvictionSettings("qfilters", 64, 16, 4)
    (a, n_a), (b, n_b) = (logits(path, settings=rule, filters=filters.read(GGUF(path))) for path in (split, joined))
    assert n_a == n_b > 0
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, logits(whole)[0])


def test_llama_command_line_and_calibration(tmp_path):
    whole = write_tiny_model(tmp_path / "whole.gguf", n_ctx=2048)
    files = split_model(whole, tmp_path / "tiny.gguf", 4)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 80)
    f = calibrate(files[0], text_files=[text], n_threads=1)
    assert f.model_sha256 == filters.model_fingerprint(GGUF(whole))
    np.testing.assert_array_equal(f.flat(), calibrate(whole, text_files=[text], n_threads=1).flat())

    for path in (whole, files[0]):
        convert(path, path, f)
    prompt = [int(t) for t in TOKENS]
    answers = []
    for path in (whole, files[0]):
        llama = package.Llama(path, n_ctx=512, n_batch=32, n_ubatch=32, n_threads=1, kv_evict="qfilters", kv_budget=64)
        answers.append(llama.create_completion(prompt, max_tokens=20, temperature=0)["choices"][0]["text"])
        assert llama.stats().n_evictions > 0
    assert answers[0] == answers[1]

    facts = json.loads(edgekv("inspect", files[0], "-o", "json").stdout)
    assert facts["file_bytes"] == sum(file.stat().st_size for file in files)
    assert facts["qfilters"]["n_tokens"] == f.n_tokens
    fails(f"{files[1]}: is part 2 of 4; pass the first part, tiny-00001-of-00004.gguf", "inspect", files[1])
    files[2].unlink()
    missing = f"{files[2]}: no such file; it is part 3 of 4 of tiny-00001-of-00004.gguf"
    for command, *options in (["inspect"], ["run", "-p", "x"], ["convert", "--with-qfilters"]):
        fails(missing, command, files[0], *options)
    with pytest.raises(EdgekvError, match="no such file; it is part 3"):
        package.Llama(files[0])
