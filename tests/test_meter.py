"""What a process takes of memory: the host against the kernel's own account, GPUs against made-up drivers."""

import ctypes
import json
import math
import mmap
import os
import subprocess
import sys
import threading
import time
import types

import pytest

import edgekv  # noqa: F401  loads the backends
from edgekv import _runtime, meter
from edgekv.meter import DeviceMeter, Trace, peak_rss_bytes, rss_bytes
from process import python
from test_doctor import folder, linux, made_up  # noqa: F401

MIB = 1 << 20
CONTEXT = 300 * MIB  # what CUDA takes for itself


# --- the host --------------------------------------------------------------------------------------------------------


def resident():
    """As the system says it."""
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) * 1024
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


def touched(n):
    block = mmap.mmap(-1, n)
    for at in range(0, n, mmap.PAGESIZE):
        block[at] = 1
    return block


def test_what_is_resident_and_the_peak():
    assert rss_bytes() == pytest.approx(resident(), abs=2 * MIB)
    before = rss_bytes()
    assert peak_rss_bytes() >= before - MIB
    with touched(64 * MIB):
        within = rss_bytes()
        assert within - before == pytest.approx(64 * MIB, abs=4 * MIB)
        assert within == pytest.approx(resident(), abs=2 * MIB)
        assert peak_rss_bytes() >= within - MIB
    assert rss_bytes() == pytest.approx(before, abs=4 * MIB)
    assert peak_rss_bytes() >= within - MIB


def test_what_is_only_reserved_is_not_resident():
    before = rss_bytes()
    with mmap.mmap(-1, 64 * MIB):
        assert rss_bytes() - before < 4 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_has_its_own():
    """No file of the parent is read: the child has 64 MiB more than the parent. In a process without threads."""
    code = ("import mmap, os\nfrom edgekv.meter import rss_bytes\nbefore = rss_bytes()\npid = os.fork()\n"
            "if pid: raise SystemExit(os.waitpid(pid, 0)[1] != 0)\n"
            "block = mmap.mmap(-1, 64 << 20)\nfor at in range(0, len(block), mmap.PAGESIZE): block[at] = 1\n"
            "os._exit(not rss_bytes() - before > 32 << 20)")
    assert subprocess.run(python(code)).returncode == 0


def test_the_structure_of_macos():
    assert ctypes.sizeof(meter._TaskInfo) == 48 and meter._TaskInfo.resident_size.offset == 8


# --- ggml's structure ------------------------------------------------------------------------------------------------


def test_properties_are_what_ggml_says_one_by_one():
    ggml = _runtime.Ggml()
    text, pointer = ctypes.c_char_p, ctypes.c_void_p
    name = ggml.bind("ggml_backend_dev_name", text, pointer)
    description = ggml.bind("ggml_backend_dev_description", text, pointer)
    for device in ggml.devices():
        found = ggml.properties(device)
        assert found.name == name(device) and found.description == description(device) and found.name
        assert found.type == ggml.device_type(device)
        assert found.memory_total == ggml.memory(device)[1]
    cpu = next(ggml.properties(device) for device in ggml.devices() if ggml.device_type(device) == 0)
    assert cpu.name == b"CPU" and cpu.device_id is None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cpu.memory_total == pytest.approx(memory, rel=0.01) and 0 < cpu.memory_free <= cpu.memory_total
    # computes in the machine's own memory: buffers from pointers, and mapped files
    assert list(cpu.capabilities) == [False, False, True, False, True]


def test_properties_are_as_large_as_ggml_makes_them():
    """It clears them first: exactly so many bytes change."""
    ggml = _runtime.Ggml()
    room = (ctypes.c_ubyte * 256)(*[0xab] * 256)
    ggml._properties(ggml.devices()[0], ctypes.cast(room, ctypes.POINTER(_runtime.DeviceProperties)))
    size = ctypes.sizeof(_runtime.DeviceProperties)
    assert set(room[size:]) == {0xab} and room[size - 1] == 0


# --- made-up GPUs ----------------------------------------------------------------------------------------------------


