"""What this process takes of memory, on the host and on its GPUs: now, at its peak, and over time."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import re
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgekv._runtime import Ggml


# --- the host --------------------------------------------------------------------------------------------------------


def rss_bytes() -> int:
    """The memory this process has resident now, the mapped part of the model's file included.

    Linux and macOS; OSError elsewhere. Linux counts on each processor by itself and adds up now and then: the figure
    can be some pages per processor off.
    """
    if sys.platform == "darwin":
        return _rss_of_task()
    # opened each time: a file that was kept open would tell of the parent after a fork
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 128).split()[1]) * mmap.PAGESIZE
    finally:
        os.close(file)


def peak_rss_bytes() -> int:
    """The most memory this process had resident so far, the mapped part of the model's file included."""
    try:
        # ru_maxrss of a new process begins with its parent's on Linux
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _TaskInfo(ctypes.Structure):
    """``mach_task_basic_info``. The footprint that macOS also has leaves mapped files out, and the peak does not."""

    _fields_ = [("virtual_size", ctypes.c_uint64), ("resident_size", ctypes.c_uint64),
                ("resident_size_max", ctypes.c_uint64), ("times", ctypes.c_int32 * 4), ("policy", ctypes.c_int32),
                ("suspend_count", ctypes.c_int32)]


@functools.cache
def _mach() -> tuple[ctypes.CDLL, ctypes.c_uint]:
    library = ctypes.CDLL(None)
    return library, ctypes.c_uint.in_dll(library, "mach_task_self_")


