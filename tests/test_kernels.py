"""The GPU kernels of both backends against NumPy, on the emulated device of tests/gpu, and what their compilers say.

The tests of test_ops.py and test_selection_ops.py do the work: what they compare for several numbers of threads is run
here with other block sizes and orders of threads (kernels.Device.RUNS).
"""

import itertools
import os
import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import oracle
import test_ops as eviction
import test_selection_ops as selection
from ggml import Graph, on

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

CELLS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 512, 513)
FLOATS = ("f32", "f16", "bf16")


@pytest.fixture(scope="module", params=kernels.BACKENDS)
def device(request):
    return kernels.device(request.param)


@pytest.fixture(autouse=True)
def graphs(request):
    """Graphs run on the device, in tests that have one."""
    with on(request.getfixturevalue("device") if "device" in request.fixturenames else None):
        yield


# --- what the emulator itself computes -------------------------------------------------------------------------------


def test_half_precision(device):
    halves = np.arange(1 << 16, dtype=np.uint16)
    floats = np.array([device.half_to_float(int(h)) for h in halves], np.float32)
    np.testing.assert_array_equal(floats, halves.view(np.float16).astype(np.float32))

    rng = np.random.default_rng(0)
    finite = np.unique(floats[np.isfinite(floats)])
    middles = (finite[1:] + finite[:-1]) / 2  # exact: ties, which go to the even one
    beside = (np.nextafter(middles, np.float32(to)) for to in (np.inf, -np.inf))
    special = np.array([65519.996, 65520, -65520, np.inf, -np.inf, -0.0, 1e-45, 2**-25, 2**-24], np.float32)
    values = np.concatenate([middles, *beside, special, rng.integers(0, 1 << 32, 20000, np.uint32).view(np.float32)])
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        want = values.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal([device.float_to_half(float(v)) for v in values], want)
    assert device.float_to_half(float("nan")) & 0x7FFF > 0x7C00


# --- eviction --------------------------------------------------------------------------------------------------------

# every type with the heads and counts of cells in turn
SHAPES = [[(1, 1), (3, 17)], [(2, 33)], [(8, 9)], [(3, 65)]]
LAYOUTS = [(*layout, shapes) for layout, shapes in zip(selection.LAYOUTS, itertools.cycle(SHAPES))]


@pytest.mark.parametrize("kind, size, shapes", LAYOUTS)
def test_eviction_of_every_type(device, kind, size, shapes):
    eviction.test_score(kind, size, shapes)
    eviction.test_key_mean(kind, size, shapes)
    eviction.test_compact(kind, size, shapes)
    if kind in FLOATS:
        eviction.test_compact_transposed(kind, size, shapes)


@pytest.mark.parametrize("n_cell", CELLS)
def test_eviction_of_any_number_of_cells(device, n_cell):
    for kind, size in (("f16", 64), ("q4_0", 96)):
        eviction.test_score(kind, size, [(1, n_cell)])
        eviction.test_key_mean(kind, size, [(2, n_cell)])
        eviction.test_compact(kind, size, [(2, n_cell)])
    eviction.test_compact_transposed("bf16", 64, [(1, n_cell)])
    eviction.test_choose(2, n_cell)


def test_eviction_of_many_cells(device):
    eviction.test_key_mean("q8_0", 64, [(2, 4097)])
    eviction.test_compact("q5_0", 64, [(1, 4097)])
    rng = np.random.default_rng(0)
    for scores in (rng.standard_normal((2, 4097)), rng.integers(0, 3, (1, 4097)), 1 + rng.random((1, 20000)) * 1e-4):
        eviction.same_for_all_threads(lambda n: eviction.check_choice(scores, 2, 4, 100, 1000, n))


def test_eviction_states_its_rules(device):
    eviction.test_choose_states_its_rules()
    eviction.test_scores_that_are_not_finite()
    eviction.test_score_choose_compact_in_one_graph()


@settings(deadline=None, max_examples=60)
@given(eviction.choices())
def test_any_choice_of_cells(device, case):
    eviction.check_invariants(*case)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(oracle.CACHE_TYPES), n_head=st.integers(1, 3), n_cell=st.integers(1, 70), strided=st.booleans())
def test_any_row_move(device, kind, n_head, n_cell, strided):
    strided = strided and kind in FLOATS
    (eviction.test_compact_transposed if strided else eviction.test_compact)(kind, 32, [(n_head, n_cell)])