class Gpu:
    """A GPU with other programs on it. Asked by ggml for anything but its name, CUDA takes memory for itself."""

    def __init__(self, id="0000:01:00.0", registry="CUDA", kind=1, used=100 * MIB, total=8192 * MIB):
        self.id, self.registry, self.kind, self.others, self.total = id, registry, kind, used, total
        self.own, self.awake = 0, False

    @property
    def used(self):
        return self.others + self.own

    def asked(self):
        if not self.awake and self.registry == "CUDA":
            self.own += CONTEXT
        self.awake = True


class FakeGgml:
    def __init__(self, gpus):
        self._gpus = gpus

    def gpus(self):
        return list(range(len(self._gpus)))

    def registry_of(self, device):
        return device

    def registry_name(self, registry):
        return self._gpus[registry].registry

    def properties(self, device):
        gpu = self._gpus[device]
        gpu.asked()
        return types.SimpleNamespace(type=gpu.kind, device_id=gpu.id and gpu.id.encode())

    def memory(self, device):
        gpu = self._gpus[device]
        gpu.asked()
        return (gpu.total - gpu.used, gpu.total) if gpu.total else (0, 0)


class FakeNvml(types.ModuleType):
    """nvidia-ml-py with GPUs at these addresses, in the driver's order, which is not CUDA's."""

    class NVMLError(Exception):
        pass

    class NVMLError_FunctionNotFound(NVMLError):
        pass

    def __init__(self, gpus, *, pid=None, tells=True, memory=True, without=(), init=True):
        super().__init__("pynvml")
        self.gpus, self.tells, self.memory, self.without, self.init = list(gpus.items()), tells, memory, without, init
        self.pid = os.getpid() if pid is None else pid
        self.lost = set()

    def nvmlInit(self):
        if not self.init:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, i):
        if i in self.lost:
            raise self.NVMLError("lost")
        return i

    def nvmlDeviceGetPciInfo(self, i):
        return types.SimpleNamespace(busId=self.gpus[i][0])

    def nvmlDeviceGetMemoryInfo(self, i):
        if not self.memory or i in self.lost:
            raise self.NVMLError("not supported")
        return types.SimpleNamespace(used=self.gpus[i][1].used)

    def _processes(self, version, i):
        if version in self.without:
            raise self.NVMLError_FunctionNotFound("not found")
        if i in self.lost:
            raise self.NVMLError("lost")
        gpu = self.gpus[i][1]
        found = [types.SimpleNamespace(pid=999_999_999, usedGpuMemory=gpu.others)]
        if gpu.own:
            found.append(types.SimpleNamespace(pid=self.pid, usedGpuMemory=gpu.own if self.tells else None))
        return found

    def nvmlDeviceGetComputeRunningProcesses_v2(self, i):
        return self._processes(2, i)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, i):
        return self._processes(3, i)


@pytest.fixture
def machine(monkeypatch):
    """Makes a meter on a machine with these GPUs and this nvidia-ml-py, None for none."""
    def make(*gpus, nvml=None):
        monkeypatch.setattr(meter, "Ggml", lambda: FakeGgml(gpus))
        monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: ImportError
        return DeviceMeter()
    return make


def test_the_driver_lists_this_process(machine):
    gpu, idle = Gpu("0000:c1:00.0"), Gpu("0000:02:00.0", used=5 * MIB)
    m = machine(gpu, nvml=FakeNvml({"00000000:02:00.0": idle, "00000000:C1:00.0": gpu}))
    assert m.source == "nvml, this process" and m.peak is None
    assert m.now() == CONTEXT
    gpu.own += 1000 * MIB
    gpu.others += 500 * MIB  # somebody else's
    idle.others += MIB
    assert m.now() == m.peak == CONTEXT + 1000 * MIB
    gpu.own -= 600 * MIB
    assert m.now() == CONTEXT + 400 * MIB and m.peak == CONTEXT + 1000 * MIB


@pytest.mark.parametrize("how", [{"pid": 1}, {"tells": False}, {"without": (2, 3)}])
def test_the_driver_does_not_tell_of_this_process(machine, how):
    gpu = Gpu()
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}, **how))
    assert m.source == "nvml, device"
    assert m.now() == CONTEXT  # taken when ggml was first asked, after the meter had looked
    gpu.own += 1000 * MIB
    assert m.now() == CONTEXT + 1000 * MIB
    gpu.others = gpu.own = 0
    assert m.now() == 0 and m.peak == CONTEXT + 1000 * MIB


