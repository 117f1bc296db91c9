"""Builds the GPU kernels for the emulated devices of tests/gpu, and finds out which compilers are here."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgekv import _runtime

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "ggml_ops"
EMULATOR = ROOT / "tests" / "gpu"
CACHE = ROOT / "build" / "kernels"
BACKENDS = ("cuda", "metal")
# As strict as the contracts: no fused products that the source does not ask for. The many instances of the kernels
# compile four times as fast without most optimizations; the emulator's few lines get all.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-Wno-attributes", "-Wno-unknown-pragmas"]
KERNELS, REST = ["-Og", "-fsanitize=alignment,bounds,shift"], ["-O2"]


def compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def headers() -> Path:
    """The folder ``include`` of the patched ggml: of any build of the same patches, else of a tree made for it."""
    spec = importlib.util.spec_from_file_location("llama_source", ROOT / "tools" / "llama_source.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    pin, patches = source.read_pin(), {patch.name: source.sha256(patch) for patch in source.series()}
    for tree in sorted((ROOT / "build").glob("*/llama.cpp")):
        stamp = source.read_stamp(tree)
        if stamp and (stamp["pin"], stamp["patches"]) == (pin, patches):
            return tree / "ggml" / "include"
    source.prepare(CACHE / "llama.cpp")
    return CACHE / "llama.cpp" / "ggml" / "include"


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def metal_kernels(source: str) -> str:
    """The preprocessed Metal source as C++: without attributes, which name buffers that go by their order here, and with
    a table of the kernels by their names."""
    names = re.findall(r"\bgpu_kernel\s+void\s+(\w+)", source)
    table = "".join(f'\nstatic const bool entry_{name} = gpu::add_entry("{name}", {name});' for name in names)
    return re.sub(r"\[\[.*?\]\]|\bgpu_kernel\b", "", source) + table + "\n"


def compiled(command: list[str], source: Path) -> Path:
    """The object of a source file; made anew only if what the preprocessor gives has changed."""
    text = run([*command, "-E", "-x", "c++", str(source)])
    if source.suffix == ".metal":
        text = metal_kernels(text)
    flags = [part for part in command if not part.startswith("-I")]
    digest = hashlib.sha256(repr([flags, re.sub(r"(?m)^#.*\n", "", text)]).encode()).hexdigest()[:24]
    target = CACHE / f"{source.stem}-{digest}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            preprocessed, made = Path(temporary, "source.ii"), Path(temporary, "source.o")
            preprocessed.write_text(text)
            run([*command, "-c", str(preprocessed), "-o", str(made)])
            os.replace(made, target)
    return target


def build(backend: str, ops: Path = OPS) -> Path:
    """The library of a backend from the kernels in a folder like ggml_ops.

    Raises:
        subprocess.CalledProcessError: it does not compile; ``stderr`` says why.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    base = _runtime.lib_path("ggml-base")
    folders = [EMULATOR / backend, ops, *(ops / name for name in ("include", "gpu", backend)), headers()]
    command = [compiler(), *FLAGS, *(f"-I{folder}" for folder in folders)]
    units = [(REST, EMULATOR / "block.cpp"), (REST, EMULATOR / "tensors.cpp"),
             (KERNELS, EMULATOR / backend / "device.cpp")]
    if backend == "metal":
        units.append((KERNELS, ops / "metal" / "edgekv.metal"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(lambda unit: compiled([*command, *unit[0]], unit[1]), units)]

    library = CACHE / f"{backend}-{hashlib.sha256(repr([objects, base]).encode()).hexdigest()[:24]}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        run([compiler(), "-shared", *objects, str(base), f"-Wl,-rpath,{base.parent}", "-o", str(made)])
        os.replace(made, library)
    for old in sorted([*CACHE.glob("*.so"), *CACHE.glob("*.o")], key=lambda path: path.stat().st_mtime)[:-64]:
        old.unlink()
    return library


def address_spaces(ops: Path = OPS) -> list[str]:
    """What clang says about the Metal source as C++ for OpenCL: wrong and missing address spaces, words of the language as
    names.

    Raises:
        ImportError: there is no libclang.
    """
    from clang import cindex

    source = ops / "metal" / "edgekv.metal"
    text = re.sub(r"\[\[.*?\]\]", "", source.read_text())
    command = ["-x", "cl", "-cl-std=clc++2021", "-target", "spir64", "-Wno-everything", "-ferror-limit=0",
               f"-I{EMULATOR / 'spaces'}", f"-I{source.parent}"]
    # without the space that all others fit into, a pointer of the wrong one is an error; but then no struct has a copy
    # constructor either, which Metal's have
    not_metal = "no matching constructor for initialization of 'ek_"
    features = ("generic_address_space", "program_scope_global_variables", "device_enqueue", "pipes")
    strict = [*command, "-Xclang", "-cl-ext=" + ",".join(f"-__opencl_c_{name}" for name in features)]

    def place(of) -> str:
        return f"{Path(str(of.location.file)).name}:{of.location.line}"

    found = set()
    for arguments in (strict, command):
        unit = cindex.Index.create().parse(str(source), arguments, [(str(source), text)])
        for what in unit.diagnostics:
            if what.severity >= cindex.Diagnostic.Error and not_metal not in what.spelling:
                found.add(f"{place(what)}: {what.spelling}")
    # with it, a pointer that names none has it
    pointers = (cindex.CursorKind.PARM_DECL, cindex.CursorKind.VAR_DECL, cindex.CursorKind.FIELD_DECL,
                cindex.CursorKind.CSTYLE_CAST_EXPR)
    for node in unit.cursor.walk_preorder():
        if node.kind in pointers and "__generic" in node.type.spelling:
            found.add(f"{place(node)}: no address space: {node.type.spelling}")
    return sorted(found)


@dataclass(frozen=True)
class Planted:
    """An error for the kernels: the first ``right`` after ``anchor``, which is there once, becomes ``wrong``."""

    file: str  # below ggml_ops
    anchor: str
    right: str
    wrong: str

    def plant(self, ops: Path, number: int | None = None) -> None:
        """Write it into a copy of ggml_ops. With a ``number`` it shows only when ``gpu::planted`` is that, so that many
        errors need one build; both texts are then expressions, or statements.

        Raises:
            AssertionError: the source does not have it.
        """
        source = (ops / self.file).read_text()
        assert source.count(self.anchor) == 1, f"{self.file} has {source.count(self.anchor)} times: {self.anchor}"
        at = source.find(self.right, source.index(self.anchor))
        assert at >= 0, f"{self.file} has no {self.right} after {self.anchor}"
        if number is None:
            both = self.wrong
        elif self.right.endswith(";"):
            both = f"if (gpu::planted == {number}) {{ {self.wrong} }} else {{ {self.right} }}"
        else:
            both = f"(gpu::planted == {number} ? ({self.wrong}) : ({self.right}))"
        (ops / self.file).write_text(source[:at] + both + source[at + len(self.right) :])


def plant(backend: str, errors: list[Planted], folder: Path) -> Device:
    """A device of the kernels with errors, none of which shows yet; ``plant(n)`` shows the n-th, from 1 on."""
    shutil.copytree(OPS, folder)
    for number, error in enumerate(errors, 1):
        error.plant(folder, number)
    return Device(backend, folder)


class EmulationError(AssertionError):
    """What the emulator refuses: threads that do not meet, memory that is not theirs, limits of the device."""


class Device:
    """One backend's kernels on the emulated device, for :class:`ggml.Graph`.

    Each graph is run with the next of the caps on the size of blocks and seeds of the order of blocks, warps and lanes
    (0: forward, 1: backward, others: shuffled) below, unless ``how`` says otherwise.
    """

    RUNS = [(1024, 2), (64, 0), (32, 1), (256, 3), (1024, 0), (128, 1), (64, 4), (1024, 1), (32, 5), (96, 6), (256, 0)]

    def __init__(self, backend: str, ops: Path = OPS):
        self.backend = backend
        self._library = ctypes.CDLL(str(build(backend, ops)))
        for name, restype, *argtypes in (
            ("gpu_allocate", ctypes.c_void_p, ctypes.c_void_p),
            ("gpu_free", None, ctypes.c_void_p),
            ("gpu_supports", ctypes.c_bool, ctypes.c_void_p),
            ("gpu_compute", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32),
            ("gpu_plant", None, ctypes.c_int),
            ("gpu_float_to_half", ctypes.c_uint16, ctypes.c_float),
            ("gpu_half_to_float", ctypes.c_float, ctypes.c_uint16),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = restype, argtypes
            setattr(self, name.removeprefix("gpu_"), function)
        self._runs = itertools.cycle(self.RUNS)
        self.how: tuple[int, int] | None = None

    def run(self, memory: int, graph: int) -> None:
        threads, seed = self.how or next(self._runs)
        if what := self.compute(memory, graph, seed, threads):
            raise EmulationError(f"{self.backend}, blocks of at most {threads} threads, seed {seed}: {what.decode()}")


def nvcc_command(target: Path) -> list[str]:
    """Compiles the CUDA kernels for all devices that are supported, with the flags of the build."""
    devices = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (75, 86, 89, 90, 120)]
    return [shutil.which("nvcc"), "-std=c++17", "-use_fast_math", "-ftz=false", "-prec-div=true", "-prec-sqrt=true",
            "-extended-lambda", "-Werror=all-warnings", "--threads=2", *devices, f"-I{OPS / 'include'}",
            f"-I{headers()}", "-c", str(OPS / "cuda" / "ggml-edgekv-cuda.cu"), "-o", str(target)]


@functools.cache
def device(backend: str) -> Device:
    """The device of the kernels as they are."""
    return Device(backend)
