"""The patched runtime against the unpatched pin, which unpatched.py builds."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekv.calibrate import default_text
from edgekv.convert import convert
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from edgekv.session import CACHE_TYPES, Session, default_threads
from edgekv.settings import EvictionSettings
from process import EDGEKV
from test_filters import random_filters
from unpatched import unpatched_library

import llama_cpp

pytestmark = pytest.mark.slow

# K, V, flash attention (a quantised V needs it)
CACHES = [("f16", "f16", False), ("f16", "f16", True), ("q8_0", "f16", False), ("q8_0", "q8_0", True)]
N_UBATCH = 512


# --- the unpatched library -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def unpatched() -> Path:
    """The folder of the unpatched libraries."""
    return unpatched_library()


def run_unpatched(library: Path, folder: Path, model: Path, steps: list[dict], *, n_ctx: int, cache) -> tuple:
    """Logits and greedy tokens of a task for stock.py."""
    type_k, type_v, flash_attn = cache
    context = dict(n_ctx=n_ctx, n_batch=1024, n_ubatch=N_UBATCH, n_threads=default_threads(),
                   n_threads_batch=default_threads(), type_k=CACHE_TYPES[type_k], type_v=CACHE_TYPES[type_v],
                   flash_attn_type=int(flash_attn))
    logits = folder / "logits.npy"
    task = folder / "task.json"
    task.write_text(json.dumps({"model": str(model), "context": context, "steps": steps, "logits": str(logits)}))
    run = subprocess.run([sys.executable, str(Path(__file__).with_name("stock.py")), str(task)], capture_output=True,
                         text=True, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(library),
                                         "PYTHONPATH": str(Path(llama_cpp.__file__).parents[1])})
    assert run.returncode == 0, run.stderr[-2000:]
    result = np.load(logits)
    logits.unlink()
    return result, json.loads(run.stdout)


def open_patched(model: Path, cache, n_ctx: int, settings=None, filters=None) -> Session:
    type_k, type_v, flash_attn = cache
    return Session(model, n_ctx=n_ctx, n_batch=1024, n_ubatch=N_UBATCH, type_k=type_k, type_v=type_v,
                   flash_attn=flash_attn, settings=settings, filters=filters)


@pytest.fixture(scope="module")
def text(smollm2) -> list[int]:
    with Session(smollm2, n_ctx=256) as session:
        tokens = session.tokenize(default_text()[:12000])
    assert len(tokens) >= 1152
    return tokens[:1152]


@pytest.fixture(scope="module")
def any_filters() -> QFilters:
    """What is kept does not matter here, only what becomes of it."""
    return QFilters(list(np.random.default_rng(0).standard_normal((30, 3, 64))), list(range(30)))


# --- off is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_off_is_off(unpatched, smollm2, text, any_filters, tmp_path, cache):
    """Bit-identical logits over a prompt of 512 tokens and 64 generated ones; also with a budget above the context."""
    want, chosen = run_unpatched(unpatched, tmp_path, smollm2, [{"decode": text[:512]}, {"greedy": 64}], n_ctx=1024,
                                 cache=cache)
    assert len(want) == 576 and np.isfinite(want).all()
    for settings in (EvictionSettings("none"), EvictionSettings("qfilters", 4096, 256, 4)):
        with open_patched(smollm2, cache, 1024, settings, any_filters) as session:
            got = [session.decode(text[:512], 0, logits="all")]
            ours = []
            for pos in range(512, 576):
                ours.append(int(got[-1][-1].argmax()))
                got.append(session.decode(ours[-1:], pos, logits="all"))
            assert session.stats().n_evictions == 0
        np.testing.assert_array_equal(np.concatenate(got).view(np.uint32), want.view(np.uint32))
        assert ours == chosen


def test_the_unpatched_runtime_loads_a_converted_file(unpatched, smollm2, text, tmp_path):
    converted = tmp_path / "with-filters.gguf"
    convert(smollm2, converted, random_filters(GGUF(smollm2)))
    steps = [{"decode": text[:64]}]
    want, got = (run_unpatched(unpatched, tmp_path, model, steps, n_ctx=256, cache=CACHES[0])[0]
                 for model in (smollm2, converted))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


# --- the same rows, by the state API and NumPy -----------------------------------------------------------------------


class State:
    """One sequence's state as llama_kv_cache::state_write lays it out (one stream, no extra cell data)."""

    def __init__(self, data: bytes, n_head_kv: int):
        self.at, self.data, self.n_head_kv = 0, data, n_head_kv
        self.magic, self.seq_id, n_stream, n_cells = self._take("IiII")
        assert n_stream == 1
        cells = [self._take("iIi") for _ in range(n_cells)]
        self.positions = [pos for pos, _, _ in cells]
        assert all((n, seq_id) == (1, self.seq_id) for _, n, seq_id in cells)
        self.transposed, self.n_layer = self._take("II")
        self.k = [self._rows(n_cells) for _ in range(self.n_layer)]
        self.v = [self._columns(n_cells) if self.transposed else self._rows(n_cells) for _ in range(self.n_layer)]
        assert self.at == len(data)

    def _take(self, form: str) -> tuple:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def _bytes(self, n: int) -> np.ndarray:
        self.at += n
        return np.frombuffer(self.data, np.uint8, n, self.at - n)

    def _rows(self, n_cells: int) -> tuple[int, np.ndarray]:
        """Type and bytes [cell, KV head, row]."""
        kind, size = self._take("iQ")
        return kind, self._bytes(n_cells * size).reshape(n_cells, self.n_head_kv, -1)

    def _columns(self, n_cells: int) -> tuple[int, np.ndarray]:
        """The same from a transposed V, stored [KV head * channel, cell]."""
        kind, item, width = self._take("iII")
        values = self._bytes(width * n_cells * item).reshape(self.n_head_kv, -1, n_cells, item)
        return kind, np.ascontiguousarray(values.transpose(2, 0, 1, 3)).reshape(n_cells, self.n_head_kv, -1)

    def compacted(self, kept: np.ndarray) -> tuple[list, list]:
        """K and V of the cells kept[layer, head], [layer][cell, head, row]."""
        return tuple([np.stack([rows[kept[il, h], h] for h in range(self.n_head_kv)], axis=1)
                      for il, (_, rows) in enumerate(layers)] for layers in (self.k, self.v))

    def with_rows(self, positions, k: list, v: list) -> bytes:
        """A state of other cells."""
        n = len(positions)
        parts = [struct.pack("<IiII", self.magic, self.seq_id, 1, n)]
        parts += [struct.pack("<iIi", pos, 1, self.seq_id) for pos in positions]
        parts.append(struct.pack("<II", self.transposed, self.n_layer))
        for (kind, _), rows in zip(self.k, k):
            parts.append(struct.pack("<iQ", kind, rows[0].size) + rows.tobytes())
        for (kind, _), rows in zip(self.v, v):
            if self.transposed:
                item = 2  # f16
                width = rows[0].size // item
                parts.append(struct.pack("<iII", kind, item, width) + rows.reshape(n, width, item).swapaxes(0, 1).tobytes())
            else:
                parts.append(struct.pack("<iQ", kind, rows[0].size) + rows.tobytes())
        return b"".join(parts)