@pytest.mark.parametrize("without", [(2,), (3,)])
def test_drivers_with_one_version_of_the_list(machine, without):
    gpu = Gpu()
    assert machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}, without=without)).source == "nvml, this process"


def test_a_package_without_the_lists(machine, monkeypatch):
    gpu = Gpu()
    for version in 2, 3:
        monkeypatch.delattr(FakeNvml, f"nvmlDeviceGetComputeRunningProcesses_v{version}")
    assert machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu})).source == "nvml, device"


def test_several_gpus(machine):
    one, two = Gpu("0000:01:00.0"), Gpu("0000:02:00.0")
    nvml = FakeNvml({"00000000:02:00.0": two, "00000000:01:00.0": one})
    m = machine(one, two, nvml=nvml)
    one.own += 10 * MIB
    two.own += 20 * MIB
    assert m.source == "nvml, this process" and m.now() == 2 * CONTEXT + 30 * MIB
    two.own = 0  # is listed on one of them only
    assert m.now() == CONTEXT + 10 * MIB

    one, two = Gpu("0000:01:00.0"), Gpu("0000:02:00.0")
    m = machine(one, two, nvml=FakeNvml({"00000000:02:00.0": two, "00000000:01:00.0": one}, pid=1))
    one.own += 10 * MIB
    two.others -= 50 * MIB
    one.others += 5 * MIB
    assert m.source == "nvml, device" and m.now() == CONTEXT + 15 * MIB + CONTEXT - 50 * MIB


@pytest.mark.parametrize(("ggml", "driver", "same"), [
    ("0000:01:00.0", "00000000:01:00.0", True),
    ("0000:01:00.0", b"0000:01:00.0", True),
    ("0000:c1:00.0", "00000000:C1:00.0", True),
    ("0000:C1:00.0", "00000000:c1:00.0", True),
    ("0001:01:00.0", "00000000:01:00.0", False),
    ("10000:01:00.0", "00010000:01:00.0", True),
    ("10000:01:00.0", "00000000:01:00.0", False),
    ("0000:01:00.0", "00000000:11:00.0", False),
    ("0000:01:00.0", "00000000:01:01.0", False),
    ("GPU-1234", "00000000:01:00.0", False),
    (None, "00000000:01:00.0", False),
    (None, "what?", False),
])
def test_addresses(machine, ggml, driver, same):
    gpu = Gpu(ggml)
    m = machine(gpu, nvml=FakeNvml({driver: gpu}))
    assert m.source == ("nvml, this process" if same else "ggml")
    gpu.own += 7 * MIB
    assert m.now() == 7 * MIB + CONTEXT * same


def test_virtual_devices_are_one_gpu(machine):
    gpu = Gpu("0000:c1:00.0")
    halves = [Gpu(f"0000:c1:00.0-v{i}", total=4096 * MIB) for i in range(2)]
    for half in halves:
        half.asked = gpu.asked
    m = machine(*halves, nvml=FakeNvml({"00000000:C1:00.0": gpu}))
    assert m.source == "nvml, this process"
    gpu.own += 10 * MIB
    assert m.now() == CONTEXT + 10 * MIB
    # ggml says of each its half
    m = machine(*halves)
    for half in halves:
        half.own += 5 * MIB
    assert m.source == "ggml" and m.now() == 10 * MIB


@pytest.mark.parametrize("nvml", [None, FakeNvml({}, init=False), FakeNvml({})])
def test_cuda_without_the_driver(machine, nvml):
    one, two = Gpu("0000:01:00.0"), Gpu("0000:02:00.0")
    m = machine(one, two, nvml=nvml)
    assert m.source == "ggml" and m.now() == 0
    one.own += 10 * MIB
    two.own += 20 * MIB
    assert m.now() == m.peak == 30 * MIB


def test_a_gpu_that_the_driver_does_not_know_of(machine):
    """Then all are asked in one way: figures of two kinds are not added."""
    one, two = Gpu("0000:01:00.0"), Gpu("0000:02:00.0")
    m = machine(one, two, nvml=FakeNvml({"00000000:01:00.0": one}))
    two.own += 20 * MIB
    assert m.source == "ggml" and m.now() == 20 * MIB


