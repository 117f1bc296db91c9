"""`edgekv doctor`, and what the commands say about GPUs that are not used.

Most tests give the command a folder of libraries of their own: links to the real ones, and beside them a backend that
is broken, lacks its driver, finds no device, or drives a device made up here.
"""

import ctypes
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

import edgekv as package
from edgekv import _runtime
from edgekv.doctor import nvidia_facts
from process import EDGEKV, edgekv, fails, python
from tinymodel import write_tiny_model

ROOT = Path(__file__).parents[1]
OPERATORS = ["score", "key_mean", "choose", "compact", "compact_v_by_column",
             "summarize", "page_scores", "choose_pages", "attn"]
SIZES = {"f16": [64, 80, 96, 128, 256], "q8_0": [64, 96, 128, 256], "q4_0": [64, 96, 128, 256]}


def has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


no_gpu = pytest.mark.skipif(has_library("libcuda.so.1"), reason="this machine has a driver")
linux = pytest.mark.skipif(platform.system() != "Linux", reason="libraries are named and linked as on Linux")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("doctor") / "tiny.gguf", n_ctx=512)


@pytest.fixture
def folder(tmp_path):
    """The libraries, to be changed at will."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for path in _runtime.lib_dir().iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def run(folder, *arguments, **environment):
    return subprocess.run([*EDGEKV, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "EDGEKV_LIB_PATH": str(folder), **environment})


def diagnosis(folder, *arguments, status=0, **environment):
    r = run(folder, "doctor", "-o", "json", *arguments, **environment)
    assert r.returncode == status, r.stderr
    assert (r.stderr == "") == (status == 0)
    return json.loads(r.stdout), r.stderr


def file(facts, name):
    return next(file for file in facts["libraries"]["files"] if file["file"] == name)


def one_line(r):
    assert r.returncode == 1 and r.stdout == "" and r.stderr.count("\n") == 1 and r.stderr.startswith("edgekv: error: ")
    return r.stderr


# --- this machine ----------------------------------------------------------------------------------------------------


def test_facts_of_this_machine():
    facts = json.loads(edgekv("doctor", "-o", "json").stdout)
    pin = json.loads((ROOT / "patches" / "pin.json").read_text())
    assert facts["edgekv"] == package.__version__
    assert (facts["llama_cpp"]["package"], facts["llama_cpp"]["version"]) == (pin["name"], pin["version"])
    assert facts["python"] == platform.python_version() and facts["platform"]["machine"] == os.uname().machine

    folder = Path(facts["libraries"]["folder"])
    libraries = [name for name in os.listdir(folder) if Path(name).suffix in (".so", ".dylib")]
    assert sorted(f["file"] for f in facts["libraries"]["files"]) == sorted(libraries)
    assert all(f["bytes"] == (folder / f["file"]).stat().st_size for f in facts["libraries"]["files"])

    cpu = next(device for device in facts["devices"] if device["type"] == "cpu")
    assert cpu["name"] == "CPU" and cpu["evicts"] == cpu["selects"] == "yes"
    assert all(cpu["operators"][name][kind] == SIZES[kind] for name in OPERATORS for kind in cpu["operators"][name])
    assert list(cpu["operators"]["compact_v_by_column"]) == ["f16"]  # a quantised V needs flash attention


@linux
def test_facts_that_the_kernel_tells():
    facts = json.loads(edgekv("doctor", "-o", "json").stdout)
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(memory[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    cpu = next(device for device in facts["devices"] if device["type"] == "cpu")
    assert cpu["memory_total"] == total
    for free in (cpu["memory_free"], facts["cpu"]["memory_available"]):
        assert abs(free - available) < total / 4
    assert facts["cpu"]["threads"] == len(os.sched_getaffinity(0))

    mapped = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
    loaded = {f["file"] for f in facts["libraries"]["files"] if f["state"] == "loaded" and "-cpu-" in f["file"]}
    # doctor itself has opened the variants that this processor could run too
    assert loaded == {f"libggml-{facts['cpu']['variant']}.so"} and loaded <= mapped
    flags = set(Path("/proc/cpuinfo").read_text().split())
    for feature, flag in (("SSE3", "pni"), ("AVX2", "avx2"), ("FMA", "fma"), ("AVX512", "avx512f")):
        assert feature not in facts["cpu"]["features"] or flag in flags
    assert os.uname().machine != "x86_64" or "SSE3" in facts["cpu"]["features"]


def test_shape_of_the_json(model):
    """Programs read it: what is renamed breaks them."""
    facts = json.loads(edgekv("doctor", "-o", "json", "-m", model).stdout)

    def keys(value, path=""):
        if isinstance(value, dict) and path not in ("cpu.features", "devices.features", "model.eviction.devices"):
            return {name: keys(part, f"{path}.{name}".strip(".")) for name, part in value.items()}
        return keys(value[0], path) if isinstance(value, list) and value and isinstance(value[0], dict) else None

    names = lambda words: dict.fromkeys(words.split())  # noqa: E731
    types = names("f16 q8_0 q4_0")
    attached = {**names("refused layers"), "devices": {"CPU": None}}
    assert len(facts["devices"]) > 1 or keys(facts) == {
        "edgekv": None, "python": None, "advice": None,
        "llama_cpp": names("package version ggml n_patches patches_sha256"),
        "platform": names("system release machine macos"),
        "libraries": {"folder": None, "files": names("file backend bytes state reason advice expected")},
        "nvidia": {"driver": None, "gpus": keys(facts["nvidia"]["gpus"])},
        "cpu": names("variant features threads memory_available"),
        "devices": {**names("name description type backend library id memory_free memory_total compute_capability "
                            "features evicts selects"),
                    "operators": {name: names("f16") if name.endswith("column") else types for name in OPERATORS}},
        "model": {**names("model qfilters n_layer"), "eviction": {**attached, "devices": None}, "selection": attached},
    }


def test_text():
    r = edgekv("doctor")
    assert r.exit_code == 0 and r.stderr == ""
    for name in OPERATORS:
        kind = "eviction" if name in OPERATORS[:5] else "selection"
        assert [kind, name, "yes"] in [line.split() for line in r.stdout.splitlines()]
    assert f"{_runtime.lib_dir()}\n" in r.stdout and "what runs where" in r.stdout


def test_the_patches_are_named_where_the_build_has_recorded_them(folder):
    assert diagnosis(folder)[0]["llama_cpp"]["n_patches"] in (None, len(list((ROOT / "patches").glob("*.patch"))))
    stamp = folder / "edgekv-stamp.json"
    stamp.unlink(missing_ok=True)
    stamp.write_text(json.dumps({"patches": {"b.patch": "22", "a.patch": "11"}, "order": ["a.patch", "b.patch"]}))
    found = diagnosis(folder)[0]["llama_cpp"]
    want = subprocess.run(["sha256sum"], input="a.patch 11\nb.patch 22\n", capture_output=True, text=True).stdout
    assert (found["n_patches"], found["patches_sha256"]) == (2, want.split()[0])
    stamp.write_text("{")
    assert diagnosis(folder)[0]["llama_cpp"]["patches_sha256"] is None


def test_what_works_with_a_model(model, tmp_path):
    facts = json.loads(edgekv("doctor", "-m", model, "-o", "json").stdout)["model"]
    assert (facts["n_layer"], facts["qfilters"]) == (2, False)
    for what in ("eviction", "selection"):
        assert facts[what]["layers"] == [0, 1] and facts[what]["refused"] is None
        assert facts[what]["devices"]["CPU"] is True
    # every second layer has a sliding window
    pair = write_tiny_model(tmp_path / "pair.gguf", arch="gemma3", n_layer=4)
    facts = json.loads(edgekv("doctor", "-m", pair, "-o", "json").stdout)["model"]
    assert facts["eviction"]["layers"] == facts["selection"]["layers"] == [1, 3]
    fails("no such file", "doctor", "-m", tmp_path / "nope.gguf")


# --- a backend that does not load ------------------------------------------------------------------------------------


def compile_library(path, code, *flags):
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", "-o", str(path), *map(str, flags)],
                   input=code, text=True, check=True)
    return path


@pytest.fixture
def without_driver(folder, tmp_path):
    """A CUDA backend as it comes to a machine without an NVIDIA driver: the driver's library is not there."""
    driver = compile_library(tmp_path / "libcuda.so.1", "int cuInit(void) { return 0; }", "-Wl,-soname,libcuda.so.1")
    compile_library(folder / "libggml-cuda.so",
                    "int cuInit(void); void * ggml_backend_init(void) { cuInit(); return 0; }", driver)
    driver.unlink()
    return folder


