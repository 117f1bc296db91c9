"""What reads foreign bytes in Python, one target each, for tools/fuzz (coverage-guided, by atheris) and for
tests/test_fuzz.py (a short run with mutations of its own). ``targets.py FOLDER`` writes what the native ones begin
with.

A target is called with bytes. It returns, or raises what is a finding: anything but an EdgekvError of one line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgekv.errors import EdgekvError

Target = Callable[[bytes], None]

MODEL = dict(n_layer=1, n_embd=8, n_head=2, n_head_kv=1, head_size=8, n_ff=8, n_vocab=8, tokenizer="none")


@contextmanager
def refusals(quoted: bool = False) -> Iterator[None]:
    """Lets an EdgekvError of one line pass. ``quoted``: of the user's own flags, which it gives back as they are."""
    try:
        yield
    except EdgekvError as error:
        text = "" if quoted else str(error)
        assert "\n" not in text and "\r" not in text and "\0" not in text, f"not one line: {text!r}"
        assert len(text) < 2000, f"a message of {len(text)} characters"


def tiny_model(folder: Path) -> Path:
    """A converted model of 10 KiB."""
    from edgekv.convert import convert
    from edgekv.gguf_file import GGUF
    from test_filters import random_filters
    from tinymodel import write_tiny_model

    path = write_tiny_model(folder / "seed.gguf", **MODEL)
    convert(path, path, random_filters(GGUF(path)))
    return path


# --- GGUF ------------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> None:
    """All that this package reads of a model's file."""
    from edgekv import filters
    from edgekv.convert import encode_kv
    from edgekv.gguf_file import GGUF

    with refusals():
        gguf = GGUF(path)
        for part in gguf.parts:
            for key in part.fields:
                part.get(key)
        for fact in ("name", "architecture", "n_layer", "embedding_length", "context_length", "head_count",
                     "head_count_kv", "key_length", "value_length", "attention_layers"):
            with refusals():
                getattr(gguf, fact)
        with refusals():
            gguf.kv_bytes_per_token((1, 2), (32, 18))
        with refusals():
            filters.model_fingerprint(gguf)
        found = filters.read(gguf)
        if found is not None:
            found.validate(gguf)
            for item in found.metadata():  # what is valid can be written again
                encode_kv(*item)


def gguf(folder: Path) -> tuple[Target, list[bytes]]:
    """Headers of GGUF files, and the filters in them."""
    from edgekv.convert import encode_kv, save_filters
    from edgekv.gguf_file import ARRAY, GGUF, F32, STRING, U8
    from test_filters import random_filters

    model = tiny_model(folder)
    save_filters(folder / "filters.gguf", GGUF(model), random_filters(GGUF(model)))
    pairs = [("a", ARRAY, STRING, ["x", ""]), ("b", ARRAY, F32, [1.0, 2.0]), ("c", U8, None, 7)]
    nested = b"\1\0\0\0\0\0\0\0d" + struct.pack("<IIQ", ARRAY, ARRAY, 1) + struct.pack("<IQH", U8, 2, 0x0101)
    small = b"GGUF" + struct.pack("<IQQ", 3, 0, 4) + b"".join(encode_kv(*pair) for pair in pairs) + nested
    path = folder / "input.gguf"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_model(path)

    return run, [model.read_bytes(), (folder / "filters.gguf").read_bytes(), small]


def split(folder: Path) -> tuple[Target, list[bytes]]:
    """Models in three files. An input is the three, each behind its length (u32)."""
    from test_split import split_model

    files = split_model(tiny_model(folder), folder / "seed.gguf")
    assert len(files) == 3
    seed = b"".join(struct.pack("<I", file.stat().st_size) + file.read_bytes() for file in files)

    def run(data: bytes) -> None:
        at = 0
        for file in files:
            n = int.from_bytes(data[at:at + 4], "little")
            file.write_bytes(data[at + 4:at + 4 + n])
            at += 4 + n
        read_model(files[0])

    return run, [seed]


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def published(folder: Path) -> tuple[Target, list[bytes]]:
    """Published filters in a safetensors file."""
    from edgekv import published as module
    from edgekv.convert import encode_kv
    from edgekv.gguf_file import GGUF
    from test_filters import random_filters

    model = GGUF(tiny_model(folder))
    shape = (1, 1, 8)
    module._shape = lambda gguf: (shape, [0])  # it asks llama.cpp, once per input
    path = folder / "input.safetensors"
    module.save(folder / "seed.safetensors", random_filters(model), model)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with refusals():
            for item in module.load(path, model).metadata():
                encode_kv(*item)

    plain = json.dumps({"q_filters": {"dtype": "F16", "shape": shape, "data_offsets": [0, 16]}}).encode()
    return run, [(folder / "seed.safetensors").read_bytes(), safetensors(plain, np.ones(8, "<f2").tobytes())]