def test_a_gpu_that_shares_the_memory_of_the_machine(machine):
    """The driver has no figure for the device there; with the process it is as elsewhere, without it ggml is asked."""
    gpu = Gpu(kind=2)
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}, memory=False))
    assert m.source == "nvml, this process" and m.now() == CONTEXT
    gpu = Gpu(kind=2)
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}, memory=False, pid=1))
    gpu.own += 9 * MIB
    assert m.source == "ggml" and m.now() == 9 * MIB


def test_metal_is_of_this_process_from_the_beginning(machine):
    gpu = Gpu(None, "MTL", used=0)
    gpu.own = 3 * MIB
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": Gpu()}))
    assert m.source == "ggml" and m.now() == 3 * MIB
    gpu.own += 5 * MIB
    assert m.now() == 8 * MIB
    # its virtual devices are all the same
    assert machine(gpu, gpu).now() == 8 * MIB


def test_one_gpu_under_several_backends_counts_once(machine):
    gpu = Gpu(registry="CUDA")
    again = Gpu(registry="Vulkan")
    nvml = FakeNvml({"00000000:01:00.0": gpu})
    m = machine(gpu, again, nvml=nvml)
    gpu.own, again.own = gpu.own + 10 * MIB, 10 * MIB
    assert m.source == "ggml" and m.now() == 10 * MIB
    m = machine(Gpu(None, "Vulkan", kind=2), graphics := Gpu("0000:03:00.0", "ROCm", kind=2))
    graphics.own += MIB
    assert m.now() == 0


def test_devices_of_servers_are_not_this_machine(machine):
    m = machine(Gpu(None, "RPC"))
    assert m.source is m.now() is m.peak is None
    gpu = Gpu()
    m = machine(Gpu(None, "RPC"), gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}))
    assert m.source == "nvml, this process" and m.now() == CONTEXT


@pytest.mark.parametrize("nvml", [None, FakeNvml({"00000000:01:00.0": Gpu()})])
def test_no_gpu(machine, nvml):
    m = machine(nvml=nvml)
    with m.sampling(0.001):
        assert m.source is m.now() is m.peak is None


def test_no_libraries(monkeypatch):
    def fail():
        raise OSError("no libggml")
    monkeypatch.setattr(meter, "Ggml", fail)
    assert DeviceMeter().now() is None


def test_a_gpu_that_goes_or_does_not_tell(machine):
    gpu = Gpu()
    nvml = FakeNvml({"00000000:01:00.0": gpu})
    m = machine(gpu, nvml=nvml)
    assert m.now() == CONTEXT
    nvml.lost = {0}
    assert m.now() is None and m.peak == CONTEXT

    gpu = Gpu()
    nvml = FakeNvml({"00000000:01:00.0": gpu}, pid=1)
    m = machine(gpu, nvml=nvml)
    nvml.lost = {0}
    assert m.source == "nvml, device" and m.now() is None

    silent = Gpu(None, "Vulkan", total=0)
    assert machine(silent).now() is None
    silent.total = 8192 * MIB
    m = machine(silent)
    silent.total = 0
    assert m.now() is None


def test_a_lost_gpu_that_ggml_does_not_use(machine):
    gpu = Gpu()
    nvml = FakeNvml({"00000000:09:00.0": Gpu(), "00000000:01:00.0": gpu})
    nvml.lost = {0}
    m = machine(gpu, nvml=nvml)
    assert m.source == "nvml, this process" and m.now() == CONTEXT


def test_sampling_sees_what_comes_and_goes_and_ends(machine):
    gpu = Gpu()
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}))
    threads = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt), m.sampling(0.001):
        sampler, = set(threading.enumerate()) - threads
        assert sampler.daemon and m.peak == CONTEXT
        gpu.own += 500 * MIB
        deadline = time.monotonic() + 30
        while m.peak == CONTEXT and time.monotonic() < deadline:
            time.sleep(0.001)
        gpu.own -= 500 * MIB
        raise KeyboardInterrupt
    assert not sampler.is_alive() and m.peak == CONTEXT + 500 * MIB and m.now() == CONTEXT


