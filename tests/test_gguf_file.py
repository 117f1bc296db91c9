import os
import re
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekv import gguf_file
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from tinymodel import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", n_head=6, n_head_kv=3, head_size=16)


def test_agrees_with_the_gguf_package(model):
    ours, theirs = GGUF(model), gguf.GGUFReader(model)
    (part,) = ours.parts
    assert part.data_offset == theirs.data_offset and ours.size == model.stat().st_size
    keys = [k for k in theirs.fields if not k.startswith("GGUF.")]
    assert list(ours.fields) == keys
    for key in keys:
        value = ours.get(key)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        assert value == theirs.fields[key].contents(), key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for t in theirs.tensors:
        o = ours.tensors[t.name]
        assert (o.type_name, list(o.shape), o.path, o.offset, o.nbytes) == (
            t.tensor_type.name, t.shape.tolist(), model, t.data_offset, t.n_bytes)
    np.testing.assert_array_equal(ours.tensor_data("output_norm.weight"), theirs.tensors[1].data)


@pytest.mark.parametrize("fields, is_one", [
    ({"general.architecture": "clip"}, True), ({"general.architecture": "llama", "general.type": "mmproj"}, True),
    ({"general.architecture": "llama", "general.type": "model"}, False), ({"general.architecture": "clips"}, False),
    ({}, False), ({"general.architecture": 7}, False), ({"general.architecture": [1, 2], "general.type": ["mmproj"]}, False),
])
def test_projectors(tmp_path, fields, is_one):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "x")
    w.kv_data[0].clear()
    for key, value in fields.items():
        add = {str: w.add_string, int: w.add_uint32, list: w.add_array}[type(value)]
        add(key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    assert gguf_file.Part(tmp_path / "m.gguf").is_projector == is_one
    if is_one:
        with pytest.raises(EdgekvError, match=r"m\.gguf: is the projector of a multimodal model \(mmproj\), not a "):
            GGUF(tmp_path / "m.gguf")
    else:
        GGUF(tmp_path / "m.gguf")


def test_model_facts(model):
    g = GGUF(model)
    assert (g.architecture, g.n_layer, g.head_count, g.head_count_kv) == ("llama", 2, [6, 6], [3, 3])
    assert (g.key_length, g.value_length, g.context_length, g.name) == (16, 16, 4096, "tiny")
    assert g.attention_layers == [0, 1]
    assert g.kv_bytes_per_token((1, 2), (1, 2)) == 2 * 3 * (16 + 16) * 2
    assert g.kv_bytes_per_token((32, 18), (32, 18)) is None  # rows of 48 channels


def test_every_tensor_type_of_the_gguf_package_has_its_size():
    for ttype, (block, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if ttype.name == "Q8_1":
            continue  # never stored; releases of the package disagree about it (36 or 40 bytes; ggml: 36)
        assert gguf_file.TENSOR_TYPES[int(ttype)] == (ttype.name, block, nbytes)


def test_per_layer_heads_and_default_head_size(tmp_path):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "lfm2")
    w.add_block_count(3)
    w.add_embedding_length(96)
    w.add_head_count(6)
    w.add_head_count_kv([2, 0, 3])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    g = GGUF(tmp_path / "m.gguf")
    assert (g.head_count, g.head_count_kv, g.key_length, g.attention_layers) == ([6] * 3, [2, 0, 3], 16, [0, 2])


@pytest.mark.parametrize("key, value", [("block_count", 0), ("block_count", 2**32 - 1), ("block_count", "two"),
                                        ("head_count_kv", [1, 2, 3]), ("head_count_kv", [1.5, 2.5]), ("head_count_kv", [-1, 1])])
def test_facts_that_make_no_sense(tmp_path, key, value):
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    full = {"block_count": 2, "head_count_kv": [1, 1], key: value}
    for k, v in full.items():
        k = "llama." + ("attention." if "head" in k else "") + k
        if isinstance(v, str):
            w.add_string(k, v)
        elif isinstance(v, list):
            w.add_array(k, v)
        else:
            w.add_uint32(k, v)
    w.add_head_count(4)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    with pytest.raises(EdgekvError, match=r"m\.gguf: damaged"):
        GGUF(tmp_path / "m.gguf").head_count_kv


# --- split models; test_split.py reads whole ones --------------------------------------------------------------------

SPLIT_TYPES = {"split.no": gguf.GGUFValueType.UINT16, "split.count": gguf.GGUFValueType.UINT16,
               "split.tensors.count": gguf.GGUFValueType.INT32}


def write_part(path, tensors, number, count=3, total=3, **other_types):
    """A part with small tensors; the keys that are None are left out."""
    w = gguf.GGUFWriter(path, "llama")
    for (key, vtype), value in zip(SPLIT_TYPES.items(), (number and number - 1, count, total)):
        if value is not None:
            w.add_key_value(key, value, other_types.get(key.replace(".", "_"), vtype))
    for name in tensors:
        w.add_tensor(name, np.ones(4, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture
def parts(tmp_path):
    """The files of a model in three parts."""
    files = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, file in enumerate(files, 1):
        write_part(file, [f"t{i}"], i)
    assert list(GGUF(files[0]).tensors) == ["t1", "t2", "t3"]
    return files


def refused(path, why, named=None):
    with pytest.raises(EdgekvError) as e:
        GGUF(path)
    assert str(e.value).startswith(f"{named or path}: ") and "\n" not in str(e.value)
    assert re.search(why, str(e.value)), str(e.value)


@pytest.mark.parametrize("number", [2, 3])
def test_a_later_part(parts, number):
    refused(parts[number - 1], f"is part {number} of 3; pass the first part, m-00001-of-00003.gguf$")


@pytest.mark.parametrize("number", [2, 3])
def test_a_missing_part(parts, number):
    parts[number - 1].unlink()
    refused(parts[0], f"no such file; it is part {number} of 3 of m-00001-of-00003.gguf: fetch it", parts[number - 1])
    parts[number - 1].mkdir()
    refused(parts[0], "is a folder", parts[number - 1])


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00004.gguf", "m-00002-of-00003.gguf", "m-00001-of-00003.GGUF",
                                  "m-1-of-3.gguf", "-00001-of-00003.gguf"])
def test_a_renamed_first_part(parts, name):
    path = parts[0].rename(parts[0].with_name(name))
    refused(path, "is part 1 of 3, but its name does not end in -00001-of-00003.gguf, so the others cannot be found")


def test_a_later_part_under_the_first_name(parts):
    parts[1].replace(parts[0])
    refused(parts[0], "is part 2 of 3, but its name does not end in -00002-of-00003.gguf, so the others")


@pytest.mark.parametrize("change", [dict(number=3), dict(number=1), dict(number=None), dict(count=4), dict(count=None),
                                    dict(count=0), dict(total=4), dict(total=None)])
def test_a_part_of_another_model(parts, change):
    write_part(parts[1], ["t2"], **{"number": 2, **change})
    refused(parts[0], "is not part 2 of 3 of m-00001-of-00003.gguf: .* fetch the parts again", parts[1])


def test_tensors_that_two_parts_have_or_none(parts):
    write_part(parts[2], ["t1"], 3)
    refused(parts[0], "is not part 3 of 3 .* has the tensor 't1' too", parts[2])
    for tensors, n in (([], 2), (["t3", "t4"], 4)):
        write_part(parts[2], tensors, 3)
        refused(parts[0], f"its 3 parts have {n} tensors, but split.tensors.count says 3; fetch the parts again")


@pytest.mark.parametrize("change", [dict(number=None), dict(number=4), dict(total=None)])
def test_first_parts_that_make_no_sense(parts, change):
    write_part(parts[0], ["t1"], **{"number": 1, **change})
    refused(parts[0], "damaged GGUF file: one of 3 parts, but which one")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("key", list(SPLIT_TYPES))
def test_split_keys_of_other_types(parts, number, key):
    """llama.cpp takes no others either."""
    write_part(parts[number - 1], [f"t{number}"], number, **{key.replace(".", "_"): gguf.GGUFValueType.UINT32})
    refused(parts[0], f"damaged GGUF file: {key} has the wrong type", parts[number - 1])


def test_joined_models_and_single_parts_are_whole(tmp_path):
    for count in (0, 1):
        write_part(tmp_path / "m.gguf", ["t1"], 1, count, 1)  # llama-gguf-split --merge leaves a count of 0
        assert len(GGUF(tmp_path / "m.gguf").parts) == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damaged_parts(parts, number):
    path = parts[number - 1]
    data = path.read_bytes()
    for n in (0, 10, 30, 100, len(data) - 32):
        path.write_bytes(data[:n])
        refused(parts[0], "truncated GGUF file|not a GGUF file", path)
    path.write_bytes(b"PK" + data[2:])
    refused(parts[0], "not a GGUF file", path)
    path.write_bytes(data)
    g = GGUF(parts[0])
    path.write_bytes(data[:-20])
    with pytest.raises(EdgekvError, match=f"{path.name}: changed while it was read"):
        g.tensor_data(f"t{number}")
    path.unlink()
    with pytest.raises(EdgekvError, match=f"{path.name}: cannot be read"):
        g.tensor_data(f"t{number}")


# --- foreign bytes ---------------------------------------------------------------------------------------------------

def header(n_tensors=0, n_kv=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv)


def string(data):
    return struct.pack("<Q", len(data)) + data


HUGE = 2**64 - 1


@pytest.mark.parametrize("data, why", [
    (b"", "not a GGUF"),
    (b"GGUF", "truncated"),
    (b"PK\3\4" + bytes(100), "not a GGUF"),
    (header(version=1), "version 1"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (header(n_kv=HUGE), "truncated"),
    (header(n_tensors=HUGE), "truncated"),
    (header(n_kv=1) + struct.pack("<Q", HUGE), "truncated"),
    (header(n_kv=1) + string(b"k") + struct.pack("<IQ", 8, HUGE), "truncated"),
    (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 6, HUGE), "truncated"),
    (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 8, HUGE), "truncated"),
    (header(n_kv=1) + string(b"k") + struct.pack("<IIQ", 9, 9, HUGE), "truncated"),
    (header(n_kv=1) + string(b"k") + struct.pack("<I", 13), "unknown metadata type 13"),
    (header(n_kv=1) + string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, "unsupported"),
    (header(n_kv=2) + (string(b"k") + struct.pack("<IB", 0, 1)) * 2, "twice"),
    (header(n_kv=1) + string(b"general.alignment") + struct.pack("<II", 4, 0), "alignment"),
    (header(n_kv=1) + string(b"general.alignment") + struct.pack("<II", 4, 24), "alignment"),
    (header(n_kv=1) + string(b"general.alignment") + struct.pack("<IQ", 10, 32), "alignment"),
    (header(n_tensors=1) + string(b"t") + struct.pack("<I", 5), "dimensions"),
    (header(n_tensors=1) + string(b"t") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0), "truncated"),
    (header(n_tensors=1) + string(b"t") + struct.pack("<IQIQ", 1, 4, 0, HUGE - 31), "truncated"),
    (header(n_tensors=1) + string(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(99), "no sense"),
    (header(n_tensors=1) + string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1) + bytes(99), "no sense"),
])
def test_foreign_bytes(tmp_path, data, why):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(data)
    with pytest.raises(EdgekvError, match=f"foreign.gguf: .*{why}") as e:
        GGUF(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [b"a\nb", b"\x1b[31m", b"x" * 100_000, b"\xff\0", "\u2028".encode()])
