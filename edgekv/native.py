"""The C interface of ``ggml_ops/include/llama-edgekv.h`` for a context of the bindings."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from edgekv import _runtime
from edgekv.errors import EdgekvError
from edgekv.filters import QFilters
from edgekv.settings import MODES, EvictionSettings, SelectionSettings

_runtime.check()

import llama_cpp  # noqa: E402


class _Params(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("policy", ctypes.c_char_p),
        ("mode", ctypes.c_int32),
        ("budget", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("n_keep", ctypes.c_uint32),
        ("filters", ctypes.POINTER(ctypes.c_float)),
        ("n_filters", ctypes.c_uint64),
        ("filter_layers", ctypes.POINTER(ctypes.c_int32)),
        ("n_filter_layers", ctypes.c_uint32),
        ("select", ctypes.c_char_p),
        ("select_budget", ctypes.c_uint32),
        ("page_size", ctypes.c_uint32),
        ("n_dense_layers", ctypes.c_uint32),
        ("select_per_query_head", ctypes.c_bool),
        ("grouped_attn", ctypes.c_bool),
        ("tap_queries", ctypes.c_bool),
    ]


class _Stats(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("cells_allocated", ctypes.c_uint32),
        ("cells_used", ctypes.c_uint32),
        ("tokens_seen", ctypes.c_int64),
        ("floor", ctypes.c_int64),
        ("n_evictions", ctypes.c_uint64),
        ("n_evictions_all", ctypes.c_uint64),
        ("evict_us", ctypes.c_uint64),
        ("k_bytes", ctypes.c_uint64),
        ("v_bytes", ctypes.c_uint64),
        ("kv_bytes", ctypes.c_uint64),
        ("scratch_bytes", ctypes.c_uint64),
        ("summary_bytes", ctypes.c_uint64),
        ("n_selections", ctypes.c_uint64),
        ("pages_read", ctypes.c_uint64),
        ("pages_total", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("summarize_us", ctypes.c_uint64),
        ("scores_us", ctypes.c_uint64),
        ("choice_us", ctypes.c_uint64),
        ("attn_us", ctypes.c_uint64),
        ("dense_us", ctypes.c_uint64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("il", ctypes.c_int32),
        ("n_head", ctypes.c_uint32),
        ("n_head_kv", ctypes.c_uint32),
        ("head_size_k", ctypes.c_uint32),
        ("head_size_v", ctypes.c_uint32),
        ("k_row_bytes", ctypes.c_uint64),
        ("v_row_bytes", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class CacheStats:
    """Figures of a context's KV cache; see ``llama_edgekv_stats`` for their exact meaning."""

    cells_allocated: int
    cells_used: int
    tokens_seen: int
    floor: int
    n_evictions: int
    n_evictions_all: int
    evict_us: int
    k_bytes: int
    v_bytes: int
    kv_bytes: int
    scratch_bytes: int
    summary_bytes: int
    n_selections: int
    pages_read: int
    pages_total: int
    bytes_read: int
    summarize_us: int
    scores_us: int
    choice_us: int
    attn_us: int
    dense_us: int


@dataclass(frozen=True)
class CacheLayer:
    """Shape of one layer of the cache; ``il`` is its number in the model, row bytes are per KV head and cell."""

    il: int
    n_head: int
    n_head_kv: int
    head_size_k: int
    head_size_v: int
    k_row_bytes: int
    v_row_bytes: int


_lib = llama_cpp.llama_cpp._lib


