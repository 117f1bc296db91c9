import errno
import os
import struct
import subprocess
import tracemalloc

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
from test_split import split_model
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
        n = len(t.shape)
        infos += string(t.name.encode()) + struct.pack(f"<I{n}QIQ", n, *t.shape, t.type, len(blob))
        blob += data[t.offset:t.offset + t.nbytes]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(g.tensors), len(g.fields) + len(values) + 1)
    head += extra + data[g.parts[0].kv_start:g.parts[0].kv_end] + infos
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
    (old,), (new,) = g.parts, GGUF(tmp_path / "out.gguf").parts
    after = new.path.read_bytes()
    assert after[24:].startswith(before[24:old.kv_end]) and after[new.data_offset:] == before[old.data_offset:]


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


@pytest.mark.parametrize("n_parts", [1, 3])
def test_really_full_disk(model, tmp_path, n_parts):
    """On a file system of 256 KiB, which one of three parts fits; needs the right to mount."""
    model = split_model(model, tmp_path / "m.gguf", n_parts)[0]
    assert (model.stat().st_size < 256 << 10) == (n_parts == 3)
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
            convert(model, small / model.name, random_filters(GGUF(model)))
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
    refuse("hf: is a folder; pass a .gguf file", tmp_path / "hf", tmp_path / "o")
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


# --- split models ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["", "empty-first"])
def parts(request, model):
    """The files of a model in three parts, with permissions of their own."""
    files = split_model(model, model.with_name("m.gguf"), 3, request.param)
    model.unlink()
    for file, mode in zip(files, (0o640, 0o600, 0o644)):
        file.chmod(mode)
    return files


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names_in(folder, prefix):
    return [folder / f"{prefix}-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_a_split_model_stays_split(parts, tmp_path):
    f = random_filters(GGUF(parts[0]))
    before = contents(tmp_path)
    (tmp_path / "out").mkdir()
    new = names_in(tmp_path / "out", "new")
    calls = []
    convert(parts[0], new[0], f, lambda done, total: calls.append((done, total)))
    assert sorted((tmp_path / "out").iterdir()) == new and before.items() <= contents(tmp_path).items()
    np.testing.assert_array_equal(filters.read(GGUF(new[0])).flat(), f.flat())
    if GGUF(parts[0]).parts[0].tensors:
        check(parts[0], new[0], f)
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(parts, new)] == [False, True, True]
    assert [a.stat().st_mode for a in parts] == [b.stat().st_mode for b in new]
    total = sum(file.stat().st_size for file in parts)
    assert calls[-1] == (total, total) and calls == sorted(calls) and len(calls) > 3

    convert(new[0], names_in(tmp_path, "again")[0], f)
    assert [p.read_bytes() for p in names_in(tmp_path, "again")] == [p.read_bytes() for p in new]  # twice is once


def test_in_place_only_the_first_part_is_written(parts, tmp_path):
    f = random_filters(GGUF(parts[0]))
    before = [(p.stat().st_ino, p.stat().st_mtime_ns) for p in parts]
    data = [p.read_bytes() for p in parts]
    calls = []
    convert(parts[0], parts[0], f, lambda done, total: calls.append((done, total)))
    assert sorted(tmp_path.iterdir()) == parts
    assert [(p.stat().st_ino, p.stat().st_mtime_ns) == b for p, b in zip(parts, before)] == [False, True, True]
    np.testing.assert_array_equal(filters.read(GGUF(parts[0])).flat(), f.flat())
    assert calls[-1] == (sum(map(len, data)),) * 2 and calls[0][0] > len(data[1]) + len(data[2])


def test_links_to_the_later_parts_stay(parts, tmp_path):
    """So that a copy with filters need not copy what stays."""
    (tmp_path / "out").mkdir()
    new = names_in(tmp_path / "out", "new")
    new[1].symlink_to(parts[1])
    new[2].hardlink_to(parts[2])
    before = [p.read_bytes() for p in parts]
    convert(parts[0], new[0], random_filters(GGUF(parts[0])))
    assert new[1].is_symlink() and new[2].samefile(parts[2]) and [p.read_bytes() for p in parts] == before
    assert filters.read(GGUF(new[0])) is not None


def test_parts_through_links(parts, tmp_path):
    """As the cache of the Hugging Face hub keeps them: names that are links to files of other names."""
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(parts):
        path.rename(tmp_path / "blobs" / f"sha{i}")
        path.symlink_to(f"blobs/sha{i}")
    f = random_filters(GGUF(parts[0]))
    convert(parts[0], parts[0], f)
    assert all(p.is_symlink() for p in parts) and len(list((tmp_path / "blobs").iterdir())) == 3
    new = names_in(tmp_path, "new")
    convert(parts[0], new[0], f)
    assert not any(p.is_symlink() for p in new) and [p.read_bytes() for p in new] == [p.read_bytes() for p in parts]


@pytest.mark.parametrize(("name", "instead"), [
    ("out.gguf", "out-00001-of-00003.gguf"), ("out", "out-00001-of-00003.gguf"),
    ("out-00002-of-00003.gguf", "out-00001-of-00003.gguf"), ("out-00001-of-00004.gguf", "out-00001-of-00003.gguf"),
    ("m.gguf", "m-00001-of-00003.gguf"),
])
def test_the_new_name_says_the_number_of_parts(parts, tmp_path, name, instead):
    before = contents(tmp_path)
    why = f"{name}: the model has 3 parts and stays split; name the first part, {instead}$"
    with pytest.raises(EdgekvError, match=why):
        convert(parts[0], tmp_path / name, random_filters(GGUF(parts[0])))
    with pytest.raises(EdgekvError, match="is a folder; name a file"):
        convert(parts[0], tmp_path, random_filters(GGUF(parts[0])))
    assert contents(tmp_path) == before


