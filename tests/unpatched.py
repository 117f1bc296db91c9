"""The unpatched pin, built once into build/unpatched with the flags of the CPU variant that the patched runtime picked.

    .venv/bin/python tests/unpatched.py    builds its llama-server too, and prints the path

EDGEKV_UNPATCHED_LIB names a folder with what is ready instead. CMAKE_BUILD_PARALLEL_LEVEL limits the compilers.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from edgekv import native
from edgekv.errors import EdgekvError

ROOT = Path(__file__).parents[1]


def unpatched_library() -> Path:
    """The folder of the unpatched libraries. EdgekvError if they cannot be built."""
    return _built("done")


def unpatched_server() -> Path:
    """The unpatched llama-server, in the same folder. EdgekvError if it cannot be built."""
    return _built("server-done") / "llama-server"


def _built(mark: str) -> Path:
    """The folder of the libraries once ``mark`` says that what is asked for is there."""
    if ready := os.environ.get("EDGEKV_UNPATCHED_LIB"):
        if mark == "server-done" and not Path(ready, "llama-server").exists():
            raise EdgekvError(f"EDGEKV_UNPATCHED_LIB={ready}: holds no llama-server; build that target of the pin")
        return Path(ready)
    variant = native.cpu_variant()
    if not re.fullmatch(r"ggml-cpu-\w+", variant):
        raise EdgekvError(f"the patched runtime has no CPU variants ({variant}): build the unpatched pin with the same "
                          "flags and name its libraries' folder in EDGEKV_UNPATCHED_LIB")

    spec = importlib.util.spec_from_file_location("llama_source", ROOT / "tools" / "llama_source.py")
    llama_source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama_source)
    pin = llama_source.read_pin()
    folder = ROOT / "build" / "unpatched" / f"{pin['version']}-{variant}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / mark).exists():
            if not (folder / "unpacked").exists():
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    llama_source.unpack_source(pin, folder)
                except llama_source.Failure as error:
                    raise EdgekvError(str(error)) from None
                (folder / "unpacked").touch()
            _build(folder, variant, serves=mark == "server-done")
            for done in {"done", mark}:  # the libraries come with the server
                (folder / done).touch()
    return folder / "build" / "bin"


def _build(folder: Path, variant: str, serves: bool) -> None:
    """Compile the libraries, and the server if ``serves``. EdgekvError if that fails."""
    build = folder / "build"
    # as in CMakeLists.txt; of the variants only the one target, so its flags are the same by construction
    options = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_NATIVE": "OFF",
               "GGML_BACKEND_DL": "ON", "GGML_CPU_ALL_VARIANTS": "ON", "GGML_RPC": "ON", "GGML_RPC_RDMA": "OFF",
               "LLAMA_OPENSSL": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF", "LLAMA_BUILD_UI": "OFF", "LLAMA_UI_GZIP": "OFF",
               **{f"LLAMA_BUILD_{part}": "OFF" for part in ("TESTS", "EXAMPLES", "APP")},
               **{f"LLAMA_BUILD_{part}": "ON" if serves else "OFF" for part in ("COMMON", "TOOLS", "SERVER")}}
    targets = ["llama", variant, "ggml-rpc", *(["llama-server"] if serves else [])]
    for command in (["cmake", "-G", "Ninja", "-S", str(folder / "llama.cpp"), "-B", str(build),
                     *(f"-D{name}={value}" for name, value in options.items())],
                    ["cmake", "--build", str(build), "--target", *targets]):
        try:
            run = subprocess.run(command, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError:
            raise EdgekvError("cmake: not found, and the unpatched pin is built with it and ninja; "
                              f"{sys.executable} -m pip install cmake ninja, with its folder in PATH") from None
        if run.returncode:
            log = folder / "failed.log"
            log.write_text(run.stdout)
            raise EdgekvError(f"{log}: the unpatched pin could not be built; its last lines say why")


if __name__ == "__main__":
    try:
        print(unpatched_server())
    except EdgekvError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