@pytest.mark.parametrize("cache", CACHES + [("q4_0", "q4_0", True)], ids=str)
def test_rows_are_those_of_the_state_api(unpatched, smollm2, text, any_filters, tmp_path, cache):
    """Given the kept sets: K and V byte for byte, and the continuation of the compacted state bit for bit."""
    n_context, budget = 1024, 250
    run_unpatched(unpatched, tmp_path, smollm2, [{"decode": text[:n_context]}, {"save": str(tmp_path / "full")}],
                  n_ctx=1280, cache=cache)
    state = State((tmp_path / "full").read_bytes(), n_head_kv=3)
    assert state.positions == list(range(n_context)) and state.n_layer == 30
    assert state.with_rows(state.positions, *state.compacted(np.broadcast_to(np.arange(n_context), (30, 3, n_context)))
                           ) == state.data

    settings = EvictionSettings("qfilters", budget, 32, 4, "prompt")
    with open_patched(smollm2, cache, 1280, settings, any_filters) as session:
        session.decode(text[:n_context], 0)
        assert session.evict() == n_context - budget
        kept = np.array([[session.positions(il, h) for h in range(3)] for il in range(30)])
        assert len(np.unique(kept.reshape(90, -1), axis=0)) > 80  # heads differ, so a mix-up of heads would show
        k, v = state.compacted(kept)
        for il in range(30):
            for h in range(3):
                np.testing.assert_array_equal(session.rows(il, h, values=False), k[il][:, h])
                np.testing.assert_array_equal(session.rows(il, h, values=True), v[il][:, h])
        got = session.decode(text[n_context:], n_context, logits="all")

    (tmp_path / "compacted").write_bytes(state.with_rows(range(n_context - budget, n_context), k, v))
    want, _ = run_unpatched(unpatched, tmp_path, smollm2, [{"load": str(tmp_path / "compacted")},
                                                           {"decode": text[n_context:], "pos": n_context}],
                            n_ctx=512, cache=cache)
    print(f"{cache}: largest difference of a logit {np.abs(got - want).max()}")
    np.testing.assert_array_equal(got, want)


# --- another machine's server ----------------------------------------------------------------------------------------

# argv: the folder of the libraries, the port
STOCK_SERVER = """
import ctypes, pathlib, sys
folder, port = pathlib.Path(sys.argv[1]), sys.argv[2]
ggml = ctypes.CDLL(str(folder / "libggml.so"))
ggml.ggml_backend_load_all_from_path(str(folder).encode())
ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
cpu = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))
start = ctypes.CDLL(str(folder / "libggml-rpc.so")).ggml_backend_rpc_start_server
start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
start(f"127.0.0.1:{port}".encode(), None, 1, 1, cpu)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the libraries' names are Linux's")
def test_a_stock_rpc_server_is_refused_with_one_line(unpatched, smollm2):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", STOCK_SERVER, str(unpatched), str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        run = subprocess.run([*EDGEKV, "run", str(smollm2), "-p", "x", "--rpc", f"127.0.0.1:{port}"],
                             capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (1, "")
        assert re.fullmatch(rf"edgekv: error: RPC server 127\.0\.0\.1:{port}: is llama\.cpp's own \(protocol [\d.]+\).*\n", run.stderr)
        assert server.poll() is None  # and the look has not ended it
    finally:
        server.kill()
        server.wait()
