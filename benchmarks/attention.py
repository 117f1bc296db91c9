"""Attention of one decode step: selected pages against all cells, and against stock's flash and plain attention.

    python benchmarks/attention.py [-o json] [--cells 4096,...] [--budgets 512,...] [--device CUDA0]

Needs the package `gguf` (`pip install '.[test]'`) and about 5 GiB (a GPU: as much of its own). For a head layout of 32
query and 8 KV heads of 128, f16, page size 16. A graph has several layers, each with K and V of its own, so that
nothing is read from a cache that the layer before has filled; the graphs take turns, and every time is a median. On the
CPU all lie in huge pages of the system where it has them, as selection asks for.

All tensors lie in the memory of --device, one of ggml's (a wrong name lists them), and are uploaded once. A graph is
computed several times in a row and waited for once. Correctness is checked first, scores, choice and attention against
NumPy in float64, on small shapes and then on those that are timed. The bound is the time that the bytes need which must
be read (K and V of the chosen pages, and all summaries), at the bandwidth of a copy measured in the same run, or given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import ggml  # noqa: E402  the graphs that the tests of the operators use
import oracle  # noqa: E402
from edgekv import __version__, native  # noqa: E402
from edgekv.bench import machine  # noqa: E402

N_HEAD, N_HEAD_KV, SIZE, PAGE = 32, 8, 128, 16
GROUP = N_HEAD // N_HEAD_KV
SCALE = SIZE**-0.5
PREC_F32 = 10  # what llama.cpp asks of flash and plain attention

_p, _i32, _i64, _size, _f = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
_base, _ggml = ggml._base, ggml._ggml
for _library, _name, _result, *_arguments in (
    (_base, "ggml_flash_attn_ext", _p, _p, _p, _p, _p, _p, _f, _f, _f),
    (_base, "ggml_flash_attn_ext_set_prec", None, _p, _i32),
    (_base, "ggml_mul_mat", _p, _p, _p, _p),
    (_base, "ggml_mul_mat_set_prec", None, _p, _i32),
    (_base, "ggml_soft_max_ext", _p, _p, _p, _p, _f, _f),
    (_base, "ggml_cpy", _p, _p, _p, _p),
    (_base, "ggml_backend_graph_compute_async", _i32, _p, _p),
    (_base, "ggml_backend_synchronize", None, _p),
    (_base, "ggml_backend_free", None, _p),
    (_base, "ggml_backend_dev_init", _p, _p, ctypes.c_char_p),
    (_base, "ggml_backend_dev_type", _i32, _p),
    (_base, "ggml_backend_dev_name", ctypes.c_char_p, _p),
    (_base, "ggml_backend_dev_description", ctypes.c_char_p, _p),
    (_base, "ggml_backend_dev_memory", None, _p, ctypes.POINTER(_size), ctypes.POINTER(_size)),
    (_ggml, "ggml_backend_dev_count", _size),
    (_ggml, "ggml_backend_dev_get", _p, _size),
):
    getattr(_library, _name).restype, getattr(_library, _name).argtypes = _result, _arguments


class Device:
    """One of ggml's devices by its name, with a backend."""

    def __init__(self, name: str):
        devices = {}
        for i in range(_ggml.ggml_backend_dev_count()):
            device = _ggml.ggml_backend_dev_get(i)
            devices[_base.ggml_backend_dev_name(device).decode()] = device
        if name not in devices:
            sys.exit(f"--device {name}: the devices are {', '.join(devices)}")
        self.name, device = name, devices[name]
        self.description = _base.ggml_backend_dev_description(device).decode().strip()
        self.is_cpu = _base.ggml_backend_dev_type(device) == 0
        free, total = _size(), _size()
        _base.ggml_backend_dev_memory(device, free, total)
        self.free_bytes, self.total_bytes = free.value, total.value
        # the threads of the CPU are set through the backend that tests/ggml.py has
        self.backend = ggml._backend if self.is_cpu else _base.ggml_backend_dev_init(device, None)
        if not self.backend:
            sys.exit(f"--device {name}: cannot be started")


