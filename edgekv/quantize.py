"""GGUF files with smaller weights, by the patched llama.cpp's own quantiser."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from edgekv import child
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.progress import bar

# of the types of llama-quantize those that need no importance matrix: name -> constant of the bindings
TYPES = {
    "f32": "ALL_F32",
    **{name: f"MOSTLY_{name.upper()}" for name in (
        "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl",
        "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "q2_k")},
}

_UNQUANTISED = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\]")
_FALLBACK = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback quantization")


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    outtype: str,
    *,
    n_threads: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write ``src`` with its weights as ``outtype`` to ``dst``, in a process of its own; the metadata stays.

    ``dst`` is written as it goes: pass a temporary name. ``say`` gets a line if weights could not take the type.

    Args:
        outtype: one of ``TYPES``.

    Raises:
        EdgekvError: ``src`` cannot be read or is quantised already, or ``dst`` cannot be written.
    """
    tensors = GGUF(src).tensors
    for tensor in tensors.values():
        if tensor.type_name not in _UNQUANTISED:
            raise EdgekvError(f"--outtype {outtype}: {src} is quantised already ({tensor.name} is {tensor.type_name}); "
                              "start from its F16, BF16 or F32 file, or from the checkpoint")

    errors: list[str] = []
    done = 0
    with bar(f"quantising to {outtype}", len(tensors), "tensors", show=progress) as advance:

        def each(line: str) -> None:
            nonlocal done
            # a tensor's line may end in an error
            if "failed to quantize" in line or "rror" in line:
                errors.append(line)
            if found := _TENSOR.match(line):
                advance(int(found[1]) - done)
                done = int(found[1])
            elif found := _FALLBACK.search(line):
                say(f"{found[1]} of {found[2]} tensors cannot be {outtype} (their rows are no multiple of its blocks) "
                    "and take a larger type")

        # with this process' import path: -m would put the working folder before it
        code = f"import sys; sys.path[:] = {sys.path!r}; from edgekv import quantize; quantize.main(*sys.argv[1:])"
        status = child.run([sys.executable, "-c", code, os.fspath(src), os.fspath(dst), outtype, str(n_threads or 0)],
                           each)
    if status:
        raise EdgekvError(_why(Path(dst), outtype, errors, status))


def _why(dst: Path, outtype: str, errors: list[str], status: int) -> str:
    if "iostream" in "".join(errors):
        return f"{dst}: cannot be written: is the disk full?"
    reason = errors[-1].split("failed to quantize: ")[-1] if errors else f"the process ended with status {status}"
    return f"--outtype {outtype}: llama.cpp cannot quantise this model: {reason}"


def main(src: str, dst: str, outtype: str, n_threads: str) -> None:
    """The other process: llama.cpp's log goes to standard output."""
    import ctypes

    import edgekv  # noqa: F401  says which library the bindings load
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(_level: int, text: bytes, _user_data: object) -> None:
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
        except OSError:
            os._exit(1)  # whoever asked has gone

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{TYPES[outtype]}")
    params.nthread = int(n_threads)
    sys.exit(llama_cpp.llama_model_quantize(os.fsencode(src), os.fsencode(dst), ctypes.byref(params)))
