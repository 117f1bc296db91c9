"""Graphs of a few operators on the CPU backend of the patched libraries, or on an emulated device, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np

from edgekv import _runtime

_i32, _i64, _size, _p = ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p

_base = ctypes.CDLL(str(_runtime.lib_path("ggml-base")))
_ggml = ctypes.CDLL(str(_runtime.lib_path("ggml")))

# the values of enum ggml_type
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "i32": 26, "i64": 27, "bf16": 30}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _size), ("mem_buffer", _p), ("no_alloc", ctypes.c_bool)]


def _bind(library, name: str, restype, *argtypes):
    function = getattr(library, name)
    function.restype, function.argtypes = restype, argtypes
    return function


_init = _bind(_base, "ggml_init", _p, _InitParams)
_free = _bind(_base, "ggml_free", None, _p)
_tensor_overhead = _bind(_base, "ggml_tensor_overhead", _size)
_graph_overhead = _bind(_base, "ggml_graph_overhead", _size)
_new_tensor = _bind(_base, "ggml_new_tensor", _p, _p, _i32, _i32, ctypes.POINTER(_i64))
_view_3d = _bind(_base, "ggml_view_3d", _p, _p, _p, _i64, _i64, _i64, _size, _size, _size)
_view_4d = _bind(_base, "ggml_view_4d", _p, _p, _p, _i64, _i64, _i64, _i64, _size, _size, _size, _size)
_permute = _bind(_base, "ggml_permute", _p, _p, _p, _i32, _i32, _i32, _i32)
_nbytes = _bind(_base, "ggml_nbytes", _size, _p)
_blck_size = _bind(_base, "ggml_blck_size", _i64, _i32)
_type_size = _bind(_base, "ggml_type_size", _size, _i32)
_new_graph = _bind(_base, "ggml_new_graph", _p, _p)
_expand = _bind(_base, "ggml_build_forward_expand", None, _p, _p)
_alloc = _bind(_base, "ggml_backend_alloc_ctx_tensors", _p, _p, _p)
_buffer_free = _bind(_base, "ggml_backend_buffer_free", None, _p)
_buffer_base = _bind(_base, "ggml_backend_buffer_get_base", _p, _p)
_buffer_size = _bind(_base, "ggml_backend_buffer_get_size", _size, _p)
_set = _bind(_base, "ggml_backend_tensor_set", None, _p, _p, _size, _size)
_get = _bind(_base, "ggml_backend_tensor_get", None, _p, _p, _size, _size)
_compute = _bind(_base, "ggml_backend_graph_compute", _i32, _p, _p)
_backend_device = _bind(_base, "ggml_backend_get_device", _p, _p)
_supports = _bind(_base, "ggml_backend_supports_op", ctypes.c_bool, _p, _p)
_device_reg = _bind(_base, "ggml_backend_dev_backend_reg", _p, _p)
_proc_address = _bind(_base, "ggml_backend_reg_get_proc_address", _p, _p, ctypes.c_char_p)
_init_by_type = _bind(_ggml, "ggml_backend_init_by_type", _p, _i32, ctypes.c_char_p)

_CONSTRUCTORS = {
    "score": _bind(_base, "ggml_edgekv_score", _p, _p, _p, _p, _i32, ctypes.c_float),
    "key_mean": _bind(_base, "ggml_edgekv_key_mean", _p, _p, _p),
    "choose": _bind(_base, "ggml_edgekv_choose", _p, _p, _p, _i64, _i64, _i64, _i64),
    "compact": _bind(_base, "ggml_edgekv_compact", _p, _p, _p, _p),
    "summarize": _bind(_base, "ggml_edgekv_summarize", _p, _p, _p, _p, _p, _i64),
    "page_scores": _bind(_base, "ggml_edgekv_page_scores", _p, _p, _p, _p),
    "choose_pages": _bind(_base, "ggml_edgekv_choose_pages", _p, _p, _p, _p, _i64, _i64, _i64),
    "attn": _bind(_base, "ggml_edgekv_attn", _p, _p, _p, _p, _p, _p, _p, _p, _i64, ctypes.c_float, ctypes.c_float),
}

_set_counters = _bind(_base, "ggml_edgekv_set_counters", None, _p, _p)

_backend = _init_by_type(0, None)  # GGML_BACKEND_DEVICE_TYPE_CPU
assert _backend, "the CPU backend cannot be loaded"
# the function itself lives in the variant that was loaded
_set_n_threads = ctypes.CFUNCTYPE(None, _p, ctypes.c_int)(
    _proc_address(_device_reg(_backend_device(_backend)), b"ggml_backend_set_n_threads"))


def row_bytes(kind: str, n: int) -> int:
    """Bytes of n adjacent elements."""
    block = _blck_size(TYPES[kind])
    assert n % block == 0
    return n // block * _type_size(TYPES[kind])


_device = None


@contextlib.contextmanager
def on(device):
    """Graphs made inside run on a :class:`kernels.Device`."""
    global _device
    before, _device = _device, device
    try:
        yield
    finally:
        _device = before


class Graph:
    """Tensors first, then operators, then one :meth:`compute`. A tensor is an opaque handle.

    It runs on the CPU, or on the device of :func:`on`.
    """

    def __init__(self, n_tensors: int = 64, n_graphs: int = 1):
        self._device = _device
        size = n_tensors * _tensor_overhead() + n_graphs * _graph_overhead()
        self._ctx = _init(_InitParams(size, None, True))
        self._buffer = None
        self._data: list[tuple[int, np.ndarray]] = []

    def tensor(self, kind: str, shape: tuple[int, ...], data: np.ndarray) -> int:
        """A contiguous tensor; ``shape`` fastest first, ``data`` its bytes in any NumPy form."""
        handle = _new_tensor(self._ctx, TYPES[kind], len(shape), (_i64 * len(shape))(*shape))
        data = np.ascontiguousarray(data)
        assert _nbytes(handle) == data.nbytes
        self._data.append((handle, data))
        return handle

    def view(self, tensor: int, shape: tuple[int, int, int], nb1: int, nb2: int, offset: int = 0) -> int:
        return _view_3d(self._ctx, tensor, *shape, nb1, nb2, offset)

    def view_4d(self, tensor: int, shape: tuple[int, int, int, int], nb1: int, nb2: int, nb3: int, offset: int = 0) -> int:
        return _view_4d(self._ctx, tensor, *shape, nb1, nb2, nb3, offset)

    def permute(self, tensor: int, *axes: int) -> int:
        return _permute(self._ctx, tensor, *axes)

    def op(self, name: str, *arguments) -> int:
        return _CONSTRUCTORS[name](self._ctx, *arguments)

    def count(self, node: int, counters: int) -> None:
        _set_counters(node, counters)

    def graph(self, *nodes: int) -> int:
        graph = _new_graph(self._ctx)
        for node in nodes:
            assert self.supports(node)
            _expand(graph, node)
        return graph

    def supports(self, node: int) -> bool:
        return self._device.supports(node) if self._device else _supports(_backend, node)

    def allocate(self, *, huge_pages: bool = False) -> None:
        """Room for all tensors, filled with their data. ``huge_pages``: if the system has them, as selection asks for."""
        self._buffer = self._device.allocate(self._ctx) if self._device else _alloc(self._ctx, _backend)
        if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            page, base, size = mmap.PAGESIZE, _buffer_base(self._buffer), _buffer_size(self._buffer)
            begin, end = -(-base // page) * page, (base + size) // page * page
            ctypes.CDLL(None).madvise(_p(begin), _size(end - begin), mmap.MADV_HUGEPAGE)
        for handle, data in self._data:
            _set(handle, data.ctypes.data, 0, data.nbytes)

    def run(self, graph: int, n_threads: int = 1) -> None:
        if self._device:
            self._device.run(self._buffer, graph)
            return
        _set_n_threads(_backend, n_threads)
        assert _compute(_backend, graph) == 0

    def compute(self, *nodes: int, n_threads: int = 1) -> None:
        graph = self.graph(*nodes)
        self.allocate()
        self.run(graph, n_threads)

    def read(self, tensor: int, dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A contiguous tensor as an array, ``shape`` slowest first."""
        out = np.empty(shape, dtype)
        assert _nbytes(tensor) == out.nbytes
        _get(tensor, out.ctypes.data, 0, out.nbytes)
        return out

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_exc) -> None:
        if self._buffer:
            (self._device.free if self._device else _buffer_free)(self._buffer)
        _free(self._ctx)