class Graph(ggml.Graph):
    """The tests' graphs on any device."""

    def __init__(self, device: Device, **kwargs):
        super().__init__(**kwargs)
        self.device = device

    def graph(self, *nodes: int) -> int:
        graph = ggml._new_graph(self._ctx)
        for node in nodes:
            ggml._expand(graph, node)
        return graph

    def check_support(self, *nodes: int) -> None:
        for node in nodes:
            if not ggml._supports(self.device.backend, node):
                sys.exit(f"--device {self.device.name}: does not support an operator of this benchmark")

    def allocate(self) -> None:
        if self.device.is_cpu:
            return super().allocate(huge_pages=True)
        self._buffer = ggml._alloc(self._ctx, self.device.backend)
        if not self._buffer:
            sys.exit(f"--device {self.device.name}: no memory for the tensors; take fewer --cells or --layers")
        for handle, data in self._data:
            ggml._set(handle, data.ctypes.data, 0, data.nbytes)

    def run(self, graph: int, n_threads: int = 1, n: int = 1) -> float:
        """Seconds that ``n`` computations in a row take."""
        if self.device.is_cpu:
            ggml._set_n_threads(self.device.backend, n_threads)
        began = time.perf_counter()
        for _ in range(n):
            status = _base.ggml_backend_graph_compute_async(self.device.backend, graph)
            assert status == 0, f"the computation failed: status {status}"
        _base.ggml_backend_synchronize(self.device.backend)
        return time.perf_counter() - began