def test_messages_are_one_short_line_whatever_a_file_calls_things(tmp_path, name):
    path = tmp_path / "foreign.gguf"
    for data in (header(n_kv=1) + string(b"general.architecture") + struct.pack("<I", 8) + string(name),
                 header(n_tensors=1) + string(name) + struct.pack("<I", 5)):
        path.write_bytes(data)
        with pytest.raises(EdgekvError) as e:
            GGUF(path).n_layer
        text = str(e.value)
        assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < len(str(path)) + 400, text


def test_unknown_tensor_types_must_begin_inside(tmp_path):
    path = tmp_path / "m.gguf"
    info = string(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0)
    path.write_bytes((header(n_tensors=1) + info).ljust(96, b"\0"))
    assert GGUF(path).tensors["t"].type_name == "type 999"


def test_paths(tmp_path):
    with pytest.raises(EdgekvError, match="no such file"):
        GGUF(tmp_path / "nothing.gguf")
    with pytest.raises(EdgekvError, match="is a folder"):
        GGUF(tmp_path)


def read_everything(path):
    """Either an EdgekvError or values; any other exception is a bug."""
    try:
        g = GGUF(path)
        for key in g.fields:
            g.get(key)
        for part in g.parts:
            for key in part.fields:
                part.get(key)
        for fact in ("architecture", "name", "n_layer", "head_count_kv", "key_length", "context_length"):
            getattr(g, fact)
        from edgekv import filters
        filters.model_fingerprint(g)
        if (f := filters.read(g)) is not None:
            f.validate(g)
        return True
    except EdgekvError as e:
        assert "\n" not in str(e)
        return False


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A converted model of some 10 KiB, for tests that damage it."""
    from edgekv.convert import convert
    from test_filters import random_filters

    folder = tmp_path_factory.mktemp("small")
    path = write_tiny_model(folder / "m.gguf", n_layer=1, n_embd=8, n_head=2, n_head_kv=1, head_size=8, n_ff=8,
                            n_vocab=8, tokenizer="none")
    convert(path, path, random_filters(GGUF(path)))
    return path.read_bytes(), folder / "damaged.gguf"


def test_truncation_at_any_byte(small):
    data, path = small
    path.write_bytes(data)
    (g,) = GGUF(path).parts
    assert read_everything(path)
    needed = max(t.offset + t.nbytes for t in g.tensors.values())  # padding may follow
    # downwards, so that the file is cut and not written again
    for n in sorted({*range(g.infos_end + 40), *range(0, needed, 97), needed - 1}, reverse=True):
        os.truncate(path, n)
        assert not read_everything(path), n


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_never_raise_anything_else(small, data):
    whole, path = small
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 2000))
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    read_everything(path)


@pytest.fixture(scope="module")
def small_parts(tmp_path_factory):
    """The same in three parts: their files, and what is in them."""
    from test_split import split_model

    folder = tmp_path_factory.mktemp("parts")
    path = write_tiny_model(folder / "m.gguf", n_layer=1, n_embd=8, n_head=2, n_head_kv=1, head_size=8, n_ff=8,
                            n_vocab=8, tokenizer="none")
    files = split_model(path, path)
    return files, [file.read_bytes() for file in files]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_and_cuts_in_parts_never_raise_anything_else(small_parts, data):
    files, whole = small_parts
    damaged = [bytearray(content) for content in whole]
    for _ in range(data.draw(st.integers(0, 4))):
        part = damaged[data.draw(st.integers(0, 2))]
        part[data.draw(st.integers(0, len(part) - 1) | st.integers(0, 300))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2))
    del damaged[cut][data.draw(st.just(len(whole[cut])) | st.integers(0, len(whole[cut]))):]
    for file, content in zip(files, damaged):
        file.write_bytes(content)
    read = read_everything(files[0])
    assert read or damaged != whole