NOT_USED = "edgekv: CUDA is not used: libcuda.so.1 is missing (no NVIDIA driver?); "
ON_THE_CPU = "running on the CPU - see `edgekv doctor`\n"


@no_gpu
@linux
def test_without_a_driver_doctor_says_why_and_is_content(without_driver):
    facts, _ = diagnosis(without_driver)
    cuda = file(facts, "libggml-cuda.so")
    assert (cuda["backend"], cuda["state"], cuda["expected"]) == ("cuda", "failed", True)
    assert cuda["reason"] == "libcuda.so.1 is missing (no NVIDIA driver?)" and "NVIDIA driver" in cuda["advice"]
    assert [device["name"] for device in facts["devices"]] == ["CPU"]
    assert any(line.startswith("CUDA is not used: libcuda.so.1 is missing") for line in facts["advice"])
    text = run(without_driver, "doctor").stdout
    assert "libggml-cuda.so" in text and "NOT LOADED: libcuda.so.1 is missing" in text


@no_gpu
@linux
def test_without_a_driver_the_cpu_answers_after_one_line(without_driver, model):
    arguments = ["run", model, "-p", "question", "-n", 8, "--temp", 0, "-t", 1, "--no-stats", "--kv-evict", "none"]
    plain = run(_runtime.lib_dir(), *arguments)
    assert plain.returncode == 0 and plain.stdout.strip() and plain.stderr == ""
    r = run(without_driver, *arguments)
    assert (r.returncode, r.stdout) == (0, plain.stdout)
    assert r.stderr == NOT_USED + ON_THE_CPU
    r = run(without_driver, *arguments, "-ngl", 7)
    assert (r.returncode, r.stderr) == (0, NOT_USED + "-ngl 7 has no effect, " + ON_THE_CPU)

    for command in (["chat", model], ["bench", model, "-n", 1, "-p", 0, "-r", 1, "-t", 1, "-ngl", "0,7"]):
        r = run(without_driver, *command)
        assert r.stderr.count("CUDA is not used") == 1, r.stderr
        assert ("-ngl 7 has no effect" in r.stderr) == (command[0] == "bench")
    assert run(without_driver, "inspect", model).stderr == ""
    r = subprocess.run(python("import edgekv\nfrom edgekv import _runtime\nprint(*_runtime.notices())"), text=True,
                       capture_output=True, env={**os.environ, "EDGEKV_LIB_PATH": str(without_driver)})
    assert r.stderr == "" and r.stdout == NOT_USED.removeprefix("edgekv: ") + ON_THE_CPU


