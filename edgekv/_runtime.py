"""Finds the patched libraries, makes the published ``llama_cpp`` bindings load them, and knows what did not load."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from edgekv.errors import EdgekvError

BINDINGS_VERSION = "0.3.36"

_HERE = Path(__file__).parent
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"

# backends are modules, which end in .so on macOS too
_BACKEND_FILE = re.compile(r"(?:lib)?ggml-(?!base\.)(.+)\.(?:so|dylib|dll)")

# family of GPU backends -> what people call it, the library that comes with its driver, the driver
_GPU = {
    "cuda": ("CUDA", "libcuda.so.1", "NVIDIA driver"),
    "hip": ("ROCm", "libhsa-runtime64.so.1", "ROCm runtime"),
    "metal": ("Metal", None, None),
    "vulkan": ("Vulkan", "libvulkan.so.1", "Vulkan loader"),
}
# what computes beside the CPU, or elsewhere, and is not missed on a machine without it
_NO_GPU = ("cpu", "rpc", "blas", "zendnn")

_LOG_LEVELS = (3, 4)  # GGML_LOG_LEVEL_WARN and _ERROR
_said: list[str] = []  # by the backends, while they were loaded


def lib_dir() -> Path:
    """The folder of the patched libraries; ``EDGEKV_LIB_PATH`` names another build (sanitizers, development)."""
    return Path(os.environ.get("EDGEKV_LIB_PATH") or _HERE / "lib").resolve()


def lib_path(name: str) -> Path:
    return lib_dir() / f"{_PREFIX}{name}{_SUFFIX}"


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _collect(level, text, _user_data) -> None:
    if level in _LOG_LEVELS:
        _said.append(text.decode(errors="replace").strip())


def prepare() -> None:
    """Point ``llama_cpp`` at our libraries and load their backends.

    Without libraries (a checkout that was not built), or with damaged ones, nothing happens: what needs them says so,
    see :func:`check`.

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
    os.environ["MTMD_CPP_LIB"] = str(directory)  # images; it links to the libraries beside it
    if not _published_bindings_installed():
        sys.path.insert(0, str(_HERE / "_bindings"))

    try:
        ggml = Ggml()
    except OSError:
        return
    # run-time variants are looked for beside the Python executable, where they are not; what is said meanwhile is
    # kept for those who ask
    ggml.base.ggml_log_set(_collect, None)
    ggml.core.ggml_backend_load_all_from_path(str(directory).encode())
    ggml.base.ggml_log_set(None, None)


def _published_bindings_installed() -> bool:
    """Whether the bindings of our version are installed; otherwise the copy that the build put in is used."""
    try:
        return metadata.version("llama_cpp_python") == BINDINGS_VERSION
    except metadata.PackageNotFoundError:
        return False


# --- what is there, and what is not used -----------------------------------------------------------------------------


