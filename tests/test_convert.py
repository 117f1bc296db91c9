import errno
import os
import struct
import subprocess

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekv import convert as convert_module
from edgekv import filters
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from test_filters import random_filters
from tinymodel import write_tiny_model


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "tiny.gguf")


def split(path):
    """(raw metadata pairs by key, raw tensor descriptions, tensor data) cut out with the gguf package's offsets."""
    data, reader = path.read_bytes(), gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    starts = [f.offset for f in fields.values()] + [reader.tensors[0].field.offset]
    last = reader.tensors[-1].field
    infos_end = last.offset + sum(int(p.nbytes) for p in last.parts)
    pairs = {k: data[a:b] for k, a, b in zip(fields, starts, starts[1:])}
    assert int(reader.fields["GGUF.kv_count"].contents()) == len(pairs)
    assert reader.data_offset % reader.alignment == 0 and not any(data[infos_end:reader.data_offset])
    return pairs, data[starts[-1]:infos_end], data[reader.data_offset:]


def check(before, after, f):
    pairs, infos, data = split(before)
    new_pairs, new_infos, new_data = split(after)
    assert (new_infos, new_data) == (infos, data)
    old = {k: v for k, v in pairs.items() if not k.startswith(filters.PREFIX)}
    kept = {k: v for k, v in new_pairs.items() if not k.startswith(filters.PREFIX)}
    assert list(kept.items()) == list(old.items())  # bytes and order
    assert list(new_pairs)[len(kept):] == [key for key, *_ in f.metadata()]
    np.testing.assert_array_equal(filters.read(GGUF(after)).flat(), f.flat())


def test_everything_else_stays(model, tmp_path):
    f = random_filters(GGUF(model))
    calls = []
    convert(model, tmp_path / "out.gguf", f, lambda done, total: calls.append((done, total)))
    check(model, tmp_path / "out.gguf", f)
    assert calls[-1] == (model.stat().st_size,) * 2 and calls == sorted(calls)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "tiny.gguf"]
    assert (tmp_path / "out.gguf").stat().st_mode == model.stat().st_mode


def exotic_model(path, values, alignment):
    """A loadable header with every kind of metadata, also kinds that gguf's writer would change, in raw bytes."""
    def string(data):
        return struct.pack("<Q", len(data)) + data

    tiny = write_tiny_model(path, n_layer=1, n_embd=8, n_head=2, n_head_kv=1, head_size=8, n_ff=8, n_vocab=8,
                            tokenizer="none")
    g, data = GGUF(tiny), tiny.read_bytes()
    extra = b"".join(string(b"x.%d" % i) + value for i, value in enumerate(values))
    extra += string(b"general.alignment") + struct.pack("<II", 4, alignment)
    infos = b""
    blob = b""
    for t in g.tensors.values():
        blob += bytes(-len(blob) % alignment)
        infos += string(t.name.encode()) + struct.pack(f"<I{len(t.shape)}QIQ", len(t.shape), *t.shape, t.type, len(blob))
        blob += data[t.offset:t.offset + t.nbytes]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(g.tensors), len(g.fields) + len(values) + 1)
    head += extra + data[g.kv_start:g.kv_end] + infos
    path.write_bytes(head + bytes(-len(head) % alignment) + blob)


SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@st.composite
def raw_values(draw):
    """The bytes of a random metadata value, type first."""
    def raw(code):
        return draw(st.binary(min_size=struct.calcsize("<" + code), max_size=struct.calcsize("<" + code)))

    kind = draw(st.sampled_from(["scalar", "string", "array", "strings"]))
    text = st.binary(max_size=20)  # any bytes: strings need not be UTF-8
    vtype = draw(st.sampled_from(list(SCALAR)))
    if kind == "scalar":
        return struct.pack("<I", vtype) + raw(SCALAR[vtype])
    if kind == "string":
        data = draw(text)
        return struct.pack("<IQ", 8, len(data)) + data
    n = draw(st.integers(0, 5))
    if kind == "array":
        return struct.pack("<IIQ", 9, vtype, n) + b"".join(raw(SCALAR[vtype]) for _ in range(n))
    return struct.pack("<IIQ", 9, 8, n) + b"".join(struct.pack("<Q", len(d)) + d for d in draw(
        st.lists(text, min_size=n, max_size=n)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(raw_values(), max_size=6), alignment=st.sampled_from([8, 32, 64, 4096]),
       seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_any_metadata_stays_and_converting_again_replaces(tmp_path, values, alignment, seeds):
    src, one, two, three = (tmp_path / f"{i}.gguf" for i in range(4))
    exotic_model(src, values, alignment)
    first, second = (random_filters(GGUF(src), seed, n_tokens=seed) for seed in seeds)
    convert(src, one, first)
    check(src, one, first)
    convert(one, two, second)
    check(src, two, second)
    convert(two, three, second)
    assert three.read_bytes() == two.read_bytes()  # twice is once
    convert(src, two, second)
    assert three.read_bytes() == two.read_bytes()  # and the way there leaves no trace
    assert filters.model_fingerprint(GGUF(two)) == first.model_sha256


def test_nested_arrays_stay(tmp_path):
    inner = struct.pack("<IQ2H", 2, 2, 7, 8)
    exotic_model(tmp_path / "m.gguf", [struct.pack("<IIQ", 9, 9, 2) + inner * 2], 32)
    before = (tmp_path / "m.gguf").read_bytes()
    g = GGUF(tmp_path / "m.gguf")
    assert [a.tolist() for a in g.get("x.0")] == [[7, 8], [7, 8]]
    convert(g.path, tmp_path / "out.gguf", random_filters(g))
    out = GGUF(tmp_path / "out.gguf")
    after = out.path.read_bytes()
    assert after[24:].startswith(before[24:g.kv_end]) and after[out.data_offset:] == before[g.data_offset:]


def test_in_place_and_through_a_link(model, tmp_path):
    original = model.read_bytes()
    (tmp_path / "before.gguf").write_bytes(original)
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    f = random_filters(GGUF(model))
    convert(link, link, f)
    assert link.is_symlink()
    check(tmp_path / "before.gguf", model, f)


def test_interrupted(model, tmp_path):
    before = model.read_bytes()
    f = random_filters(GGUF(model))
    for dst in (tmp_path / "out.gguf", model):
        for when in (0, 1, 5):
            def interrupt(done, total, calls=[]):
                calls.append(done)
                if len(calls) > when:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                convert(model, dst, f, interrupt)
            assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"] and model.read_bytes() == before


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_disk_full(model, tmp_path, monkeypatch, at):
    f = random_filters(GGUF(model))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "write":
        real = convert_module._pieces

        def pieces(src, filters_):
            yield from list(real(src, filters_))[:4]
            full()

        monkeypatch.setattr(convert_module, "_pieces", pieces)
    else:
        monkeypatch.setattr(os, at, full)
    with pytest.raises(EdgekvError, match="out.gguf: the disk is full; free some space") as e:
        convert(model, tmp_path / "out.gguf", f)
    assert "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


def test_really_full_disk(model, tmp_path):
    """On a file system of 256 KiB; needs the right to mount."""
    small = tmp_path / "small"
    small.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(EdgekvError, match="the disk is full"):
            convert(model, small / "out.gguf", random_filters(GGUF(model)))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_refused(model, tmp_path):
    f = random_filters(GGUF(model))

    def refuse(why, src, dst, f=f):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(EdgekvError, match=why) as e:
            convert(src, dst, f)
        assert "\n" not in str(e.value)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "hf").mkdir()
    refuse("hf: converting Hugging Face folders comes with a later version; pass a .gguf", tmp_path / "hf", tmp_path / "o")
    refuse("nope.gguf: no such file", tmp_path / "nope.gguf", tmp_path / "o.gguf")
    refuse("cannot be written: No such file", model, tmp_path / "no" / "o.gguf")
    refuse("hf: is a folder", model, tmp_path / "hf")
    other = GGUF(write_tiny_model(tmp_path / "other.gguf", seed=1))
    refuse("were made for another model", model, tmp_path / "o.gguf", random_filters(other))
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-4000])
    refuse("cut.gguf: truncated GGUF file", tmp_path / "cut.gguf", tmp_path / "o.gguf")


def test_source_that_shrinks_meanwhile(model, tmp_path, monkeypatch):
    f = random_filters(GGUF(model))

    def shrink(done, total):
        os.truncate(model, 1000)

    with pytest.raises(EdgekvError, match="tiny.gguf: changed while it was read"):
        convert(model, tmp_path / "out.gguf", f, shrink)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]