def session(folder: Path) -> tuple[Target, list[bytes]]:
    """Session files as `/load` reads them. An input is a byte and the rest. The rest is a file if the byte is even, and
    if it is odd one whose checksum is made right first, as whoever forges a file would. With 2 in the byte the rest is the
    types of tokens and state, their number, and the messages, in a file that is whole otherwise."""
    from edgekv.session_file import SavedSession

    path = folder / "input.session"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a ü"}]
    SavedSession(np.arange(5, dtype=np.int32), np.arange(32).astype(np.uint8), messages, "0" * 64).write(path)
    seed = path.read_bytes()

    def run(data: bytes) -> None:
        kind = data[0] if data else 0
        path.write_bytes(made(data[1:]) if kind & 2 else forged(data[1:]) if kind & 1 else data[1:])
        with refusals():
            saved = SavedSession.read(path)
            # what a conversation goes on with
            assert saved.tokens.dtype == np.int32 and saved.tokens.ndim == 1 and (saved.tokens >= 0).all()
            assert saved.state.dtype == np.uint8 and saved.state.ndim == 1
            assert all(m["role"] + m["content"] + "" is not None for m in saved.messages), saved.messages
            json.dumps(saved.messages, ensure_ascii=False).encode()
            saved.write(path)

    def forged(data: bytes) -> bytes:
        try:
            n = struct.unpack_from("<Q", data)[0]
            header = json.loads(data[8:8 + n])
            meta, body = header["__metadata__"], data[8 + n:]
            parts = [body[slice(*header[name]["data_offsets"])] for name in ("tokens", "state")]
            if header["tokens"]["dtype"] != "I32":
                parts[0] = _as_int32(parts[0], header["tokens"]["dtype"])
            found = SavedSession(np.frombuffer(parts[0], "<i4"), np.frombuffer(parts[1], np.uint8), [],
                                 meta["model_sha256"])
            meta["sha256"] = found._digest(meta["messages"])
            return safetensors(json.dumps(header).encode(), body)
        except Exception:  # what is no such file stays as it is
            return data

    types = [("I32", 4), ("U8", 1), ("F32", 4), ("F64", 8), ("I64", 8), ("I8", 1), ("BOOL", 1), ("U32", 4), ("BF16", 2),
             ("F8_E4M3", 1)]

    def made(data: bytes) -> bytes:
        numbers = (*data[:3], 0, 0, 0)
        (tokens, a), (state, b), n = types[numbers[0] % len(types)], types[numbers[1] % len(types)], numbers[2] % 8
        header = {"tokens": {"dtype": tokens, "shape": [n], "data_offsets": [0, n * a]},
                  "state": {"dtype": state, "shape": [n], "data_offsets": [n * a, n * a + n * b]},
                  "__metadata__": {"format": "edgekv session", "version": "1", "model_sha256": "0" * 64,
                                   "messages": data[3:].decode("utf-8", "replace")}}
        return forged(safetensors(json.dumps(header).encode(), bytes(range(n * (a + b)))))

    def _as_int32(raw: bytes, dtype: str) -> bytes:
        kind = {"F": "f", "I": "i", "U": "u"}[dtype[0]]
        return np.frombuffer(raw, f"<{kind}{int(dtype[1:]) // 8}").astype("<i4").tobytes()

    seeds = [b"\0" + seed, b"\1" + seed]
    for old, new in [(b'"I32"', b'"F32"'), (b'"I32"', b'"U32"'), (b"[5]", b"[5,1]"), (b"[32]", b"[4,8]"),
                     (b'"U8"', b'"I8"')]:
        # a header's bytes change: keep it as long as it says
        header = seed[8:8 + struct.unpack_from("<Q", seed)[0]].rstrip().replace(old, new)
        seeds.append(b"\1" + safetensors(header, seed[8 + struct.unpack_from("<Q", seed)[0]:]))
    for text in ("5", "[5]", "{}", '[{"role": "user"}]', '[{"role": 1, "content": 2}]', "[" * 5000, '["\\ud800"]',
                 '[{"role": "user", "content": "\\ud800"}]', "9" * 5000):
        header = json.loads(seed[8:8 + struct.unpack_from("<Q", seed)[0]])
        header["__metadata__"]["messages"] = text
        seeds.append(b"\1" + safetensors(json.dumps(header).encode(), seed[8 + struct.unpack_from("<Q", seed)[0]:]))
        seeds.append(b"\2\0\1\5" + text.encode())
    return run, [*seeds, b"\2\0\1\5" + json.dumps(messages).encode()]


# --- text ------------------------------------------------------------------------------------------------------------


