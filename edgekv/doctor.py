"""What of this machine edgekv uses: libraries, devices, which operator runs where, and why something is not used.

The backends are asked themselves: every operator of ``ggml_ops/include/ggml-edgekv.h`` is built as a tensor, without
memory, and each device says whether it supports it. The same question decides when a context is created.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from edgekv import _runtime
from edgekv.memory import available_bytes

HEAD_SIZES = (64, 80, 96, 128, 256)
CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # name -> enum ggml_type
_F32, _F16, _I32, _I64 = 0, 1, 26, 27
_BLOCK = 32  # elements of a block of the quantised types

EVICTION = ("score", "key_mean", "choose", "compact", "compact_v_by_column")
SELECTION = ("summarize", "page_scores", "choose_pages", "attn")

DEVICE_TYPES = ("cpu", "gpu", "integrated gpu", "accelerator", "several")  # enum ggml_backend_dev_type
_CPU, _ACCELERATOR, _REMOTE = "cpu", "accelerator", "remote"
_TAKE_LAYERS = ("gpu", "integrated gpu", _REMOTE)

# written by the build beside the libraries: the pin and the hashes of the patches
STAMP = "edgekv-stamp.json"


def diagnose(model: str | os.PathLike[str] | None = None, rpc: str | None = None) -> dict[str, Any]:
    """Everything that ``edgekv doctor`` says, as plain values; sizes in bytes, None for what is not known.

    Args:
        model: a GGUF file, to be told what works with it.
        rpc: servers, ``HOST:PORT,...``, to look at as well.

    Raises:
        EdgekvError: the libraries are missing or damaged, no backend for the CPU loads, or the model or a server is
            refused.
    """
    from edgekv import __version__

    _runtime.check()
    ggml = _Ggml()
    handles = ggml.devices() + (_of_servers(rpc, ggml) if rpc else [])
    nvidia = nvidia_facts()
    devices = [_device(ggml, device, nvidia) for device in handles]
    backends = _runtime.backends()
    return {
        "edgekv": __version__,
        "llama_cpp": _source(ggml),
        "python": platform.python_version(),
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine(),
                     "macos": platform.mac_ver()[0] or None},
        "libraries": {"folder": str(_runtime.lib_dir()), "files": _files(backends)},
        "nvidia": nvidia,
        "cpu": _cpu(ggml, backends),
        "devices": devices,
        "advice": _advice(devices, backends, nvidia),
        "model": None if model is None else _model(model, ggml, handles),
    }


def failures(facts: dict[str, Any]) -> list[str]:
    """Lines about libraries that should have loaded on this machine and did not."""
    return [f"{file['file']}: {file['reason']}: {file['advice']}" for file in facts["libraries"]["files"]
            if file["state"] == "failed" and not file["expected"]]


# --- libraries and machine -------------------------------------------------------------------------------------------


def _source(ggml: _Ggml) -> dict[str, Any]:
    found = {"package": "llama-cpp-python", "version": _runtime.BINDINGS_VERSION, "ggml": ggml.version(),
             "n_patches": None, "patches_sha256": None}
    try:
        stamp = json.loads((_runtime.lib_dir() / STAMP).read_text())
        patches = [f"{name} {stamp['patches'][name]}\n" for name in stamp["order"]]
    except (OSError, ValueError, KeyError, TypeError):
        return found
    found["n_patches"] = len(patches)
    found["patches_sha256"] = hashlib.sha256("".join(patches).encode()).hexdigest()
    return found


def _files(backends: list[_runtime.Backend]) -> list[dict[str, Any]]:
    known = {backend.path: backend for backend in backends}
    files = []
    for path in sorted(_runtime.lib_dir().iterdir()):
        backend = known.get(path)
        if backend is None and path.suffix not in (".so", ".dylib", ".dll"):
            continue
        files.append({
            "file": path.name,
            "backend": backend and backend.name,
            "bytes": path.stat().st_size if path.exists() else None,
            "state": backend.state if backend else "library",
            "reason": backend and backend.reason or None,
            "advice": backend and backend.advice or None,
            "expected": not backend or backend.expected,
        })
    return files


def nvidia_facts() -> dict[str, Any]:
    """The NVIDIA driver's version and what nvidia-smi says of the GPUs; None and nothing without them."""
    found: dict[str, Any] = {"driver": None, "gpus": []}
    try:
        with open("/proc/driver/nvidia/version") as file:
            version = re.search(r"\d+\.\d+(?:\.\d+)?", file.readline())
            found["driver"] = version and version[0]
    except OSError:
        pass
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return found
    columns = ("pci.bus_id", "name", "driver_version", "compute_cap")
    try:
        said = subprocess.run([tool, f"--query-gpu={','.join(columns)}", "--format=csv,noheader"], timeout=20,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return found
    rows = csv.reader(said.stdout.splitlines(), skipinitialspace=True) if said.returncode == 0 else []
    for row in rows:
        if len(row) == len(columns):
            bus, name, driver, capability = row
            if not re.fullmatch(r"\d+\.\d+", capability):
                capability = None  # "[N/A]"
            found["gpus"].append({"bus": bus.lower()[-12:], "name": name, "compute_capability": capability})
            found["driver"] = found["driver"] or driver
    return found


def _cpu(ggml: _Ggml, backends: list[_runtime.Backend]) -> dict[str, Any]:
    from edgekv.session import default_threads

    device = next(device for device in ggml.devices() if DEVICE_TYPES[ggml.device_type(device)] == _CPU)
    variant = [backend.name for backend in backends if backend.family == "cpu" and backend.state == "loaded"]
    return {
        "variant": variant[0] if variant else None,
        "features": ggml.features(ggml.registry_of(device)),
        "threads": default_threads(),
        "memory_available": available_bytes(),
    }


# --- devices ---------------------------------------------------------------------------------------------------------


class _Ggml(_runtime.Ggml):
    """Devices, and operators as tensors without memory."""

    def __init__(self):
        super().__init__()
        i32, i64, size, pointer, text = (ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p,
                                         ctypes.c_char_p)
        number = ctypes.c_float
        bind = self.bind
        self._version = bind("ggml_version", text)
        self._supports = bind("ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
        self._proc_address = bind("ggml_backend_reg_get_proc_address", pointer, pointer, text)
        self._init = bind("ggml_init", pointer, _InitParams)
        self._free = bind("ggml_free", None, pointer)
        self._overhead = bind("ggml_tensor_overhead", size)
        self._new_tensor = bind("ggml_new_tensor", pointer, pointer, i32, i32, ctypes.POINTER(i64))
        self._permute = bind("ggml_permute", pointer, pointer, pointer, i32, i32, i32, i32)
        self._score = bind("ggml_edgekv_score", pointer, pointer, pointer, pointer, i32, number)
        self._key_mean = bind("ggml_edgekv_key_mean", pointer, pointer, pointer)
        self._choose = bind("ggml_edgekv_choose", pointer, pointer, pointer, i64, i64, i64, i64)
        self._compact = bind("ggml_edgekv_compact", pointer, pointer, pointer, pointer)
        self._summarize = bind("ggml_edgekv_summarize", pointer, pointer, pointer, pointer, pointer, i64)
        self._page_scores = bind("ggml_edgekv_page_scores", pointer, pointer, pointer, pointer)
        self._choose_pages = bind("ggml_edgekv_choose_pages", pointer, pointer, pointer, pointer, i64, i64, i64)
        self._attn = bind("ggml_edgekv_attn", pointer, pointer, pointer, pointer, pointer, pointer, pointer, pointer,
                          i64, number, number)

    def version(self) -> str:
        return self._version().decode()

    def features(self, registry: int) -> dict[str, str]:
        """What a backend says of itself: instruction sets, compiled architectures."""
        address = self._proc_address(registry, b"ggml_backend_get_features")
        if not address:
            return {}
        feature = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registry)
        found = {}
        while feature[len(found)].name:
            entry = feature[len(found)]
            found[entry.name.decode()] = entry.value.decode()
        return found

    def supports(self, device: int, **shape: Any) -> dict[str, bool]:
        """Which operators a device can compute with a cache of this shape, see :meth:`_operators`."""
        supports, registry = self._supports, self.registry_of(device)
        if self.registry_name(registry).startswith("RPC"):
            # a client claims to support whatever it is asked; ours can ask the server
            address = self._proc_address(registry, b"ggml_backend_rpc_supports_op")
            supports = address and ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)(address)
        with self._operators(**shape) as operators:
            return {name: bool(supports) and all(supports(device, tensor) for tensor in tensors)
                    for name, tensors in operators.items()}

    @contextmanager
    def _operators(self, *, type_k: str, type_v: str, size_k: int, size_v: int, n_head: int,
                   n_head_kv: int) -> Iterator[dict[str, list[int]]]:
        """Every operator, in all the ways that evictions and selection use it, for a cache of these types, head sizes
        and numbers of heads. ``compact_v_by_column`` moves V as it is stored without flash attention."""
        n_cells, page_size = 256, 16
        ctx = self._init(_InitParams(64 * self._overhead(), None, True))
        try:
            def tensor(kind: int, *shape: int) -> int:
                return self._new_tensor(ctx, kind, len(shape), (ctypes.c_int64 * len(shape))(*shape))

            k, v = (tensor(CACHE_TYPES[kind], size, n_head_kv, n_cells)
                    for kind, size in ((type_k, size_k), (type_v, size_v)))
            vector = tensor(_F32, size_k, n_head_kv)
            chosen = tensor(_I32, n_cells // 2, n_head_kv)
            dot, norm, cos = range(3)
            operators = {
                "score": [self._score(ctx, k, None if kind == norm else vector, kind, 1.0)
                          for kind in (dot, norm, cos)],
                "key_mean": [self._key_mean(ctx, k)],
                "choose": [self._choose(ctx, tensor(_F32, n_cells, n_head_kv), n_head_kv, 4, 16, n_cells // 2)],
                "compact": [self._compact(ctx, k, chosen), self._compact(ctx, v, chosen)],
            }
            if type_v == "f16":
                by_column = self._permute(ctx, tensor(_F16, n_cells, size_v, n_head_kv), 2, 0, 1, 3)
                operators["compact_v_by_column"] = [self._compact(ctx, by_column, chosen)]
            q = tensor(_F32, size_k, 1, n_head)
            mask = tensor(_F16, n_cells, 1)
            summaries = tensor(_F16, 2 * size_k, n_head_kv, n_cells // page_size)
            scores = self._page_scores(ctx, q, summaries)
            pages = self._choose_pages(ctx, scores, mask, page_size, 1, 4)
            operators |= {
                "summarize": [self._summarize(ctx, summaries, k, cells, page_size)
                              for cells in (tensor(_I64, 1), None)],
                "page_scores": [scores],
                "choose_pages": [pages],
                "attn": [self._attn(ctx, q, k, v, mask, read, None, page_size, 1.0, 0.0) for read in (pages, None)],
            }
            yield operators
        finally:
            self._free(ctx)


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _Feature(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


def _device(ggml: _Ggml, device: int, nvidia: dict[str, Any]) -> dict[str, Any]:
    p, registry = ggml.properties(device), ggml.registry_of(device)
    backend = ggml.registry_name(registry)
    kind = _REMOTE if backend.startswith("RPC") else DEVICE_TYPES[p.type]  # it calls all of a server's devices GPUs
    library = ggml.library_of(registry)
    bus = p.device_id and p.device_id.decode().lower()
    gpu = next((gpu for gpu in nvidia["gpus"] if bus and gpu["bus"] == bus[-12:]), None)
    operators = operator_table(ggml, device)
    return {
        "name": p.name.decode(),
        "description": p.description.decode(errors="replace").strip(),
        "type": kind,
        "backend": backend,
        "library": library and library.name,
        "id": bus,
        # of the machine's own memory ggml calls all free
        "memory_free": available_bytes() if kind == _CPU else p.memory_free or None,
        "memory_total": p.memory_total or None,
        "compute_capability": gpu and gpu["compute_capability"],
        "features": ggml.features(registry),
        "operators": operators,
        "evicts": _able(operators[name] for name in EVICTION),
        "selects": _able(operators[name] for name in SELECTION),
    }


def operator_table(ggml: _Ggml, device: int) -> dict[str, dict[str, list[int]]]:
    """Operator -> cache type -> the head sizes that the device can compute, for 8 heads on 2 KV heads."""
    table: dict[str, dict[str, list[int]]] = {}
    for kind in CACHE_TYPES:
        for size in _sizes(kind):
            able = ggml.supports(device, type_k=kind, type_v=kind, size_k=size, size_v=size, n_head=8, n_head_kv=2)
            for name, yes in able.items():
                sizes = table.setdefault(name, {}).setdefault(kind, [])
                sizes += [size] * yes
    return {name: table[name] for name in (*EVICTION, *SELECTION)}


def _sizes(kind: str) -> list[int]:
    """The head sizes that a cache of this type can have."""
    return [size for size in HEAD_SIZES if kind == "f16" or size % _BLOCK == 0]


def _able(entries: Iterable[dict[str, list[int]]]) -> str:
    """``yes`` if a device can all of these operators, ``no`` if nothing of any, else ``partly``."""
    said = {cell(by_type) for by_type in entries}
    return said.pop() if said in ({"yes"}, {"no"}) else "partly"


def cell(by_type: dict[str, list[int]]) -> str:
    """An operator's entry in the table: ``yes``, ``no``, or what it can: ``f16, q8_0 (64, 128)``."""
    if not any(by_type.values()):
        return "no"
    if all(sizes == _sizes(kind) for kind, sizes in by_type.items()):
        return "yes"
    return ", ".join(kind if sizes == _sizes(kind) else f"{kind} ({', '.join(map(str, sizes))})"
                     for kind, sizes in by_type.items() if sizes)


def _of_servers(servers: str, ggml: _Ggml) -> list[int]:
    """The devices of rpc-server processes, which are of this build. EdgekvError, naming the one that cannot be used."""
    from edgekv import rpc

    own = ggml.devices()
    return [device for device in rpc.devices(servers) if device and device not in own]


# --- what to do ------------------------------------------------------------------------------------------------------


def _advice(devices: list[dict[str, Any]], backends: list[_runtime.Backend], nvidia: dict[str, Any]) -> list[str]:
    lines = []
    for backend in backends:
        if backend.state in ("failed", "idle"):
            lines.append(f"{backend.label} is not used: {backend.reason}; {backend.advice}")
    takers = [device for device in devices if device["type"] in _TAKE_LAYERS]
    if nvidia["driver"] and not any(backend.family == "cuda" for backend in backends):
        name = nvidia["gpus"][0]["name"] if nvidia["gpus"] else "an NVIDIA driver"
        lines.append(f"{name} is here, but this edgekv was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=on pip install .")
    for device in takers:
        name = device["name"]
        flag = "--rpc" if device["type"] == _REMOTE else "-ngl 99"
        lines.append(f"{flag} puts all layers and their KV cache on {name}; where its memory does not suffice, -ngl N "
                     "the last N")
        lacking = [what for what, key in (("eviction", "evicts"), ("selection", "selects")) if device[key] != "yes"]
        if lacking:
            lines.append(f"{name} does not have every operator, see the table: where one is needed that is not there, "
                         f"{' or '.join(lacking)} is refused when the context is created; keep the KV cache on the CPU "
                         "(offload_kqv=False in Python, or -ngl 0)")
        oldest = _oldest_architecture(device["features"])
        if oldest and device["compute_capability"] and float(device["compute_capability"]) < oldest:
            lines.append(f"{name} has compute capability {device['compute_capability']}, its library was compiled for "
                         f"{oldest} and newer: its kernels cannot run there; build edgekv on this machine")
    if not takers:
        lines.append("everything runs on the CPU: -ngl has no effect here")
    return lines


def _oldest_architecture(features: dict[str, str]) -> float | None:
    """The least compute capability that a CUDA library was compiled for: its ARCHS are ``750,860``."""
    numbers = [int(word) for word in features.get("ARCHS", "").split(",") if word.strip().isdigit()]
    return min(numbers) / 100 if numbers else None


def _model(path: str | os.PathLike[str], ggml: _Ggml, devices: list[int]) -> dict[str, Any]:
    """Whether a model can be evicted and selected from, and on which devices with an f16 cache."""
    from edgekv.filters import read
    from edgekv.gguf_file import GGUF
    from edgekv.settings import EvictionSettings, SelectionSettings

    gguf = GGUF(path)
    facts: dict[str, Any] = {"model": os.fspath(path), "qfilters": read(gguf) is not None, "n_layer": gguf.n_layer}
    for what, settings, operators in (("eviction", (EvictionSettings("streaming", budget=8), None), EVICTION),
                                      ("selection", (None, SelectionSettings.resolve("quest")), SELECTION)):
        layers, refused = _attach(path, *settings)
        shapes = sorted({(layer.head_size_k, layer.head_size_v, layer.n_head, layer.n_head_kv) for layer in layers})
        able = {}
        for device in devices:
            p = ggml.properties(device)
            if shapes and DEVICE_TYPES[p.type] != _ACCELERATOR:  # those hold no cache
                tables = [ggml.supports(device, type_k="f16", type_v="f16", size_k=k, size_v=v, n_head=n,
                                        n_head_kv=n_kv) for k, v, n, n_kv in shapes]
                able[p.name.decode()] = all(table[name] for table in tables for name in operators)
        facts[what] = {"refused": refused, "layers": [layer.il for layer in layers], "devices": able}
    return facts


def _attach(path: str | os.PathLike[str], eviction, selection) -> tuple[list, str | None]:
    """The cache's layers of a context with these settings, opened without weights, or why it is refused. EdgekvError,
    naming the file, if llama.cpp refuses the model itself."""
    from edgekv import native

    import llama_cpp

    with native._hollow_model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 256, 1, 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        native.set_next(eviction, None, selection)
        ctx = llama_cpp.llama_init_from_model(model, params)
        if not ctx:
            return [], native.last_error() or native.log_error() or "the context could not be created"
        try:
            return native.layers(ctx), None
        finally:
            llama_cpp.llama_free(ctx)