def test_rows_of_odd_places(device):
    """Heads and cells at multiples of two bytes only: pieces of 16 do not fit."""
    rng = np.random.default_rng(0)
    n_cell, n_head, size = 40, 3, 32
    data = rng.integers(0, 1 << 16, (n_cell, n_head * size + 1), np.uint16)
    chosen = eviction.ascending(rng, n_head, n_cell, 17)
    with Graph() as g:
        whole = g.tensor("f16", data.shape[::-1], data)
        rows = g.view(whole, (size, n_head, n_cell), 2 * size, 2 * data.shape[1], 2)
        g.compute(g.op("compact", rows, g.tensor("i32", chosen.shape[::-1], chosen)))
        got = g.read(whole, np.uint16, data.shape)
    for h in range(n_head):
        part = slice(1 + h * size, 1 + (h + 1) * size)
        np.testing.assert_array_equal(got[:17, part], data[chosen[h], part])


def test_keys_at_odd_places(device):
    """The same with what reads keys and values: as where they are at multiples of 16."""
    layer = selection.Layer("f16", "f16", size=64, heads=(4, 2), n_cells=70)
    shape = (64, 2, 70, 1)

    def results(gap: int):
        with Graph() as g:
            def rows(data):
                padded = np.zeros((70, 2 * 64 + gap), np.float16)
                padded[:, gap:] = data[0, :70].view(np.float16).reshape(70, 2 * 64)
                whole = g.tensor("f16", padded.shape[::-1], padded)
                return g.view_4d(whole, shape, 2 * 64, 2 * padded.shape[1], padded.nbytes, 2 * gap)

            keys = rows(layer.k)
            summaries = g.tensor("f16", (128, 2, 5, 1), np.zeros((5, 2, 128), np.float16))
            mask = g.tensor("f16", layer.mask.shape[::-1], layer.mask)
            ops = [g.op("score", keys, None, eviction.NORM, 1.0), g.op("key_mean", keys),
                   g.op("summarize", summaries, keys, None, 16),
                   g.op("attn", layer.query(g), keys, rows(layer.v), mask, None, None, 16, 0.125, 0.0)]
            g.compute(*ops)
            return [g.read(op, *what) for op, what in zip(ops, ((np.float32, (2, 70)), (np.float32, (2, 64)),
                                                                (np.float16, (5, 2, 128)), (np.float32, (4, 64))))]

    *want, attention = results(8)
    for gap in (1, 2, 4):
        *got, other = results(gap)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)
        assert selection.error(other, attention) <= ATTENTION_WITHIN


# --- selection -------------------------------------------------------------------------------------------------------

GROUPS = ((1, 1), (4, 2), (6, 2), (8, 2), (7, 1), (8, 1), (16, 1), (10, 2))  # query heads, KV heads


@pytest.mark.parametrize("kind, size", selection.LAYOUTS)
def test_summaries(device, kind, size):
    selection.test_summaries(kind, size)


def test_summaries_state_their_rules(device):
    selection.test_rounding_is_outward()
    for page_size in (8, 16, 64):
        selection.test_only_the_pages_that_are_named(page_size)


@pytest.mark.parametrize("size", (64, 80, 96, 128, 192, 256))
def test_page_scores(device, size):
    for heads in GROUPS:
        selection.test_page_scores(size, heads)


def test_bounds_and_choices_of_pages(device):
    selection.test_no_page_is_scored_below_its_keys()
    selection.test_choice()
    selection.test_choice_by_hand()


def test_choice_of_many_pages(device):
    rng = np.random.default_rng(0)
    for n_pages, levels in ((513, 10**6), (4097, 3), (4097, 10**6)):
        scores = rng.integers(-levels, levels, (1, 1, 2, n_pages)).astype(np.float32)
        mask = np.where(rng.random((1, 1, 1, 8 * n_pages)) < 0.9, -np.inf, 0.0)
        got = selection.same_for_all_threads(lambda n: selection.choose_pages(scores, mask, 8, 1, 256, n))
        for h in range(2):
            want = oracle.choose_pages(scores[0, 0, h], mask[0, 0, 0] == 0, 8, 1, 256)
            np.testing.assert_array_equal(got[0, 0, h], want)


# sums over the warps of a block have another shape where there are more of them
ATTENTION_WITHIN = 1e-11


@pytest.mark.parametrize("n_cells", CELLS)
def test_attention_on_any_number_of_cells(device, n_cells):
    for heads in GROUPS if n_cells < 100 else GROUPS[1::3]:
        selection.test_attention_on_any_number_of_cells(heads, n_cells, ATTENTION_WITHIN)


