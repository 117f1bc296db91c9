"""Attention of one decode step: selected pages against all cells, and against stock's flash and plain attention.

    python benchmarks/attention.py [-o json] [--cells 4096,...] [--budgets 512,...]

Needs the package `gguf` (`pip install '.[test]'`) and about 5 GiB. For a head layout of 32 query and 8 KV heads of 128,
f16, page size 16. A graph has several layers, each with K and V of its own, so that nothing is read from a cache that the
layer before has filled; the graphs take turns, and every time is a median. All lie in huge pages of the system where it
has them, as selection asks for. Correctness is checked first, against NumPy in float64.
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

N_HEAD, N_HEAD_KV, SIZE, PAGE, N_LAYERS = 32, 8, 128, 16, 4
SCALE = SIZE**-0.5

_p, _i64, _f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_base = ggml._base
for _name, _result, *_arguments in (
    ("ggml_flash_attn_ext", _p, _p, _p, _p, _p, _p, _f, _f, _f),
    ("ggml_mul_mat", _p, _p, _p, _p),
    ("ggml_soft_max_ext", _p, _p, _p, _p, _f, _f),
):
    getattr(_base, _name).restype, getattr(_base, _name).argtypes = _result, _arguments


class Bench(ggml.Graph):
    """Layers of K, V (as rows and transposed) and summaries; one query; a graph for each way to read them."""

    def __init__(self, n_cells: int, data: dict, budgets: list[int]):
        super().__init__(n_tensors=64 * N_LAYERS, n_graphs=3 + len(budgets))
        self.data, g = data, self
        q = g.permute(g.tensor("f32", (SIZE, N_HEAD, 1, 1), data["q"]), 0, 2, 1, 3)
        mask = g.tensor("f16", (n_cells, 1, 1, 1), np.zeros(n_cells, np.float16))
        row, cell = 2 * SIZE, 2 * SIZE * N_HEAD_KV

        def cache(rows):
            whole = g.tensor("f16", (SIZE * N_HEAD_KV, n_cells), rows)
            return g.view_4d(whole, (SIZE, N_HEAD_KV, n_cells, 1), row, cell, cell * n_cells)

        self.results: dict[str | int, list[int]] = {}  # by "flash", "plain", "dense" or a budget
        self.pages: dict[int, int] = {}

        def add(what, node):
            self.results.setdefault(what, []).append(node)

        for _ in range(N_LAYERS):
            k, v = cache(data["k"]), cache(data["v"])
            k_rows, v_rows = (g.permute(x, 0, 2, 1, 3) for x in (k, v))
            add("flash", _base.ggml_flash_attn_ext(g._ctx, q, k_rows, v_rows, mask, SCALE, 0.0, 0.0))
            # [n_cells, size, heads] as a cache without flash attention stores V
            vt = g.tensor("f16", (n_cells, SIZE, N_HEAD_KV, 1), data["vt"])
            weights = _base.ggml_soft_max_ext(g._ctx, _base.ggml_mul_mat(g._ctx, k_rows, q), mask, SCALE, 0.0)
            add("plain", _base.ggml_mul_mat(g._ctx, vt, weights))
            add("dense", g.op("attn", q, k, v, mask, None, None, PAGE, SCALE, 0.0))
            s = g.tensor("f16", (2 * SIZE, N_HEAD_KV, n_cells // PAGE, 1), data["summaries"])
            for budget in budgets:
                pages = g.op("choose_pages", g.op("page_scores", q, s), mask, PAGE, 1, budget // PAGE)
                self.pages[budget] = pages
                add(budget, g.op("attn", q, k, v, mask, pages, None, PAGE, SCALE, 0.0))
        self.graphs = {what: self.graph(*nodes) for what, nodes in self.results.items()}
        self.allocate(huge_pages=True)

    def times(self, n_threads: int, seconds: float) -> dict:
        """Median seconds per layer of each graph. They take turns, so that all see the same machine."""
        times = {what: [] for what in self.graphs}
        end = time.perf_counter() + seconds * len(times)
        while len(times["flash"]) < 5 or time.perf_counter() < end:
            for what, graph in self.graphs.items():
                for _ in range(1 if what == "flash" else 3):
                    began = time.perf_counter()
                    self.run(graph, n_threads)
                    times[what].append((time.perf_counter() - began) / N_LAYERS)
        return {what: float(np.median(t[len(t) // 10 :])) for what, t in times.items()}

    def error(self, what) -> float:
        """Normalised mean squared error of the last layer against NumPy, over every third query head."""
        chosen = None if what not in self.pages else self.read(self.pages[what], np.int32, (N_HEAD_KV, what // PAGE))
        got = self.read(self.results[what][-1], np.float32, (N_HEAD, SIZE))
        q, k, v = (self.data[name].astype(np.float64) for name in "qkv")
        up = down = 0.0
        for head in range(0, N_HEAD, 3):
            h = head // (N_HEAD // N_HEAD_KV)
            rows = np.arange(len(k)) if chosen is None else (chosen[h][:, None] * PAGE + np.arange(PAGE)).ravel()
            want = oracle.attention(q[0, 0, head], k[rows, h], v[rows, h], np.zeros(len(rows)), SCALE)
            up, down = up + ((got[head] - want) ** 2).sum(), down + (want**2).sum()
        return up / down


def make_data(n_cells: int) -> dict:
    rng = np.random.default_rng(n_cells)
    k, v = (rng.standard_normal((n_cells, N_HEAD_KV, SIZE), dtype=np.float32).astype(np.float16) for _ in range(2))
    parts = k.reshape(n_cells // PAGE, PAGE, N_HEAD_KV, SIZE)
    summaries = np.concatenate([parts.max(axis=1), parts.min(axis=1)], axis=-1)
    return {"k": k, "v": v, "vt": np.ascontiguousarray(v.transpose(1, 2, 0)), "summaries": summaries,
            "q": rng.standard_normal((1, 1, N_HEAD, SIZE), dtype=np.float32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="4096,8192,16384,32768,65536")
    parser.add_argument("--budgets", default="512,1024,2048,4096")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2, help="for each figure")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()

    rows = []
    for n_cells in map(int, args.cells.split(",")):
        budgets = [b for b in map(int, args.budgets.split(",")) if b <= n_cells]
        data = make_data(n_cells)
        with Bench(n_cells, data, budgets) as bench:
            for graph in bench.graphs.values():
                bench.run(graph, args.threads)
            errors = {what: bench.error(what) for what in bench.graphs}
            for what, error in errors.items():
                # stock sums values up in f16, over thousands of cells
                assert error < (1e-2 if what in ("flash", "plain") else 1e-6), f"{what}: {error}"
            times = bench.times(args.threads, args.seconds)
        stock = min(times["flash"], times["plain"])
        for budget in budgets:
            moved = 2 * SIZE * N_HEAD_KV * (2 * budget + 2 * n_cells // PAGE)  # K, V and summaries
            names = {"flash": "flash", "plain": "plain", "dense": "dense", "select": budget}
            rows.append({"cells": n_cells, "budget": budget, **{f"{k}_ms": 1e3 * times[v] for k, v in names.items()},
                         "of_dense": times[budget] / times["dense"], "of_stock": times[budget] / stock,
                         **{f"{k}_nmse": float(errors[v]) for k, v in names.items()},
                         "bound": moved / (4 * SIZE * N_HEAD_KV * n_cells), "gb_per_s": moved / times[budget] / 1e9})
            print(rows[-1], file=sys.stderr)

    about = {"edgekv": __version__, "bindings": "llama-cpp-python 0.3.36", "cpu_variant": native.cpu_variant(),
             "machine": machine(), "threads": args.threads, "layers": N_LAYERS,
             "heads": [N_HEAD, N_HEAD_KV, SIZE], "page_size": PAGE}
    if args.output == "json":
        print(json.dumps({"about": about, "rows": rows}, indent=1))
        return
    print("| cells | budget | flash ms | plain ms | dense ms | selected ms | of dense | of stock | traffic bound | GB/s |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        print(f"| {r['cells']:,} | {r['budget']:,} | {r['flash_ms']:.3f} | {r['plain_ms']:.3f} | {r['dense_ms']:.3f} | "
              f"{r['select_ms']:.3f} | {r['of_dense']:.3f} | {r['of_stock']:.3f} | {r['bound']:.3f} | {r['gb_per_s']:.1f} |")
    print(json.dumps(about))


if __name__ == "__main__":
    main()