def _bind(name: str, restype, *argtypes):
    function = getattr(_lib, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_ctx_p, _i32, _i64, _u32, _u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64
_double_p = ctypes.POINTER(ctypes.c_double)
_u8_p = ctypes.POINTER(ctypes.c_uint8)

_set_next = _bind("llama_edgekv_set_next", ctypes.c_bool, ctypes.POINTER(_Params))
_last_error = _bind("llama_edgekv_last_error", ctypes.c_char_p)
_clear_error = _bind("llama_edgekv_clear_error", None)
_evict = _bind("llama_edgekv_evict", _i64, _ctx_p, _i32, _u32)
_evict_as = _bind("llama_edgekv_evict_as", _i64, _ctx_p, _i32, ctypes.POINTER(_Params), ctypes.POINTER(ctypes.c_float),
                  _u64)
_set_keep = _bind("llama_edgekv_set_keep", ctypes.c_bool, _ctx_p, _i32, _u32)
_get_stats = _bind("llama_edgekv_get_stats", ctypes.c_bool, _ctx_p, _i32, ctypes.POINTER(_Stats))
_is_swa = _bind("llama_edgekv_is_swa", ctypes.c_bool, _ctx_p, _i32)
_token_bytes = _bind("llama_edgekv_token_bytes", _u64, _ctx_p, ctypes.c_int, ctypes.c_int)
_n_layers = _bind("llama_edgekv_n_layers", _i32, _ctx_p)
_get_layer = _bind("llama_edgekv_get_layer", ctypes.c_bool, _ctx_p, _i32, ctypes.POINTER(_Layer))
_positions = _bind("llama_edgekv_positions", _i64, _ctx_p, _i32, _i32, _i32, ctypes.POINTER(_i32), _i64)
_rows = _bind("llama_edgekv_rows", _i64, _ctx_p, _i32, _i32, _i32, ctypes.c_bool, ctypes.c_void_p, _u64)
_ggml = ctypes.CDLL(str(_runtime.lib_path("ggml-base")))
_ggml.ggml_blck_size.restype = ctypes.c_int64
_ggml.ggml_type_size.restype = ctypes.c_size_t

_tap_get = _bind("llama_edgekv_tap_get", _i64, _ctx_p, _i32, _i32, _double_p, _double_p)
_tap_queries = _bind("llama_edgekv_tap_queries", _i64, _ctx_p, _i32, ctypes.POINTER(ctypes.c_float), _i64)
_tap_pages = _bind("llama_edgekv_tap_pages", _i64, _ctx_p, _i32, ctypes.POINTER(_i32), _i64)
auto_budget = _bind("llama_edgekv_auto_budget", _u32, _u32)


_GGML_LOG_LEVEL_ERROR = 4
_log: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback
def _collect_log(level: int, text: bytes, _user_data) -> None:
    if level == _GGML_LOG_LEVEL_ERROR:
        _log.append(text.decode(errors="replace").strip())


def silence() -> None:
    """Keep llama.cpp's log off the terminal; its errors are kept for :func:`log_error`."""
    _log.clear()
    llama_cpp.llama_log_set(_collect_log, ctypes.c_void_p(0))


def silence_media() -> None:
    """The same for libmtmd, which has a log of its own."""
    from llama_cpp import mtmd_cpp

    mtmd_cpp.mtmd_helper_log_set(_collect_log, ctypes.c_void_p(0))


def logged() -> list[str]:
    """The last errors that llama.cpp and libmtmd logged since :func:`silence`."""
    return list(_log)


def log_error() -> str:
    """The most telling line that llama.cpp logged since :func:`silence`, without the function's name, or ''."""
    for line in _log:
        text = line.split(": ", 1)[-1]
        if text and "failed to load model" not in text:
            return text
    return ""


def last_error() -> str:
    """The last error of this thread, or ''. Void functions of llama.cpp (seq_add, seq_cp, ...) report here only."""
    return _last_error().decode(errors="replace")


def clear_error() -> None:
    _clear_error()


def _fail(fallback: str) -> EdgekvError:
    return EdgekvError(last_error() or fallback)


def _params(settings: EvictionSettings | None, filters: QFilters | None = None) -> _Params:
    params = _Params(struct_size=ctypes.sizeof(_Params), policy=b"none")
    if settings is not None and settings.policy != "none":
        params.policy = settings.policy.encode()
        params.mode = MODES.index(settings.mode)
        params.budget, params.window, params.n_keep = settings.budget, settings.window, settings.keep
        if filters is not None:
            vectors = filters.flat()
            filter_layers = np.array(filters.layers, dtype=np.int32)
            params.filters = vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            params.n_filters = vectors.size
            params.filter_layers = filter_layers.ctypes.data_as(ctypes.POINTER(_i32))
            params.n_filter_layers = filter_layers.size
            params.owners = vectors, filter_layers  # the struct holds bare pointers
    return params


def set_next(
    settings: EvictionSettings | None,
    filters: QFilters | None = None,
    selection: SelectionSettings | None = None,
    tap_queries: bool = False,
) -> None:
    """Settings for the next context that this thread creates.

    Args:
        filters: for the policy ``qfilters``; layers that are not evicted from are ignored.

    Raises:
        EdgekvError: the settings contradict themselves.
    """
    clear_error()
    params = _params(settings, filters)
    params.tap_queries = tap_queries
    if selection is not None:
        params.select = selection.method.encode()
        params.select_budget, params.page_size = selection.budget, selection.page_size
        params.n_dense_layers, params.grouped_attn = selection.dense_layers, selection.grouped_attention
        params.select_per_query_head = selection.per_query_head
    if not _set_next(ctypes.byref(params)):
        raise _fail("the settings of the cache were refused")


def clear_next() -> None:
    _set_next(None)


def evict(ctx, seq_id: int = 0, budget: int = 0) -> int:
    """Evict one sequence now; returns the tokens that left each KV head."""
    clear_error()
    n = _evict(ctx, seq_id, budget)
    if n < 0:
        raise _fail("the eviction failed")
    return n


def evict_as(
    ctx,
    settings: EvictionSettings,
    filters: QFilters | None = None,
    scores: Sequence[np.ndarray] | None = None,
    seq_id: int = 0,
) -> int:
    """Evict one sequence now by other settings than the context's; see ``llama_edgekv_evict_as``. ``scores``: float32
    ``[n_head_kv, n_used]`` of each cache layer, for the policy ``given``. Returns the tokens that left each KV head."""
    clear_error()
    flat = None if scores is None else np.concatenate([np.asarray(s, np.float32).ravel() for s in scores])
    data = None if flat is None else flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    n = _evict_as(ctx, seq_id, ctypes.byref(_params(settings, filters)), data, 0 if flat is None else flat.size)
    if n < 0:
        raise _fail("the eviction failed")
    return n


def set_keep(ctx, n_keep: int, seq_id: int = -1) -> None:
    """Keep the first ``n_keep`` tokens of a sequence (-1: of all) from the next eviction on; copies take it along."""
    clear_error()
    if not _set_keep(ctx, seq_id, n_keep):
        raise _fail("keep was refused")


def stats(ctx, seq_id: int = -1) -> CacheStats:
    raw = _Stats(struct_size=ctypes.sizeof(_Stats))
    if not _get_stats(ctx, seq_id, ctypes.byref(raw)):
        raise _fail("no statistics")
    return CacheStats(**{name: getattr(raw, name) for name, _ in _Stats._fields_[1:]})


def layers(ctx) -> list[CacheLayer]:
    n = _n_layers(ctx)
    if n < 0:
        raise _fail("the context has no plain KV cache")
    result = []
    for i in range(n):
        raw = _Layer()
        if not _get_layer(ctx, i, ctypes.byref(raw)):
            raise _fail(f"there is no cache layer {i}")
        result.append(CacheLayer(**{name: getattr(raw, name) for name, _ in _Layer._fields_}))
    return result


@contextmanager
def _hollow_model(path: str | os.PathLike[str]):
    """A model without its weights: metadata only, nothing is allocated. EdgekvError, naming the file, if it is refused."""
    silence()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.load_mode = 0, True, llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise EdgekvError(f"{path}: cannot be loaded: {log_error() or 'llama.cpp refused it'}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def swa_layers(path: str | os.PathLike[str]) -> list[int]:
    """The layers of a model that attend to a sliding window only; reads metadata, allocates nothing.

    Raises:
        EdgekvError: naming the file, if llama.cpp refuses it.
    """
    with _hollow_model(path) as model:
        return [il for il in range(llama_cpp.llama_model_n_layer(model)) if _is_swa(model, il)]


def token_bytes(path: str | os.PathLike[str], type_k: int, type_v: int) -> int:
    """Bytes of K and V of one token in the layers of a model that are evicted from, in a cache of these ggml types; 0 if
    a row does not divide into their blocks. Reads metadata, allocates nothing.

    Raises:
        EdgekvError: naming the file, if llama.cpp refuses it.
    """
    with _hollow_model(path) as model:
        return _token_bytes(model, type_k, type_v)


def cache_layers(path: str | os.PathLike[str]) -> list[CacheLayer]:
    """The layers of a model that evictions work on; reads metadata, allocates nothing.

    Raises:
        EdgekvError: naming the file and the reason, if llama.cpp refuses the model or evictions cannot work on it.
    """
    with _hollow_model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256, 1, 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        # of all contexts only one that evicts asks whether this memory can be evicted from
        set_next(EvictionSettings("streaming", budget=8))
        ctx = llama_cpp.llama_init_from_model(model, params)
        if not ctx:
            raise EdgekvError(f"{path}: {last_error() or log_error() or 'the context could not be created'}")
        try:
            return layers(ctx)
        finally:
            llama_cpp.llama_free(ctx)


def save_state(ctx) -> np.ndarray:
    """The state of a whole context: uint8, in the format of ``ggml_ops/llama/edgekv-state.h`` (stock without eviction)."""
    clear_error()
    size = llama_cpp.llama_state_get_size(ctx)
    blob = np.empty(size, np.uint8)
    if size == 0 or llama_cpp.llama_state_get_data(ctx, blob.ctypes.data_as(_u8_p), size) != size:
        raise _fail("the state cannot be saved")
    return blob


def load_state(ctx, blob: np.ndarray) -> None:
    """Restore what :func:`save_state` gave. EdgekvError, with the cache untouched, if it does not belong here."""
    clear_error()
    blob = np.ascontiguousarray(blob, np.uint8)
    if blob.size == 0 or llama_cpp.llama_state_set_data(ctx, blob.ctypes.data_as(_u8_p), blob.size) != blob.size:
        raise _fail("the state is damaged or belongs to another context")


def positions(ctx, seq_id: int, i_layer: int, i_head_kv: int) -> np.ndarray:
    """True positions of the used cells, int32 [n_used]."""
    n = _positions(ctx, seq_id, i_layer, i_head_kv, None, 0)
    if n < 0:
        raise _fail("no positions")
    out = np.empty(n, dtype=np.int32)
    _positions(ctx, seq_id, i_layer, i_head_kv, out.ctypes.data_as(ctypes.POINTER(_i32)), n)
    return out


def rows(ctx, seq_id: int, i_layer: int, i_head_kv: int, *, values: bool) -> np.ndarray:
    """Stored bytes of K (or V) of the used cells, uint8 [n_used, row bytes]."""
    layer = layers(ctx)[i_layer]
    size = layer.v_row_bytes if values else layer.k_row_bytes
    n = stats(ctx, seq_id).cells_used
    out = np.empty((n, size), dtype=np.uint8)
    if _rows(ctx, seq_id, i_layer, i_head_kv, values, out.ctypes.data, out.nbytes) < 0:
        raise _fail("no rows")
    return out


def tap(ctx, i_layer: int, i_head: int, head_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Second moment [head_size, head_size], sum [head_size] (float64) and number of the queries of one head."""
    moment = np.empty((head_size, head_size))
    total = np.empty(head_size)
    n = _tap_get(ctx, i_layer, i_head, moment.ctypes.data_as(_double_p), total.ctypes.data_as(_double_p))
    if n < 0:
        raise _fail("no queries were tapped")
    return moment, total, n


def last_step(ctx, i_layer: int, per_query_head: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """What the last ubatch, of at most 64 tokens, did in a cache layer (``tap_queries``).

    Returns:
        The post-RoPE queries, float32 [n_tokens, n_head, head_size], and the pages chosen for them, int32 [n_tokens,
        n_head_kv, n_chosen] (ascending, then -1), None where all cells were read; [n_tokens, n_head, n_chosen] where the
        context selects ``per_query_head``.
    """
    layer = layers(ctx)[i_layer]
    found = []
    for function, kind in ((_tap_queries, ctypes.c_float), (_tap_pages, _i32)):
        n = function(ctx, i_layer, None, 0)
        if n < 0:
            raise _fail("no queries were tapped")
        out = np.empty(n, kind)
        function(ctx, i_layer, out.ctypes.data_as(ctypes.POINTER(kind)), n)
        found.append(out)
    queries = found[0].reshape(-1, layer.n_head, layer.head_size_k)
    heads = layer.n_head if per_query_head else layer.n_head_kv
    return queries, found[1].reshape(len(queries), heads, -1) if found[1].size else None


def type_block(ggml_type: int) -> tuple[int, int]:
    """Elements and bytes of one block of a ggml type."""
    return _ggml.ggml_blck_size(ggml_type), _ggml.ggml_type_size(ggml_type)


def cpu_variant() -> str:
    """The CPU backend that the loader picked, for records: its library's name, or its features."""
    try:
        with open("/proc/self/maps") as file:
            for line in file:
                if match := re.search(r"lib(ggml-cpu[\w-]*)\.so", line):
                    return match[1]
    except OSError:
        pass
    return llama_cpp.llama_print_system_info().decode()