def test_sampling_looks_at_the_end(machine):
    gpu = Gpu()
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}))
    with m.sampling(3600):  # and does not wait for the period
        gpu.own += MIB
    assert m.peak == CONTEXT + MIB


def test_the_peak_is_never_below_now(machine):
    gpu = Gpu()
    m = machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu}))
    with m.sampling(1e-5):
        for i in range(300):
            gpu.own = (i * 7919 % 101) * MIB
            now = m.now()
            assert now is None or m.peak >= now  # it is not listed where it has nothing


@linux
def test_through_the_real_registry(folder, tmp_path):  # noqa: F811
    """A CUDA backend made up in C (3 GiB, 1 GiB free) and a package made up beside it, in a process of its own."""
    made_up(folder, 1)
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "pynvml.py").write_text(f"""
import os
from types import SimpleNamespace as S
class NVMLError(Exception): pass
class NVMLError_FunctionNotFound(NVMLError): pass
def nvmlInit():
    if "NO_DRIVER" in os.environ: raise NVMLError
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlDeviceGetPciInfo(i): return S(busId=["00000000:01:00.0", "00000000:C1:00.0"][i])
def nvmlDeviceGetMemoryInfo(i): return S(used=2 << 30)
def nvmlDeviceGetComputeRunningProcesses_v2(i): return [S(pid=os.getpid(), usedGpuMemory=[{MIB}, {5 * MIB}][i])]
""")
    code = (f"sys.path.insert(0, {str(packages)!r})\nimport json, edgekv\nfrom edgekv.meter import DeviceMeter\n"
            "m = DeviceMeter()\nggml = edgekv._runtime.Ggml()\n"
            "print(json.dumps([m.source, m.now(), m.peak, *ggml.memory(ggml.gpus()[0])]))")
    for environment, source, used in ({}, "nvml, this process", 5 * MIB), ({"NO_DRIVER": "1"}, "ggml", 0):
        r = subprocess.run(python(code), capture_output=True, text=True,
                           env={**os.environ, "EDGEKV_LIB_PATH": str(folder), **environment})
        assert r.returncode == 0, r.stderr
        assert json.loads(r.stdout) == [source, used, used, 1024 * MIB, 3072 * MIB]


# --- over time -------------------------------------------------------------------------------------------------------


def test_trace(machine):
    gpu = Gpu()
    trace = Trace(machine(gpu, nvml=FakeNvml({"00000000:01:00.0": gpu})))
    trace.sample("prompt", 512, 256)
    gpu.own += MIB
    with touched(64 * MIB):
        trace.sample("decode", 513, 257)
    first, second = trace.rows()
    assert list(first) == ["seconds", "label", "tokens", "cells", "rss_bytes", "device_bytes"]
    assert [(row["label"], row["tokens"], row["cells"], row["device_bytes"]) for row in (first, second)] == [
        ("prompt", 512, 256, CONTEXT), ("decode", 513, 257, CONTEXT + MIB)]
    assert 0 <= first["seconds"] <= second["seconds"] < 60
    assert second["rss_bytes"] - first["rss_bytes"] == pytest.approx(64 * MIB, abs=4 * MIB)
    assert json.loads(json.dumps([first, second])) == [first, second]
    assert all(type(row[name]) is int for row in (first, second) for name in ("tokens", "cells", "rss_bytes"))


def test_a_trace_without_a_gpu(machine):
    for trace in Trace(), Trace(machine()):
        assert trace.rows() == []
        trace.sample("prompt", 2**40, 0)
        row, = trace.rows()
        assert row["tokens"] == 2**40 and row["device_bytes"] is None and not math.isnan(row["seconds"])


def test_a_sample_costs_less_than_50_microseconds():
    trace, best = Trace(DeviceMeter()), math.inf
    if trace._meter.source:
        pytest.skip("this machine has a GPU")
    for _ in range(50):  # the least disturbed of them
        start = time.perf_counter()
        for _ in range(20):
            trace.sample("decode", 1, 1)
        best = min(best, (time.perf_counter() - start) / 20)
    assert best < 50e-6