def test_a_folder_in_the_way(parts, tmp_path):
    names_in(tmp_path, "new")[1].mkdir()
    before = contents(tmp_path)
    with pytest.raises(EdgekvError, match="new-00002-of-00003.gguf: is a folder; name a file"):
        convert(parts[0], names_in(tmp_path, "new")[0], random_filters(GGUF(parts[0])))
    assert contents(tmp_path) == before


class Interruption:
    """A function of which the call numbered ``at`` fails or is interrupted, before or after it did its work."""

    def __init__(self, function, at=-1, error=KeyboardInterrupt, after=False, each=lambda: None):
        self.function, self.at, self.error, self.after, self.each, self.n = function, at, error, after, each, 0

    def __call__(self, *args):
        hit, self.n = self.n == self.at, self.n + 1
        if not (hit and not self.after):
            self.function(*args)
        self.each()
        if hit:
            raise self.error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("older", [(), (1,), (0, 1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("name", ["replace", "fsync", "chmod"])
def test_all_new_parts_or_none(parts, tmp_path, monkeypatch, name, older):
    """Interrupts and errors before and after each call that writes: the new model is complete, or what was there is.
    At no moment do old and new parts stand together under a first one."""
    folder = tmp_path / "out"
    folder.mkdir()
    new = names_in(folder, "new")
    f = random_filters(GGUF(parts[0]))
    for i in older:
        new[i].write_bytes(b"older %d" % i)
    before = contents(folder)
    source = {p: p.read_bytes() for p in parts}
    convert(parts[0], tmp_path / "whole-00001-of-00003.gguf", f)
    after = {new[i].relative_to(folder): p.read_bytes() for i, p in enumerate(names_in(tmp_path, "whole"))}

    def consistent():
        now = {k: v for k, v in contents(folder).items() if k.name[0] != "."}
        assert new[0].relative_to(folder) not in now or now in (before, after)

    real, n, outcomes = getattr(os, name), 0, set()
    while True:
        for error in (KeyboardInterrupt, FULL):
            for late in (False, True):
                for path in folder.iterdir():
                    path.unlink()
                for path, data in before.items():
                    (folder / path).write_bytes(data)
                call = Interruption(real, n, error, late, consistent)
                monkeypatch.setattr(os, name, call)
                try:
                    convert(parts[0], new[0], f)
                except KeyboardInterrupt:
                    assert error is KeyboardInterrupt
                except EdgekvError as e:
                    assert error is FULL and "the disk is full" in str(e) and "new-0000" in str(e)
                monkeypatch.setattr(os, name, real)
                found = contents(folder)
                assert found in (before, after), (n, error, late, found.keys())
                if error is KeyboardInterrupt:
                    outcomes.add(found == after)
        if call.n <= n:
            break  # there were no so many calls
        n += 1
    assert n >= 3 and outcomes == {False, True}
    assert {p: p.read_bytes() for p in parts} == source


@pytest.mark.parametrize("prefix", ["new", "m"])
def test_interrupted_while_parts_are_written(parts, tmp_path, prefix):
    before = contents(tmp_path)
    f = random_filters(GGUF(parts[0]))
    n = 0
    while True:
        call = Interruption(lambda done, total: None, n)
        try:
            convert(parts[0], names_in(tmp_path, prefix)[0], f, call)
        except KeyboardInterrupt:
            assert contents(tmp_path) == before
            n += 1
        else:
            break
    assert n > 5 and contents(tmp_path) != before


def test_a_part_that_shrinks_meanwhile(parts, tmp_path):
    def shrink(done, total):
        os.truncate(parts[2], 1000)

    with pytest.raises(EdgekvError, match=f"{parts[2].name}: changed while it was read"):
        convert(parts[0], names_in(tmp_path, "new")[0], random_filters(GGUF(parts[0])), shrink)
    assert sorted(tmp_path.iterdir()) == parts


def large_model(path, size, n_parts):
    """A model of ``size`` bytes that are holes, an eighth of them in a tensor that fingerprints read."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(1)
    w.add_embedding_length(64)
    w.add_head_count(2)
    w.add_tensor_info("output.weight", [size // 4096, 1024], np.dtype(np.float16), size // 2)
    if n_parts == 2:
        w.tensors.append({})
    w.add_tensor_info("output_norm.weight", [size // 32], np.dtype(np.float32), size // 8)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    files = w.format_shard_names(path)
    for file in files:
        os.truncate(file, -(-file.stat().st_size // 32) * 32 + size // n_parts)
    return files[0]


@pytest.mark.parametrize("n_parts", [1, 2])
def test_memory_does_not_grow_with_the_file(tmp_path, n_parts):
    peaks = []
    for size in (64 << 20, 512 << 20):
        path = large_model(tmp_path / "large.gguf", size, n_parts)
        f = random_filters(GGUF(path))
        tracemalloc.start()
        convert(path, path.with_name(path.name.replace("large", "new")), f)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        g = GGUF(path.with_name(path.name.replace("large", "new")))
        assert g.size > size and filters.read(g) is not None
        for file in tmp_path.iterdir():
            file.unlink()
    assert peaks[1] < peaks[0] + (1 << 20) and peaks[1] < 64 << 20