def test_attention_on_many_cells(device):
    selection.test_attention_on_any_number_of_cells((4, 2), 4097, ATTENTION_WITHIN)


@pytest.mark.parametrize("kind_k", oracle.CACHE_TYPES)
def test_attention_on_every_type(device, kind_k):
    for kind_v in oracle.CACHE_TYPES:
        selection.test_attention_on_every_type(kind_k, kind_v)


SIZES = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (128, 192), (256, 256), (64, 256), (64, 72))


@pytest.mark.parametrize("kind", oracle.CACHE_TYPES)
def test_attention_of_every_head_size(device, kind):
    for size, size_v in SIZES:
        if kind in FLOATS or size % 32 == size_v % 32 == 0:
            for heads in ((6, 2), (2, 2)):
                layer = selection.Layer(kind, kind, size=size, size_v=size_v, n_cells=70, heads=heads)
                assert selection.error(selection.attend(layer), selection.expected(layer)) <= 1e-6


def test_attention_states_its_rules(device):
    selection.test_soft_cap_and_sinks()
    selection.test_tokens_that_see_nothing()
    selection.test_large_scores_do_not_overflow()
    for device.how in ((1024, 3), (64, 1)):
        selection.test_all_pages_are_dense_attention()
    device.how = None


@pytest.mark.parametrize("threads", (32, 128, 1024))
def test_attention_has_one_result_for_a_block_size(device, threads):
    layer = selection.Layer("f16", "q8_0", n_cells=600, heads=(6, 2), n_tokens=2)
    pages = selection.random_pages(layer, 16, 0.5)
    results = []
    for seed in range(4):
        device.how = threads, seed
        results.append(selection.attend(layer, pages).tobytes())
    device.how = None
    assert len(set(results)) == 1


def test_hidden_rows_may_hold_anything(device):
    """What a mask hides, and rows that no cell is in yet, are not read into a result."""
    layer = selection.Layer("f16", "f16", n_cells=90, heads=(8, 2))
    layer.mask[..., 20:50] = -np.inf
    want = selection.expected(layer)
    for data in (layer.k, layer.v):
        data[:, 20:50] = 0xFF
        data[:, 90:] = 0xFF
    got = selection.attend(layer)
    assert np.isfinite(got).all() and selection.error(got, want) <= 1e-6


def test_counters(device):
    """They carry over 32 bits; the first, of nanoseconds, is the CPU's alone."""
    layer = selection.Layer(n_cells=100, n_tokens=2, n_stream=2)
    start = np.array([5, 2**32 - 1, 2**32 - 3, 2**33 - 1], np.int64)
    with Graph(n_graphs=2) as g:
        scores = g.tensor("f32", (7, 2, 2, 2), layer.rng.standard_normal((2, 2, 2, 7)).astype(np.float32))
        layer.mask[1, :, :, 16:] = -np.inf  # one visible page in the second stream
        chosen = g.op("choose_pages", scores, g.tensor("f16", layer.mask.shape[::-1], layer.mask), 16, 1, 4)
        summaries = g.tensor("f16", (128, 2, 7, 2), np.zeros((2, 7, 2, 128), np.float16))
        summaries = g.op("summarize", summaries, layer.rows(g, "k"), None, 16)
        counters = [g.tensor("i64", (4,), start) for _ in range(2)]
        g.count(chosen, counters[0])
        g.count(summaries, counters[1])
        graph = g.graph(chosen, summaries)
        g.allocate()
        g.run(graph)
        g.run(graph)
        counts = [g.read(c, np.int64, (4,)) - start for c in counters]
    # per KV head and token: 4 pages of 7, and 1 of 1
    assert counts[0].tolist() == [0, 2, 2 * 4 * (4 + 1), 2 * 4 * (7 + 1)]
    assert counts[1].tolist() == [0, 2, 0, 0]