@no_gpu
def test_layers_for_a_gpu_that_is_not_there(model):
    arguments = ["run", model, "-p", "question", "-n", 1, "-t", 1, "--no-stats", "--kv-evict", "none"]
    r = edgekv(*arguments, "-ngl", 3)
    assert r.exit_code == 0 and r.stderr.count("\n") == 1 and "-ngl 3 has no effect: no GPU backend" in r.stderr
    assert edgekv(*arguments).stderr == ""
    assert _runtime.notices(3, elsewhere=True) == []


@linux
def test_a_broken_gpu_backend_fails_doctor_but_not_the_cpu(folder, model):
    (folder / "libggml-vulkan.so").write_text("hello")
    facts, said = diagnosis(folder, status=1)
    assert said.startswith("edgekv: error: libggml-vulkan.so: the file is damaged") and said.count("\n") == 1
    assert file(facts, "libggml-vulkan.so")["expected"] is False
    r = run(folder, "run", model, "-p", "question", "-n", 1, "--no-stats", "--kv-evict", "none")
    assert r.returncode == 0 and r.stderr.startswith("edgekv: Vulkan is not used: the file is damaged")

    (folder / "libggml-vulkan.so").unlink()
    compile_library(folder / "libggml-vulkan.so", "int unrelated(void) { return 1; }")
    assert "is no backend of ggml" in diagnosis(folder, status=1)[1]


