"""Attention of one decode step: selected pages against all cells, and against stock's flash and plain attention.

    python benchmarks/attention.py [-o json] [--cells 4096,...] [--budgets 512,...]

Needs the package `gguf` (`pip install '.[test]'`) and about 3 GiB. For a head layout of 32 query and 8 KV heads of 128,
f16, page size 16. Every time is the median over graphs of several layers, each with K and V of its own, so that nothing
is read from a cache that the layer before has filled. Correctness is checked first, against NumPy in float64.
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
    """Layers of K, V (as rows and transposed) and summaries; one query."""

    def __init__(self, n_cells: int, data: dict, what: str, budget: int = 0):
        super().__init__()
        self.results, g = [], self
        q = g.permute(g.tensor("f32", (SIZE, N_HEAD, 1, 1), data["q"]), 0, 2, 1, 3)
        mask = g.tensor("f16", (n_cells, 1, 1, 1), np.zeros(n_cells, np.float16))
        for _ in range(N_LAYERS):
            row, cell = 2 * SIZE, 2 * SIZE * N_HEAD_KV

            def cache(rows):
                whole = g.tensor("f16", (SIZE * N_HEAD_KV, n_cells), rows)
                return g.view_4d(whole, (SIZE, N_HEAD_KV, n_cells, 1), row, cell, cell * n_cells)

            k = cache(data["k"])
            if what == "plain":
                # [n_cells, size, heads] as a cache without flash attention stores V
                v = g.tensor("f16", (n_cells, SIZE, N_HEAD_KV, 1), data["vt"])
                kq = _base.ggml_mul_mat(g._ctx, g.permute(k, 0, 2, 1, 3), q)
                kq = _base.ggml_soft_max_ext(g._ctx, kq, mask, SCALE, 0.0)
                self.results.append(_base.ggml_mul_mat(g._ctx, v, kq))
                continue
            v = cache(data["v"])
            if what == "flash":
                k, v = (g.permute(x, 0, 2, 1, 3) for x in (k, v))
                self.results.append(_base.ggml_flash_attn_ext(g._ctx, q, k, v, mask, SCALE, 0.0, 0.0))
                continue
            pages = None
            if what == "select":
                s = g.tensor("f16", (2 * SIZE, N_HEAD_KV, n_cells // PAGE, 1), data["summaries"])
                scores = g.op("page_scores", q, s)
                pages = g.op("choose_pages", scores, mask, PAGE, 1, budget // PAGE)
                self.pages = pages
            self.results.append(g.op("attn", q, k, v, mask, pages, None, PAGE, SCALE, 0.0))

    def time(self, n_threads: int, seconds: float) -> float:
        """Seconds per layer."""
        self.compute(*self.results, n_threads=n_threads)
        graph, times, end = self._graph, [], time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            began = time.perf_counter()
            assert ggml._compute(ggml._backend, graph) == 0
            times.append((time.perf_counter() - began) / N_LAYERS)
        return float(np.median(times))


def make_data(n_cells: int) -> dict:
    rng = np.random.default_rng(n_cells)
    k, v = (rng.standard_normal((n_cells, N_HEAD_KV, SIZE), dtype=np.float32).astype(np.float16) for _ in range(2))
    parts = k.reshape(n_cells // PAGE, PAGE, N_HEAD_KV, SIZE)
    summaries = np.concatenate([parts.max(axis=1), parts.min(axis=1)], axis=-1)
    return {"k": k, "v": v, "vt": np.ascontiguousarray(v.transpose(1, 2, 0)), "summaries": summaries,
            "q": rng.standard_normal((1, 1, N_HEAD, SIZE), dtype=np.float32)}


def check(bench: Bench, data: dict, what: str) -> float:
    """Normalised mean squared error of the last layer, over four heads of every KV head's group."""
    chosen = None
    if what == "select":
        n = bench.pages_read
        chosen = bench.read(bench.pages, np.int32, (N_HEAD_KV, n))
    got = bench.read(bench.results[-1], np.float32, (N_HEAD, SIZE))
    k, v = data["k"].astype(np.float64), data["v"].astype(np.float64)
    up = down = 0.0
    for head in range(0, N_HEAD, 3):
        h = head // (N_HEAD // N_HEAD_KV)
        rows = np.arange(len(k)) if chosen is None else (chosen[h][:, None] * PAGE + np.arange(PAGE)).ravel()
        want = oracle.attention(data["q"][0, 0, head].astype(np.float64), k[rows, h], v[rows, h], np.zeros(len(rows)), SCALE)
        up, down = up + ((got[head] - want) ** 2).sum(), down + (want**2).sum()
    return up / down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="4096,8192,16384,32768,65536")
    parser.add_argument("--budgets", default="512,1024,2048,4096")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    args = parser.parse_args()

    rows = []
    for n_cells in map(int, args.cells.split(",")):
        data = make_data(n_cells)
        times, errors = {}, {}
        for what in ("flash", "plain", "dense"):
            with Bench(n_cells, data, what) as bench:
                times[what] = bench.time(args.threads, args.seconds)
                # stock sums values up in f16, over thousands of cells
                errors[what] = check(bench, data, what)
                assert errors[what] < (1e-6 if what == "dense" else 1e-2), f"{what}: {errors[what]}"
        for budget in map(int, args.budgets.split(",")):
            if budget > n_cells:
                continue
            with Bench(n_cells, data, "select", budget) as bench:
                bench.pages_read = budget // PAGE
                times["select"] = bench.time(args.threads, args.seconds)
                errors["select"] = check(bench, data, "select")
                assert errors["select"] < 1e-6
            stock = min(times["flash"], times["plain"])
            moved = 2 * SIZE * N_HEAD_KV * (2 * budget + 2 * n_cells // PAGE)  # K, V and summaries
            rows.append({"cells": n_cells, "budget": budget, **{f"{k}_ms": 1e3 * v for k, v in times.items()},
                         "of_dense": times["select"] / times["dense"], "of_stock": times["select"] / stock,
                         **{f"{k}_nmse": float(v) for k, v in errors.items()}, "bound": moved / (4 * SIZE * N_HEAD_KV * n_cells), "gb_per_s": moved / times["select"] / 1e9})
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
