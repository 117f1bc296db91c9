"""Finds the patched libraries and makes the published ``llama_cpp`` bindings load them."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import metadata
from pathlib import Path

BINDINGS_VERSION = "0.3.36"

_HERE = Path(__file__).parent
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"


def lib_dir() -> Path:
    """The folder of the patched libraries; ``EDGEKV_LIB_PATH`` names another build (sanitizers, development)."""
    return Path(os.environ.get("EDGEKV_LIB_PATH") or _HERE / "lib").resolve()


def lib_path(name: str) -> Path:
    return lib_dir() / f"{_PREFIX}{name}{_SUFFIX}"


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _say_nothing(_level, _text, _user_data) -> None:
    pass


def prepare() -> None:
    """Point ``llama_cpp`` at our libraries and load their backends.

    Without libraries (a checkout that was not built) nothing happens: what needs them says so.

    Raises:
        ImportError: ``llama_cpp`` was imported before with another library.
    """
    directory = lib_dir()
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None and Path(loaded._base_path).resolve() != directory:
        raise ImportError(
            f"llama_cpp was imported before edgekv and uses the libraries in {loaded._base_path}: import edgekv first"
        )

    os.environ["LLAMA_CPP_LIB_PATH"] = str(directory)
    if not _published_bindings_installed():
        sys.path.insert(0, str(_HERE / "_bindings"))

    if lib_path("ggml").exists():
        # run-time variants are looked for beside the Python executable, where they are not
        ggml, base = ctypes.CDLL(str(lib_path("ggml"))), ctypes.CDLL(str(lib_path("ggml-base")))
        # it would say on standard error which variant it took
        base.ggml_log_set(_say_nothing, None)
        ggml.ggml_backend_load_all_from_path(str(directory).encode())
        base.ggml_log_set(None, None)


def _published_bindings_installed() -> bool:
    """Whether the bindings of our version are installed; otherwise the copy that the build put in is used."""
    try:
        return metadata.version("llama_cpp_python") == BINDINGS_VERSION
    except metadata.PackageNotFoundError:
        return False