class Bench(Graph):
    """Layers of K, V (as rows and transposed) and summaries; one query; a graph for each way to read them."""

    def __init__(self, device: Device, n_cells: int, data: dict, budgets: list[int], n_layers: int):
        # a graph and its tensors: a dozen per layer, and five for each budget
        super().__init__(device, n_tensors=(20 + 8 * len(budgets)) * n_layers + 16, n_graphs=3 + len(budgets))
        self.data, self.n_layers, g = data, n_layers, self
        q = g.permute(g.tensor("f32", (SIZE, N_HEAD, 1, 1), data["q"]), 0, 2, 1, 3)
        mask = g.tensor("f16", (n_cells, 1, 1, 1), np.zeros(n_cells, np.float16))
        row, cell = 2 * SIZE, 2 * SIZE * N_HEAD_KV

        def cache(rows):
            whole = g.tensor("f16", (SIZE * N_HEAD_KV, n_cells), rows)
            return g.view_4d(whole, (SIZE, N_HEAD_KV, n_cells, 1), row, cell, cell * n_cells)

        self.results: dict[str | int, list[int]] = {}  # by "flash", "plain", "dense" or a budget
        self.scores: dict[int, int] = {}
        self.pages: dict[int, int] = {}

        def add(what, node):
            self.results.setdefault(what, []).append(node)

        for _ in range(n_layers):
            k, v = cache(data["k"]), cache(data["v"])
            k_rows, v_rows = (g.permute(x, 0, 2, 1, 3) for x in (k, v))
            flash = _base.ggml_flash_attn_ext(g._ctx, q, k_rows, v_rows, mask, SCALE, 0.0, 0.0)
            _base.ggml_flash_attn_ext_set_prec(flash, PREC_F32)
            add("flash", flash)
            # [n_cells, size, heads] as a cache without flash attention stores V
            vt = g.tensor("f16", (n_cells, SIZE, N_HEAD_KV, 1), data["vt"])
            products = _base.ggml_mul_mat(g._ctx, k_rows, q)
            _base.ggml_mul_mat_set_prec(products, PREC_F32)
            weights = _base.ggml_soft_max_ext(g._ctx, products, mask, SCALE, 0.0)
            add("plain", _base.ggml_mul_mat(g._ctx, vt, weights))
            add("dense", g.op("attn", q, k, v, mask, None, None, PAGE, SCALE, 0.0))
            s = g.tensor("f16", (2 * SIZE, N_HEAD_KV, n_cells // PAGE, 1), data["summaries"])
            for budget in budgets:
                self.scores[budget] = g.op("page_scores", q, s)
                self.pages[budget] = g.op("choose_pages", self.scores[budget], mask, PAGE, 1, budget // PAGE)
                add(budget, g.op("attn", q, k, v, mask, self.pages[budget], None, PAGE, SCALE, 0.0))
        self.check_support(*(nodes[-1] for nodes in self.results.values()), *self.scores.values(), *self.pages.values(),
                           products, weights)
        self.graphs = {what: self.graph(*nodes) for what, nodes in self.results.items()}
        self.allocate()

    def times(self, n_threads: int, seconds: float) -> dict:
        """Median seconds per layer of each graph. They take turns, so that all see the same machine."""
        # as often in a row as fills 10 ms, or just once: waiting costs as much as a small graph on a GPU
        often = {what: max(1, min(100, int(0.01 / self.run(graph, n_threads)))) for what, graph in self.graphs.items()}
        times = {what: [] for what in self.graphs}
        end = time.perf_counter() + seconds * len(times)
        while len(times["flash"]) < 5 or time.perf_counter() < end:
            for what, graph in self.graphs.items():
                for _ in range(1 if what == "flash" else 3):
                    n = often[what]
                    times[what].append(self.run(graph, n_threads, n) / n / self.n_layers)
        return {what: float(np.median(t[len(t) // 10 :])) for what, t in times.items()}

    def error(self, what) -> float:
        """Normalised mean squared error of the last layer against NumPy, over every third query head."""
        chosen = None if what not in self.pages else self.read(self.pages[what], np.int32, (N_HEAD_KV, what // PAGE))
        got = self.read(self.results[what][-1], np.float32, (N_HEAD, SIZE))
        k, v = self.data["k"], self.data["v"]
        up = down = 0.0
        for head in range(0, N_HEAD, 3):
            h = head // GROUP
            rows = slice(None) if chosen is None else (chosen[h][:, None] * PAGE + np.arange(PAGE)).ravel()
            keys, values = (x[rows, h].astype(np.float64) for x in (k, v))
            want = oracle.attention(self.data["q"][0, 0, head].astype(np.float64), keys, values, 0.0, SCALE)
            up, down = up + ((got[head] - want) ** 2).sum(), down + (want**2).sum()
        return up / down

    def check(self, budget: int) -> None:
        """Scores against float64 within the rounding of float32 sums, and the choice for these scores, exactly."""
        n_pages = len(self.data["k"]) // PAGE
        scores = self.read(self.scores[budget], np.float32, (N_HEAD_KV, n_pages))
        pages = self.read(self.pages[budget], np.int32, (N_HEAD_KV, budget // PAGE))
        visible = np.ones(n_pages * PAGE, bool)
        for h in range(N_HEAD_KV):
            q = self.data["q"][0, 0, h * GROUP : (h + 1) * GROUP].astype(np.float64)
            bounds = self.data["summaries"][:, h].astype(np.float64)
            slack = (2 * SIZE + 2) * oracle.EPS * (np.abs(q) @ np.abs(bounds[:, :SIZE]).T
                                                   + np.abs(q) @ np.abs(bounds[:, SIZE:]).T).max(axis=0)
            wrong = np.abs(scores[h] - oracle.page_scores(q, bounds)) > slack
            assert not wrong.any(), f"scores of KV head {h}, pages {np.flatnonzero(wrong)[:8]}"
            want = oracle.choose_pages(scores[h], visible, PAGE, 1, budget // PAGE)
            assert np.array_equal(pages[h], want), f"choice of KV head {h}: {pages[h]}, not {want}"


def make_data(n_cells: int) -> dict:
    rng = np.random.default_rng(n_cells)
    k, v = (rng.standard_normal((n_cells, N_HEAD_KV, SIZE), dtype=np.float32).astype(np.float16) for _ in range(2))
    parts = k.reshape(n_cells // PAGE, PAGE, N_HEAD_KV, SIZE)
    summaries = np.concatenate([parts.max(axis=1), parts.min(axis=1)], axis=-1)
    return {"k": k, "v": v, "vt": np.ascontiguousarray(v.transpose(1, 2, 0)), "summaries": summaries,
            "q": rng.standard_normal((1, 1, N_HEAD, SIZE), dtype=np.float32)}


def checked(bench: Bench, budgets: list[int], n_threads: int) -> dict:
    """Computes every graph once and compares it; the errors of attention."""
    for graph in bench.graphs.values():
        bench.run(graph, n_threads)
    for budget in budgets:
        bench.check(budget)
    errors = {what: bench.error(what) for what in bench.graphs}
    for what, error in errors.items():
        # stock sums values up in f16, over thousands of cells
        assert error < (1e-2 if what in ("flash", "plain") else 1e-6), f"{what}: {error}"
    return errors


def copy_bandwidth(device: Device, n_threads: int, n_bytes: int, seconds: float) -> float:
    """Bytes per second that a copy of a large tensor reads and writes; the fastest of several."""
    with Graph(device, n_tensors=8) as g:
        n = n_bytes // 4
        data = np.ones(n, np.float32)
        source, target = (g.tensor("f32", (n,), data) for _ in range(2))
        graph = g.graph(_base.ggml_cpy(g._ctx, source, target))
        g.allocate()
        g.run(graph, n_threads)
        end, best, often = time.perf_counter() + seconds, 0.0, 1 if device.is_cpu else 10
        while time.perf_counter() < end or not best:
            best = max(best, 2 * n_bytes * often / g.run(graph, n_threads, often))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="CPU", help="one of ggml's: CPU, CUDA0, MTL0, ... (default CPU)")
    parser.add_argument("--cells", default="4096,8192,16384,32768,65536")
    parser.add_argument("--budgets", default="512,1024,2048,4096")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("-t", "--threads", type=int, default=threads, help="of the CPU")
    parser.add_argument("--layers", type=int,
                        help="of a graph (default 4; on a GPU so many that they hold a million cells, 4 to 32)")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of the device's memory (default: measured)")
    parser.add_argument("--seconds", type=float, default=2, help="for each figure")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()
    device = Device(args.device)
    all_cells, all_budgets = ([int(n) for n in text.split(",")] for text in (args.cells, args.budgets))
    for flag, numbers in (("--cells", all_cells), ("--budgets", all_budgets)):
        if wrong := [n for n in numbers if n < 2 * PAGE or n % PAGE]:
            sys.exit(f"{flag} {wrong[0]}: give multiples of {PAGE}, from {2 * PAGE} on")
    if args.layers is not None and args.layers < 1:
        sys.exit(f"--layers {args.layers}: give at least 1")

    # around the number of cells that a kernel takes at a time; stock's flash attention wants multiples of 256 on GPUs
    for n_cells, budgets in ((256, [32, 256]), (768, [32, 48, 512, 752]), (2304, [80, 1040])):
        with Bench(device, n_cells, make_data(n_cells), budgets, 2) as bench:
            checked(bench, budgets, args.threads)
    if args.bandwidth:
        bandwidth = 1e9 * args.bandwidth
    else:
        size = 256 << 20 if device.is_cpu else min(2 << 30, device.free_bytes // 8)
        bandwidth = copy_bandwidth(device, args.threads, size, args.seconds)

    rows = []
    for n_cells in all_cells:
        budgets = [b for b in all_budgets if b <= n_cells]
        n_layers = args.layers or (4 if device.is_cpu else max(4, min(32, (1 << 20) // n_cells)))
        with Bench(device, n_cells, make_data(n_cells), budgets, n_layers) as bench:
            errors = checked(bench, budgets, args.threads)
            times = bench.times(args.threads, args.seconds)
        stock = min(times["flash"], times["plain"])
        for budget in budgets:
            moved = 2 * SIZE * N_HEAD_KV * (2 * budget + 2 * n_cells // PAGE)  # K, V and summaries
            names = {"flash": "flash", "plain": "plain", "dense": "dense", "select": budget}
            rows.append({"cells": n_cells, "budget": budget, "layers": n_layers,
                         **{f"{k}_ms": 1e3 * times[v] for k, v in names.items()},
                         "of_dense": times[budget] / times["dense"], "of_stock": times[budget] / stock,
                         "of_flash": times[budget] / times["flash"], "speedup": times["flash"] / times[budget],
                         **{f"{k}_nmse": float(errors[v]) for k, v in names.items()},
                         "bound": moved / (4 * SIZE * N_HEAD_KV * n_cells), "bound_ms": 1e3 * moved / bandwidth,
                         "gb_per_s": moved / times[budget] / 1e9})
            print(rows[-1], file=sys.stderr)

    about = {"edgekv": __version__, "bindings": "llama-cpp-python 0.3.36", "cpu_variant": native.cpu_variant(),
             "machine": machine(), "device": device.name, "device_description": device.description,
             "device_bytes": device.total_bytes, "bandwidth_gb_s": bandwidth / 1e9,
             "bandwidth_from": "--bandwidth" if args.bandwidth else "a copy, bytes read and written",
             "threads": args.threads if device.is_cpu else None, "heads": [N_HEAD, N_HEAD_KV, SIZE], "page_size": PAGE}
    if args.output == "json":
        print(json.dumps({"about": about, "rows": rows}, indent=1))
        return
    print("| cells | budget | flash ms | plain ms | dense ms | selected ms | bound ms | of dense | of stock | bytes | "
          "flash / selected | of bytes | GB/s |")
    print("|" + "--:|" * 13)
    for r in rows:
        print(f"| {r['cells']:,} | {r['budget']:,} | {r['flash_ms']:.4f} | {r['plain_ms']:.4f} | {r['dense_ms']:.4f} | "
              f"{r['select_ms']:.4f} | {r['bound_ms']:.4f} | {r['of_dense']:.3f} | {r['of_stock']:.3f} | "
              f"{r['bound']:.3f} | {r['speedup']:.2f}x | {1 / r['bound']:.2f}x | {r['gb_per_s']:.1f} |")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