class Ggml:
    """The registry of ggml's backends and their devices, through ctypes. OSError if the libraries do not load."""

    def __init__(self):
        self.core, self.base = ctypes.CDLL(str(lib_path("ggml"))), ctypes.CDLL(str(lib_path("ggml-base")))
        size, pointer, text = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
        self._reg_count = self.bind("ggml_backend_reg_count", size)
        self._reg_get = self.bind("ggml_backend_reg_get", pointer, size)
        self._dev_count = self.bind("ggml_backend_dev_count", size)
        self._dev_get = self.bind("ggml_backend_dev_get", pointer, size)
        self._reg_name = self.bind("ggml_backend_reg_name", text, pointer)
        self.n_devices = self.bind("ggml_backend_reg_dev_count", size, pointer)
        self.device_type = self.bind("ggml_backend_dev_type", ctypes.c_int, pointer)
        self.registry_of = self.bind("ggml_backend_dev_backend_reg", pointer, pointer)
        self._memory = self.bind("ggml_backend_dev_memory", None, pointer, ctypes.POINTER(size), ctypes.POINTER(size))
        self._properties = self.bind("ggml_backend_dev_get_props", None, pointer, ctypes.POINTER(DeviceProperties))

    def bind(self, name: str, restype, *argtypes):
        """A function of libggml, or of libggml-base, which it depends on."""
        function = getattr(self.core, name)
        function.restype, function.argtypes = restype, argtypes
        return function

    def registries(self) -> list[int]:
        return [self._reg_get(i) for i in range(self._reg_count())]

    def devices(self) -> list[int]:
        return [self._dev_get(i) for i in range(self._dev_count())]

    def registry_name(self, registry: int) -> str:
        return self._reg_name(registry).decode()

    def gpus(self) -> list[int]:
        """The devices that ``-ngl`` puts layers on, as llama.cpp chooses them: graphics built into a processor only where
        there is no other."""
        by_type = {kind: [device for device in self.devices() if self.device_type(device) == kind] for kind in (1, 2)}
        return by_type[1] or by_type[2]  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU

    def memory(self, device: int) -> tuple[int, int]:
        """A device's free bytes and all its bytes, both 0 where it does not tell."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._memory(device, free, total)
        return free.value, total.value

    def properties(self, device: int) -> DeviceProperties:
        found = DeviceProperties()
        self._properties(device, ctypes.byref(found))
        return found

    def library_of(self, registry: int) -> Path | None:
        """The file that a registry lives in."""
        info = _DlInfo()
        if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(registry), ctypes.byref(info)):
            return None
        return Path(os.fsdecode(info.fname)).resolve()


class DeviceProperties(ctypes.Structure):
    """``ggml_backend_dev_props``. ``device_id`` is the PCI address (``0000:c1:00.0``), None for what has none."""

    _fields_ = [("name", ctypes.c_char_p), ("description", ctypes.c_char_p), ("memory_free", ctypes.c_size_t),
                ("memory_total", ctypes.c_size_t), ("type", ctypes.c_int), ("device_id", ctypes.c_char_p),
                ("capabilities", ctypes.c_bool * 5)]


class _DlInfo(ctypes.Structure):
    _fields_ = [("fname", ctypes.c_char_p), ("fbase", ctypes.c_void_p), ("sname", ctypes.c_char_p),
                ("saddr", ctypes.c_void_p)]


class Backend(NamedTuple):
    """A backend's library that lies in the folder.

    Attributes:
        state: ``loaded``; ``idle``, loaded but without a device; ``spare``, because a better variant is loaded;
            ``unfit``, made for other processors; ``failed``.
        reason: why, for ``idle`` and ``failed``, in a few words.
        advice: what to do about it.
        expected: whether machines like this one are expected to be unable to load it.
    """

    path: Path
    state: str
    reason: str = ""
    advice: str = ""
    expected: bool = True

    @property
    def name(self) -> str:
        """As ggml calls it, and the variant: ``cuda``, ``cpu-haswell``."""
        return _BACKEND_FILE.fullmatch(self.path.name)[1]

    @property
    def family(self) -> str:
        return self.name.split("-")[0]

    @property
    def label(self) -> str:
        return _GPU[self.family][0] if self.family in _GPU else self.family.upper()


def backends(*, gpu_only: bool = False) -> list[Backend]:
    """The backends' libraries in the folder and what became of them; ``gpu_only``: those that drive a GPU.

    A library that ggml did not load is opened once more to learn the reason.
    """
    try:
        ggml = Ggml()
    except OSError:
        return []
    files = [path for path in sorted(lib_dir().iterdir()) if _BACKEND_FILE.fullmatch(path.name)]
    loaded = {ggml.library_of(registry): registry for registry in ggml.registries()}
    used = {Backend(path, "loaded").family for path in files if path.resolve() in loaded}

    found = []
    for path in files:
        family = Backend(path, "").family
        if gpu_only and family in _NO_GPU:
            continue
        registry = loaded.get(path.resolve())
        if registry is None:
            found.append(_unloaded(path, family, family in used))
        elif family in _NO_GPU or ggml.n_devices(registry):
            found.append(Backend(path, "loaded"))
        else:
            found.append(Backend(path, "idle", _why_idle(family), "check the driver and which devices it shows"))
    return found


def _unloaded(path: Path, family: str, other_variant: bool) -> Backend:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Backend(path, "failed", *_why(family, str(error)))
    again = "install edgekv again"
    if not hasattr(library, "ggml_backend_init"):
        return Backend(path, "failed", "is no backend of ggml", again, False)
    if hasattr(library, "ggml_backend_score") and not library.ggml_backend_score():
        return Backend(path, "unfit")
    if other_variant:
        return Backend(path, "spare")
    return Backend(path, "failed", "was refused: it is of another version than libggml", again, False)


def _why(family: str, error: str) -> tuple[str, str, bool]:
    """Reason, advice and whether it was to be expected, from what dlopen said."""
    missing = (re.search(r"([^\s/]+): cannot open shared object file", error)
               or re.search(r"Library not loaded: (?:\S*/)?(\S+)", error))
    if missing:
        name = missing[1]
        _, of_driver, driver = _GPU.get(family, (None, None, None))
        if of_driver and (name == of_driver or not _loads(of_driver)):
            lacking = f"{name} is missing" if name == of_driver else f"{name} and {of_driver} are missing"
            return (f"{lacking} (no {driver}?)",
                    f"with such a device install the {driver}; without one this is as it should be", True)
        what = "the CUDA toolkit's runtime" if family == "cuda" else f"what has {name}"
        return f"{name} is missing", f"install {what}, in the version that its name says", False
    needed = re.search(r"version [`'](\S+)' not found", error)
    if needed:
        return f"{needed[1]} is needed, this system is older", "build edgekv on this machine: pip install .", False
    if "undefined symbol" in error or "Symbol not found" in error:
        return "it is of another version than the libraries beside it", "install edgekv again", False
    return f"the file is damaged ({error.split(': ', 1)[-1]})", "install edgekv again", False


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _why_idle(family: str) -> str:
    """What a backend without devices said of it while it was loaded."""
    source = "cuda" if family in ("hip", "musa") else family  # those are built from the same files
    lines = [line.partition(": ")[2] for line in _said if line.startswith(f"ggml_{source}")]
    return "finds no device" + (f" ({lines[-1]})" if lines else "")


def check() -> None:
    """EdgekvError, naming the file and the reason, if the libraries are missing or damaged or nothing can compute."""
    if not lib_path("llama").exists():
        install = ("edgekv does not run on Windows itself, install it in WSL" if sys.platform == "win32" else
                   "install edgekv with `pip install .`")
        raise EdgekvError(f"{lib_dir()}: the patched libraries are missing, {install}")
    for name in ("ggml-base", "ggml", "llama"):
        try:
            ctypes.CDLL(str(lib_path(name)))
        except OSError as error:
            reason, advice, _ = _why(name, str(error))
            raise EdgekvError(f"{lib_path(name)}: cannot be loaded, {reason}: {advice}") from None
    ggml = Ggml()
    if not any(ggml.device_type(device) == 0 for device in ggml.devices()):
        failed = [backend for backend in backends() if backend.state == "failed"]
        why = f"{failed[0].path.name}: {failed[0].reason}" if failed else "it holds none for this processor"
        raise EdgekvError(f"{lib_dir()}: no backend for the CPU could be loaded ({why}): install edgekv again")


def notices(n_gpu_layers: int = 0, *, elsewhere: bool = False) -> list[str]:
    """Lines for people about GPUs that are not used although a backend for them is installed, or although layers are to
    go there; none where all is as asked for.

    Args:
        n_gpu_layers: as ``-ngl``, 0: none.
        elsewhere: layers may go to other machines, so that nothing is missed without a GPU here.
    """
    try:
        ggml = Ggml()
    except OSError:
        return []
    if elsewhere or ggml.gpus():
        then = ""
    elif n_gpu_layers:
        then = f"; -ngl {n_gpu_layers} has no effect, running on the CPU"
    else:
        then = "; running on the CPU"
    unused = [backend for backend in backends(gpu_only=True) if backend.state in ("failed", "idle")]
    lines = [f"{backend.label} is not used: {backend.reason}{then} - see `edgekv doctor`" for backend in unused]
    if not lines and then and n_gpu_layers:
        lines = [f"-ngl {n_gpu_layers} has no effect: no GPU backend is installed or none finds a device; running on "
                 "the CPU - see `edgekv doctor`"]
    return lines