def test_what_is_not_supported_is_said(device):
    with Graph() as g:
        odd = g.tensor("f16", (68, 1, 4), np.zeros((4, 1, 68), np.float16))
        assert not g.supports(g.op("score", odd, None, eviction.NORM, 1.0))
        assert not g.supports(g.op("key_mean", odd))
        wide = g.tensor("f16", (1024, 1, 4), np.zeros((4, 1, 1024), np.float16))
        q = g.tensor("f32", (1024, 1, 1), np.zeros((1, 1, 1024), np.float32))
        mask = g.tensor("f16", (4, 1), np.zeros((1, 4), np.float16))
        assert not g.supports(g.op("attn", q, wide, wide, mask, None, None, 16, 1.0, 0.0))
        other = g.tensor("i32", (64, 1, 4), np.zeros((4, 1, 64), np.int32))
        assert not g.supports(g.op("score", other, None, eviction.NORM, 1.0))
        fine = g.tensor("q4_1", (64, 1, 4), np.zeros((4, 1, 40), np.uint8))
        assert g.supports(g.op("score", fine, None, eviction.NORM, 1.0))


# --- planted errors --------------------------------------------------------------------------------------------------


def scores_of(n_cell: int, levels: int = 10**6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, levels, (2, n_cell))


def choose_cells(levels: int = 10**6) -> None:
    eviction.check_choice(scores_of(900, levels), 2, 4, 100, 300)


def move_rows() -> None:
    eviction.test_compact("q8_0", 64, [(2, 65)])


def attend() -> None:
    selection.test_attention_on_any_number_of_cells((4, 2), 65, ATTENTION_WITHIN)


def score_pages() -> None:
    """One more than full tiles of any size."""
    layer = selection.Layer()
    bounds = np.sort(layer.rng.standard_normal((1, 1025, 2, 2, 64)), axis=3)[:, :, :, ::-1].reshape(1, 1025, 2, 128)
    assert np.isfinite(selection.page_scores(layer, bounds)).all()


# what is wrong: where, a test that sees it, and what is said if the emulator itself does
ERRORS = {
    "keys are added before all norms are there": (
        kernels.Planted("gpu/evict.h", "EK_FN void ek_key_sum(", "EK_BARRIER();", ""),
        lambda: eviction.test_key_mean("f16", 64, [(2, 65)]), None),
    "rows are stored before all are loaded": (
        kernels.Planted("gpu/evict.h", "EK_FN void ek_compact(", "EK_BARRIER();", ""), move_rows, None),
    "weights are used before all are there": (
        kernels.Planted("gpu/attn.h", "// weights: a warp per query head", "EK_BARRIER();", ""), attend, None),
    "a barrier for some threads": (
        kernels.Planted("gpu/pick.h", "bins[b] = 0;", "EK_BARRIER();", "if (t.index < 32) { EK_BARRIER(); }"),
        choose_cells,
        "not all threads of a block reach the same point"),
    "a shuffle of some lanes": (
        kernels.Planted("gpu/block.h", "EK_FN float ek_lanes_sum(", "x += ek_shuffle_xor(x, m);",
                        "if (x != 0.0f) { x += ek_shuffle_xor(x, m); }"),
        lambda: eviction.test_score("f16", 64, [(1, 9)]), "not all threads of a block reach the same point"),
    "another lane's sum": (
        kernels.Planted("gpu/sums.h", "EK_FN uint32_t ek_sum_index(", "lane % LANES", "(lane + 1) % LANES"),
        attend, None),
    "memory that nobody wrote": (
        kernels.Planted("gpu/attn.h", "if (t.index < GROUP) {", "total[t.index] = 0.0f;", ""), attend, None),
    "a key more than there are": (
        kernels.Planted("gpu/evict.h", "EK_FN void ek_score(", "cell >= (uint32_t) a.n_cells",
                        "cell > (uint32_t) a.n_cells"),
        lambda: eviction.test_score("f16", 64, [(1, 17)]), "it wrote outside of its result"),
    "a cell more than a tile has": (
        kernels.Planted("gpu/attn.h", "cell = page*a.page_size", "cell < a.n_cells", "cell <= a.n_cells"),
        attend, None),
    "too few tiles": (
        kernels.Planted("gpu/plan-select.h", "struct ek_page_scores_plan {", "args.n_pages + EK_PAGES_TILE - 1",
                        "args.n_pages + EK_PAGES_TILE - 2"),
        score_pages, None),
    "too little shared memory": (
        kernels.Planted("gpu/plan-select.h", "const int floats ", "EK_ATTN_WARPS*at_once*width",
                        "EK_ATTN_WARPS*at_once*width - 16"),
        attend, "a block wrote outside of its shared memory"),
    "too little scratch": (
        kernels.Planted("gpu/plan-select.h", "args.counted   = ", "args.n_pages*sizeof(uint32_t)",
                        "(args.n_pages - 1)*sizeof(uint32_t)"),
        selection.test_choice_by_hand, "it wrote outside of its result"),
    "a load of 16 bytes from anywhere": (
        kernels.Planted("gpu/plan-evict.h", "struct ek_compact_plan {",
                        "(bytes | op->nb[1] | op->nb[2] | (uintptr_t) op->data) % piece != 0", "false"),
        lambda: test_rows_of_odd_places(None),
        "a misaligned address at .*dialect-cuda.h"),
    "ties go to the earlier cell": (
        kernels.Planted("gpu/pick.h", "out[a + e - cut.skip] =", "first + (int32_t) (i + j)",
                        "first + (int32_t) (i + j - cut.skip)"),
        lambda: choose_cells(1), None),
    "NaN is best": (
        kernels.Planted("gpu/pick.h", "EK_FN uint32_t ek_rank(", "return 1;", "return EK_ALWAYS - 1;"),
        eviction.test_choose_states_its_rules, None),
    "values of hidden cells": (
        kernels.Planted("gpu/attn.h", "// the weighted sum of the values", "c < TILE && cells[c] >= 0", "c < TILE"),
        lambda: test_hidden_rows_may_hold_anything(None), None),
}
METAL_ERRORS = {
    "parts are put together while they are made": (
        kernels.Planted("metal/ggml-edgekv-metal.cpp", '"kernel_edgekv_attn_%s', "ggml_metal_encoder_memory_barrier(enc);",
                        ""),
        attend, None),
    "too few buffers": (
        kernels.Planted("metal/ggml-edgekv-metal.cpp", "launcher & tensor(",
                        "ggml_metal_encoder_set_buffer(enc, buffer(t ? t : substitute), ++n_buffers);",
                        "if (t) { ggml_metal_encoder_set_buffer(enc, buffer(t), ++n_buffers); }"),
        attend, "buffers"),
}