def _rss_of_task() -> int:
    library, task = _mach()
    info, count = _TaskInfo(), ctypes.c_uint(ctypes.sizeof(_TaskInfo) // 4)
    code = library.task_info(task, 20, ctypes.byref(info), ctypes.byref(count))  # MACH_TASK_BASIC_INFO
    if code != 0:
        raise OSError(f"task_info returned {code}")
    return info.resident_size


# --- GPUs ------------------------------------------------------------------------------------------------------------

_RPC, _CUDA, _METAL = "RPC", "CUDA", "MTL"  # ggml's names of registries
_IGPU = 2  # GGML_BACKEND_DEVICE_TYPE_IGPU


class DeviceMeter:
    """The memory that this process has on the GPUs that ``-ngl`` puts layers on. Make it before the model is loaded.

    A GPU that several backends show, or that is split into virtual devices, counts once; devices of ``--rpc`` servers
    do not count. Where the GPU has no memory of its own (Apple, graphics in a processor, Jetson), what it has is part
    of the machine's memory: do not add it to :func:`rss_bytes`, which may count the same bytes.

    Attributes:
        source: where the figures come from, None where there is no GPU.

            - ``nvml, this process``: NVIDIA's driver says what this process has, with what CUDA takes for itself.
              Needs the extra ``cuda``.
            - ``nvml, device``: the driver does not list this process (a container that numbers its processes by
              itself), or not with its bytes (Windows): what is in use on the whole GPU less what was when the meter
              was made. Other programs on that GPU count.
            - ``ggml``: on Metal what this process has allocated, exact until that is more than the GPU can take, which
              is then the figure. On others the growth of what is in use since the meter was made, of the whole GPU, or
              of the whole machine where the GPU shares its memory. Without what CUDA takes for itself. A Vulkan driver
              that does not tell its use makes it 0.
    """

    source: str | None = None

    def __init__(self) -> None:
        self._peak: int | None = None
        self._lock = threading.Lock()
        self._read = lambda: None
        try:
            ggml = Ggml()
        except OSError:  # no libraries, no GPU
            return
        names = {device: ggml.registry_name(ggml.registry_of(device)) for device in ggml.gpus()}
        names = {device: name for device, name in names.items() if not name.startswith(_RPC)}
        # made before ggml is asked for more: that alone makes CUDA take some hundred MiB, which are this process' too
        nvml = _Nvml.open() if names and set(names.values()) == {_CUDA} else None
        gpus = _distinct(ggml, names)
        if not gpus:
            return
        if nvml and nvml.choose([id for _, id in gpus]):
            if nvml.of_process() is not None:
                self.source, self._read = "nvml, this process", nvml.of_process
                return
            if nvml.growth() is not None:
                self.source, self._read = "nvml, device", nvml.growth
                return
        self.source, self._read = "ggml", _Growth(ggml, {device: names[device] for device, _ in gpus})

    def now(self) -> int | None:
        """Bytes on all GPUs together; None where there is no GPU, or one does not tell."""
        used = self._read()
        if used is not None:
            with self._lock:
                self._peak = used if self._peak is None else max(self._peak, used)
        return used

    @property
    def peak(self) -> int | None:
        """The largest :meth:`now` so far, None before the first. What comes and goes between two of them is missed."""
        return self._peak

    @contextmanager
    def sampling(self, period: float = 0.05) -> Iterator[None]:
        """Call :meth:`now` at the beginning, every ``period`` seconds in a thread, and at the end."""
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(period):
                self.now()

        if self.source is None:
            yield
            return
        self.now()
        thread = threading.Thread(target=sample, name="edgekv-device-meter", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.now()


def _distinct(ggml: Ggml, names: dict[int, str]) -> list[tuple[int, str | None]]:
    """Devices and their ids, each piece of memory once."""
    found: dict[Any, tuple[int, str | None]] = {}
    for device, name in names.items():
        properties = ggml.properties(device)
        id = properties.device_id and properties.device_id.decode()
        # all of Metal's devices are the same one, each with the memory of all; as llama.cpp does, graphics of a
        # processor are taken once, whoever shows them
        key = _IGPU if properties.type == _IGPU else _METAL if name == _METAL else id or device
        found.setdefault(key, (device, id))
    return list(found.values())


class _Growth:
    """What is in use on devices, as ggml says it, since this was made."""

    def __init__(self, ggml: Ggml, names: dict[int, str]):
        self._ggml = ggml
        # Metal tells of this process alone
        self._before = {device: 0 if name == _METAL else self._used(device) for device, name in names.items()}

    def _used(self, device: int) -> int | None:
        free, total = self._ggml.memory(device)
        return total - free if total else None

    def __call__(self) -> int | None:
        return _growth((self._used(device), before) for device, before in self._before.items())


def _growth(figures) -> int | None:
    """The sum of what is used more now than before, None if a figure is missing."""
    figures = list(figures)
    if any(now is None or before is None for now, before in figures):
        return None
    return sum(max(now - before, 0) for now, before in figures)


class _Nvml:
    """GPUs as NVIDIA's driver sees them, through nvidia-ml-py; what they had in use when this was made."""

    def __init__(self, library):
        self._library, self._error = library, library.NVMLError
        self._handles, self._before, self._chosen = {}, {}, []
        library.nvmlInit()
        for i in range(library.nvmlDeviceGetCount()):
            try:
                handle = library.nvmlDeviceGetHandleByIndex(i)
                address = _pci_address(library.nvmlDeviceGetPciInfo(handle).busId)
            except self._error:  # lost, or not for this user
                continue
            self._handles[address], self._before[address] = handle, self._used(handle)

    @classmethod
    def open(cls) -> _Nvml | None:
        """None without the extra, or without a driver that works."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            return cls(pynvml)
        except pynvml.NVMLError:
            return None

    def choose(self, ids: list[str | None]) -> bool:
        """Read these of ggml's devices from now on; whether the driver knows all of them."""
        self._chosen = list(dict.fromkeys(id and _pci_address(id) for id in ids))
        return all(address and address in self._handles for address in self._chosen)

    def of_process(self) -> int | None:
        """Bytes of this process; None if the driver lists it on no GPU, or without its bytes."""
        pid = os.getpid()
        try:
            # where one GPU lists it, it has nothing on those that do not
            found = [process.usedGpuMemory for address in self._chosen
                     for process in self._processes(self._handles[address]) if process.pid == pid]
        except self._error:
            return None
        return None if not found or None in found else sum(found)

    def growth(self) -> int | None:
        """Bytes in use by whomever, less those when this was made; None if a driver does not tell."""
        return _growth((self._used(self._handles[address]), self._before[address]) for address in self._chosen)

    def _processes(self, handle) -> list:
        # drivers 535.43 to 535.86 have a v3 with other entries than every package since expects
        for version in ("_v2", "_v3"):
            try:
                return getattr(self._library, "nvmlDeviceGetComputeRunningProcesses" + version)(handle)
            except (AttributeError, self._library.NVMLError_FunctionNotFound):  # an old package, a driver without it
                continue
        return []

    def _used(self, handle) -> int | None:
        try:
            return self._library.nvmlDeviceGetMemoryInfo(handle).used
        except self._error:  # GPUs that share the machine's memory
            return None


def _pci_address(id: str | bytes) -> tuple[int, ...] | None:
    """Domain, bus, device and function of ``0000:c1:00.0``; the driver writes ``00000000:C1:00.0``, and ggml appends
    ``-v1`` to virtual devices. None for what is no such address."""
    text = id.decode(errors="replace") if isinstance(id, bytes) else id
    parts = re.match(r"([0-9a-f]+):([0-9a-f]+):([0-9a-f]+)\.([0-9a-f]+)(?:-v\d+)?$", text, re.IGNORECASE)
    return parts and tuple(int(part, 16) for part in parts.groups())


# --- over time -------------------------------------------------------------------------------------------------------


class Trace:
    """Memory over time, sampled by the one who computes.

    A sample takes microseconds and 48 bytes without a GPU; with one the driver is asked, which takes longer.
    """

    def __init__(self, meter: DeviceMeter | None = None):
        self._meter = meter
        self._labels: list[str] = []
        self._figures = array("d")  # five to a sample; small, as they are in the memory that they tell of
        self._start = time.perf_counter()

    def sample(self, label: str, tokens: int, cells: int) -> None:
        """Note the memory now.

        Args:
            label: what is being done: ``prompt``, ``decode``.
            tokens: in the context.
            cells: of the cache that are used.
        """
        device = self._meter.now() if self._meter else None
        self._figures.extend((time.perf_counter() - self._start, tokens, cells, rss_bytes(),
                              math.nan if device is None else device))
        self._labels.append(label)

    def rows(self) -> list[dict[str, Any]]:
        """The samples in order: ``seconds`` since the trace was made, ``label``, ``tokens``, ``cells``, ``rss_bytes``
        and ``device_bytes``, which is None without a GPU."""
        names = ("tokens", "cells", "rss_bytes", "device_bytes")
        rows = []
        for i, label in enumerate(self._labels):
            seconds, *figures = self._figures[5 * i:5 * i + 5]
            rows.append({"seconds": seconds, "label": label}
                        | {name: None if math.isnan(x) else int(x) for name, x in zip(names, figures)})
        return rows