@linux
def test_a_broken_variant_for_other_processors_fails_doctor_too(folder, model):
    loaded = f"libggml-{diagnosis(folder)[0]['cpu']['variant']}.so"
    (folder / loaded).unlink()
    (folder / loaded).write_text("")
    facts, said = diagnosis(folder, status=1)
    assert said.startswith(f"edgekv: error: {loaded}: the file is damaged")
    assert f"libggml-{facts['cpu']['variant']}.so" != loaded
    # it is not a GPU's, and another variant computes
    assert run(folder, "run", model, "-p", "x", "-n", 1, "--no-stats", "--kv-evict", "none").stderr == ""


@linux
def test_variants_that_are_not_loaded_are_normal(folder):
    states = {"x64": "spare", "madeup": "unfit"}
    compile_library(folder / "libggml-cpu-madeup.so",
                    "int ggml_backend_score(void) { return 0; } void * ggml_backend_init(void) { return 0; }")
    facts, _ = diagnosis(folder)
    for variant, state in states.items():
        assert facts["cpu"]["variant"] == f"cpu-{variant}" or file(facts, f"libggml-cpu-{variant}.so")["state"] == state


@linux
def test_libraries_that_are_missing_or_damaged(folder, tmp_path, model):
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, *command in ((empty, "doctor"), (tmp_path / "nowhere", "doctor"), (empty, "run", model, "-p", "x")):
        line = one_line(run(place, *command))
        assert str(place) in line and "patched libraries are missing" in line and "pip install" in line

    for path in folder.glob("libggml-cpu*"):
        path.unlink()
    for command in (["doctor"], ["run", model, "-p", "x"]):
        assert f"{folder}: no backend for the CPU could be loaded (it holds none" in one_line(run(folder, *command))
    (folder / "libggml-cpu.so").write_text("hello")
    assert "(libggml-cpu.so: the file is damaged" in one_line(run(folder, "doctor"))

    for name, *command in (("libllama.so", "doctor"), ("libggml.so", "run", model, "-p", "x"),
                           ("libggml-base.so", "doctor", "-o", "json")):
        (folder / name).unlink()
        (folder / name).write_text("hello")
        assert f"{folder / name}: cannot be loaded, the file is damaged" in one_line(run(folder, *command))
    assert run(folder, "--help").returncode == 0


NO_DRIVER = "libcuda.so.1 is missing (no NVIDIA driver?)"


@pytest.mark.parametrize(("error", "driver", "reason", "expected"), [
    ("libcuda.so.1: cannot open shared object file: No such file or directory", False, NO_DRIVER, True),
    ("libcudart.so.12: cannot open shared object file: No such file or directory", False,
     "libcudart.so.12 and libcuda.so.1 are missing (no NVIDIA driver?)", True),
    ("libcublas.so.12: cannot open shared object file: No such file or directory", True,
     "libcublas.so.12 is missing", False),
    ("dlopen(/x/libggml-cuda.so, 0x0006): Library not loaded: @rpath/libfoo.2.dylib\n  Referenced from: /x", True,
     "libfoo.2.dylib is missing", False),
    ("/lib/libc.so.6: version `GLIBC_2.38' not found (required by /x/libggml-cuda.so)", True,
     "GLIBC_2.38 is needed, this system is older", False),
    ("/x/libggml-cuda.so: undefined symbol: ggml_new_thing", True,
     "it is of another version than the libraries beside it", False),
    ("/x/libggml-cuda.so: invalid ELF header", True, "the file is damaged (invalid ELF header)", False),
])
def test_reasons(monkeypatch, error, driver, reason, expected):
    monkeypatch.setattr(_runtime, "_loads", lambda name: driver)
    found = _runtime._why("cuda", error)
    assert (found[0], found[2]) == (reason, expected) and found[1]


# --- devices made up here --------------------------------------------------------------------------------------------

# The first fields of ggml's structures, as the pin has them. The device has what it says in supports_op and no memory.
BACKEND = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct tensor {
    int type; void * buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t params[16], flags; struct tensor * src[10];
} tensor;
typedef struct {
    const char * name, * description; size_t free, total; int type; const char * id; char capabilities[5];
} properties;
typedef struct { void * functions[15]; void * reg; void * context; } device;
typedef struct { int version; void * functions[4]; void * context; } registry;

void ggml_log_internal(int level, const char * format, ...);