ALL_ERRORS = {"cuda": ERRORS, "metal": METAL_ERRORS}


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """The two libraries with all errors planted, of which none shows yet."""
    return {backend: kernels.plant(backend, [error for error, _, _ in errors.values()],
                                   tmp_path_factory.mktemp(backend) / "ops")
            for backend, errors in ALL_ERRORS.items()}


def outcome(function) -> str:
    """What a function raises, in a process of its own: a kernel with an error may write anywhere, or never end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        said = "nothing"
        try:
            function()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or "it died"


@pytest.mark.parametrize("backend, what", [(backend, what) for backend, errors in ALL_ERRORS.items() for what in errors])
def test_planted_errors_are_found(flawed, backend, what):
    errors = ALL_ERRORS[backend]
    _, check, said = errors[what]
    device = flawed[backend]

    def runs():
        for device.how in device.RUNS:
            check()

    with on(device):
        device.plant(0)
        assert outcome(runs) == "nothing"
        device.plant(1 + list(errors).index(what))
        assert re.search(said or "AssertionError", outcome(runs))
        device.plant(0)


# --- compilers -------------------------------------------------------------------------------------------------------


def test_address_spaces_of_the_metal_source():
    """A C++ compiler for the host does not know them; Metal's takes no pointer without."""
    pytest.importorskip("clang.cindex", reason="no libclang: pip install libclang")
    assert kernels.address_spaces() == []


@pytest.mark.parametrize("error, said", [
    (kernels.Planted("gpu/rows.h", "EK_FN void ek_load_bytes(", "EK_LOCAL uint32_t * x", "uint32_t * x"),
     "no address space"),
    (kernels.Planted("gpu/block.h", "EK_FN uint32_t ek_block_scan(", "EK_SHARED uint32_t * scratch",
                     "EK_GLOBAL uint32_t * scratch"), "no matching function for call to 'ek_block_scan'"),
    (kernels.Planted("gpu/pages.h", "EK_FN void ek_choose_pages(", "(EK_SHARED uint32_t *) shared",
                     "(uint32_t *) shared"), "mismatching address spaces"),
])
def test_planted_address_spaces_are_found(tmp_path, error, said):
    pytest.importorskip("clang.cindex", reason="no libclang: pip install libclang")
    shutil.copytree(kernels.OPS, tmp_path / "ops")
    error.plant(tmp_path / "ops")
    assert any(said in line for line in kernels.address_spaces(tmp_path / "ops"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_compiles_for_every_device(tmp_path):
    done = subprocess.run(kernels.nvcc_command(tmp_path / "kernels.o"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