def journal(folder: Path) -> tuple[Target, list[bytes]]:
    """Logs of evaluations."""
    from edgekv.eval.journal import Journal

    header = {"edgekv_eval": 1, "kind": "niah", "config": {"depth": [0, 1], "name": "x"}, "cases": {},
              "model": {"file": "m", "sha256": "0" * 64}, "versions": {"edgekv": "0", "llama_cpp_python": "0"},
              "machine": {"name": "m", "cpu_variant": "zen4"}, "started": "now"}
    path = folder / "input.jsonl"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with refusals():
            with Journal.open(path, header) as found:
                done = dict(found.done)
                if "new case" not in done:
                    found.add("new case", {"value": 1.0})
                    done = dict(found.done)
            with Journal.open(path, header) as again:  # no refusal now
                assert json.dumps(again.done) == json.dumps(done), "other cases when it is opened again"

    line = json.dumps(header).encode()
    deep = b'"config": {"depth": ' + b"[" * 900 + b"]" * 900
    return run, [line + b'\n{"key": "a", "value": 1}\n{"key": "b", "value": [1, null]}\n', line + b"\n{", line[:40],
                 line.replace(b'"config": {"depth": [0, 1]', deep) + b"\n",
                 line + b'\n{"key": "a", "value": ' + b"[" * 900 + b"]" * 900 + b"}\n"]


def budget(folder: Path) -> tuple[Target, list[bytes]]:
    """The values of flags. An input is text, a value per line."""
    from edgekv.settings import EvictionSettings, SelectionSettings

    def run(data: bytes) -> None:
        lines = data.decode("utf-8", "surrogateescape").split("\n") + [""] * 3
        for n_ctx in (1, 8192, 2**31 - 1):
            with refusals(quoted=True):
                found = EvictionSettings.resolve("knorm", lines[0], n_ctx=n_ctx, bytes_per_token=23040)
                assert 1 <= found.budget < 2**31 and 0 <= found.keep + found.window <= found.budget
        with refusals(quoted=True):
            chosen = SelectionSettings.resolve("quest", lines[1])
            assert chosen.budget == 0 or 32 <= chosen.budget < 2**31
        with refusals(quoted=True):
            EvictionSettings.resolve(lines[2], "x8", n_ctx=8192)

    return run, [b"2048\nauto\nknorm", b"x8\n1024\nqfilters", b"1.5GiB\n64\nnone", b"0.5mb\n\n",
                 "x١٢\n².5kib\n".encode()]


TARGETS = {"gguf": gguf, "split": split, "published": published, "session": session, "journal": journal,
           "budget": budget}


# --- without atheris -------------------------------------------------------------------------------------------------


NUMBERS = [0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 24, 32, 64, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 20,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 61), (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
WORDS = [b"\n", b"\0", b"\xff", b"\xc3(", b"[[", b"{}", b"null", b"true", b'""', b"\\ud800", b"1e999", b"-1", b"NaN",
         b"edgekv.qfilters.", b"general.alignment", b"split.count", b"F64", b"BF16", b"BOOL", b"__metadata__", b"\n{"]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed with one to five changes, more often in its first kilobyte; the same ``rng`` gives the same."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(min(len(data), 1024 if rng.random() < 0.7 else len(data)) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind in (2, 3):
            size = rng.choice((1, 2, 4, 8))
            data[at:at + size] = (rng.choice(NUMBERS) % 2**(8 * size)).to_bytes(size, "little")
        elif kind == 4:
            del data[at:at + rng.choice((1, 2, 4, 8, 64, len(data)))]
        elif kind == 5:
            word = rng.choice(WORDS)
            data[at:at + (len(word) if rng.random() < 0.5 else 0)] = word
        elif kind == 6:
            piece = data[at:at + rng.choice((1, 4, 8, 16, 64, 256))]
            to = rng.randrange(len(data) + 1)
            data[to:to] = piece
        else:
            other = rng.choice(seeds)
            cut = rng.randrange(len(other) + 1)
            data[at:at + 64] = other[cut:cut + 64]
    return bytes(data)


def work_folder(name: str) -> Path:
    """An empty folder, in memory where there is such a thing: an input is a file."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"edgekv-fuzz-{name}-", dir=base))


def write_seeds(folder: Path) -> None:
    """What the native targets begin with: ``models`` and seeds of ``filters`` and ``params``."""
    from tinymodel import write_tiny_model

    for name in ("models", "filters", "params"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for arch in ("llama", "gemma3", "lfm2"):
        write_tiny_model(folder / "models" / f"{arch}.gguf", arch=arch, n_swa=8, n_ctx=256,
                         **{**MODEL, "n_layer": 2, "n_embd": 16, "n_ff": 16})
    work = work_folder("seeds")
    try:
        parts = split(work)[1][0]
        first = parts[4:4 + struct.unpack_from("<I", parts)[0]]
        for i, seed in enumerate([*gguf(work)[1], first]):
            (folder / "filters" / f"seed-{i}").write_bytes(seed)
    finally:
        shutil.rmtree(work)
    flags = ["knorm\n2048\n256\nquest\nauto\n16\n2\n4\n8192\n1\n", "streaming\n1.5GiB\n\nnone\n\n\n\n0\n0\n3\n",
             "keydiff\nx8\n10\nquest\n64\n8\n0\n-1\n4096\n2\n"]
    for i, text in enumerate(flags):
        (folder / "params" / f"seed-{i}").write_text(text)


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