static device   dev;
static registry reg;
static const char * reg_name(void * r) { return "CUDA"; }
static size_t reg_count(void * r) { return N_DEVICES; }
static void * reg_get(void * r, size_t i) { return &dev; }
typedef struct { const char * name, * value; } feature;
static feature * reg_features(void * r) { static feature f[] = {{ "ARCHS", "900,1000" }, { 0, 0 }}; return f; }
static void * reg_proc(void * r, const char * name) {
    return strcmp(name, "ggml_backend_get_features") == 0 ? reg_features : NULL;
}

static const char * dev_name(void * d) { return "CUDA0"; }
static const char * dev_description(void * d) { return "made up"; }
static void dev_memory(void * d, size_t * free, size_t * total) { *free = 1u << 30; *total = 3u << 30; }
static int dev_type(void * d) { return 1; }
static void dev_properties(void * d, properties * p) {
    *p = (properties) { "CUDA0", "made up", 1u << 30, 3u << 30, 1, "0000:c1:00.0", {0} };
}
static _Bool dev_supports(void * d, const tensor * op) {
    const tensor * rows = op->src[0];
    return rows->type != 2 && rows->ne[0] <= (rows->nb[0] > 34 ? 80 : 128);
}

void * ggml_backend_init(void) {
    void * functions[] = { dev_name, dev_description, dev_memory, dev_type, dev_properties, 0, 0, 0, 0, dev_supports };
    for (int i = 0; i < 10; ++i) { dev.functions[i] = functions[i]; }
    dev.reg = &reg;
    reg = (registry) { 2, { reg_name, reg_count, reg_get, reg_proc }, NULL };
    if (!N_DEVICES) { ggml_log_internal(4, "%s: failed to initialize CUDA: %s\n", "ggml_cuda_init", "none here"); }
    return &reg;
}
"""


def made_up(folder, n_devices):
    compile_library(folder / "libggml-cuda.so", BACKEND, f"-DN_DEVICES={n_devices}", folder / "libggml-base.so")


@linux
def test_a_backend_without_a_device(folder, model):
    made_up(folder, 0)
    facts, _ = diagnosis(folder)
    cuda = file(facts, "libggml-cuda.so")
    assert cuda["state"] == "idle" and cuda["expected"]
    assert cuda["reason"] == "finds no device (failed to initialize CUDA: none here)"
    r = run(folder, "run", model, "-p", "question", "-n", 1, "--no-stats", "--kv-evict", "none")
    assert r.returncode == 0 and r.stderr.count("\n") == 1
    assert r.stderr.startswith("edgekv: CUDA is not used: finds no device (failed to initialize CUDA: none here); ")
    assert "libggml-cuda.so" in (text := run(folder, "doctor").stdout) and "loaded: finds no device (failed" in text


@linux
def test_a_device_that_has_some_operators(folder, tmp_path, model):
    """It has an operator if the first source is no q4_0 and has rows of up to 128 elements, of 80 if those are not
    adjacent (no block has more than 34 bytes)."""
    made_up(folder, 1)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "00000000:C1:00.0, NVIDIA Made, Up, 550.54.15, 8.9"\n'
                    'echo "00000000:C1:00.0, NVIDIA Made Up, 550.54.15, 8.9"\n')
    tool.chmod(0o755)
    path = {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    facts, _ = diagnosis(folder, **path)
    assert file(facts, "libggml-cuda.so")["state"] == "loaded"
    cuda = next(device for device in facts["devices"] if device["name"] == "CUDA0")
    assert cuda | {"description": "made up", "type": "gpu", "backend": "CUDA", "library": "libggml-cuda.so",
                   "id": "0000:c1:00.0", "memory_free": 2**30, "memory_total": 3 * 2**30} == cuda
    assert (cuda["compute_capability"], facts["nvidia"]["gpus"][0]["name"]) == ("8.9", "NVIDIA Made Up")

    can, small = cuda["operators"], {"f16": [64, 80, 96, 128], "q8_0": [64, 96, 128]}
    assert can["score"] == can["key_mean"] == can["compact"] == {**small, "q4_0": []}
    assert can["compact_v_by_column"] == {"f16": [64, 80]}
    # their rows are the scores of 256 cells, of 16 pages, and bounds of twice the head size
    assert can["choose"] == {kind: [] for kind in SIZES} and can["choose_pages"] == SIZES
    assert can["summarize"] == {kind: [64] for kind in SIZES}
    assert can["page_scores"] == can["attn"] == {**small, "q4_0": [64, 96, 128]}
    assert (cuda["evicts"], cuda["selects"]) == ("partly", "partly")

    found = subprocess.run(python("from edgekv.memory import gpu_bytes; print(gpu_bytes())"), capture_output=True, text=True,
                           env={**os.environ, "EDGEKV_LIB_PATH": str(folder)})
    assert int(found.stdout) == 2**30, found.stderr

    advice = " ".join(facts["advice"])
    assert "-ngl 99 puts all layers and their KV cache on CUDA0" in advice and "-ngl has no effect" not in advice
    assert "CUDA0 has compute capability 8.9, its library was compiled for 9.0 and newer" in advice
    assert "CUDA0 does not have every operator" in advice and "eviction or selection is refused" in advice

    table = run(folder, "doctor", **path).stdout.splitlines()
    rows = {words[1]: words[2] for line in table
            if (words := line.split(maxsplit=2)) and words[0] in ("eviction", "selection")}
    assert rows["score"].split("  ")[0] == "f16 (64, 80, 96, 128), q8_0 (64, 96, 128)" and rows["score"].endswith("yes")
    assert rows["choose"].split() == ["no", "yes"] and rows["choose_pages"].split() == ["yes", "yes"]


@linux
@pytest.mark.skipif(not (_runtime.lib_dir() / "libggml-rpc.so").exists(), reason="this build has no RPC")
def test_a_server_is_looked_at_only_when_asked_for(folder, model):
    assert all(device["type"] != "remote" for device in json.loads(edgekv("doctor", "-o", "json").stdout)["devices"])
    server = subprocess.Popen([*EDGEKV, "rpc-server", "-p", "0", "-t", "1"], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)
    try:
        address = server.stderr.readline().split(" at ")[1].split(";")[0]
        facts, _ = diagnosis(folder, "--rpc", address, "-m", model)
        made_up(folder, 1)
        names = [device["name"] for device in diagnosis(folder, "--rpc", address)[0]["devices"]]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
    assert names.count("CUDA0") == names.count("CPU") == 1  # a GPU of this machine is not a server's
    (remote,) = (device for device in facts["devices"] if device["type"] == "remote")
    # it offers its CPU, of the same build
    cpu = next(device for device in facts["devices"] if device["type"] == "cpu")
    assert remote["description"] == address and remote["operators"] == cpu["operators"]
    assert facts["model"]["eviction"]["devices"] == {"CPU": True, remote["name"]: True}
    assert any(line.startswith("--rpc puts all layers") for line in facts["advice"])
    gone = one_line(run(folder, "doctor", "--rpc", address))
    assert f"RPC server {address}: nobody listens there" in gone


# --- the driver ------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(("script", "gpus"), [
    ("exit 9", []), ("echo a, b, c, d; exit 9", []), ("echo garbage", []), ("printf '\\377\\n'", []),
    ("echo '00000000:C1:00.0, Old, [N/A], [N/A]'",
     [{"bus": "0000:c1:00.0", "name": "Old", "compute_capability": None}]),
])
def test_nvidia_smi_that_does_not_help(tmp_path, monkeypatch, script, gpus):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert nvidia_facts()["gpus"] == gpus


@linux
def test_a_gpu_that_this_build_does_not_use(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "00000000:C1:00.0, NVIDIA Made Up, 550.54.15, 8.9"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    if (_runtime.lib_dir() / "libggml-cuda.so").exists():
        pytest.skip("this build has CUDA")
    advice = json.loads(edgekv("doctor", "-o", "json").stdout)["advice"]
    assert any("NVIDIA Made Up is here" in line and "-DGGML_CUDA=on" in line for line in advice)


def test_graphics_in_the_processor_take_layers_only_alone(monkeypatch):
    """As llama.cpp chooses: a CPU, a GPU, graphics of the processor, an accelerator."""
    ggml = _runtime.Ggml()
    kinds = {10: 0, 11: 1, 12: 2, 13: 3}
    monkeypatch.setattr(ggml, "device_type", kinds.get)
    for devices, gpus in ([10, 12, 11, 13], [11]), ([10, 12], [12]), ([10, 13], []):
        monkeypatch.setattr(ggml, "devices", lambda devices=devices: devices)
        assert ggml.gpus() == gpus
