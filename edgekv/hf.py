"""Hugging Face checkpoints to GGUF, by the converter of the pinned llama.cpp, which the package carries."""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from pathlib import Path

from edgekv import child
from edgekv.errors import EdgekvError
from edgekv.extras import require
from edgekv.progress import bar

CONVERTER = Path(__file__).parent / "_converter" / "convert_hf_to_gguf.py"

# what the converter writes by itself; auto is the 16-bit type nearest to the checkpoint's
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")

_PERCENT = re.compile(r"Writing: +(\d+)%")
# of NumPy's own writing only the last is known
_FULL = re.compile(r"No space left on device|Disk quota exceeded|OSError: \d+ requested and \d+ written")
_FAILURE = re.compile(r"^(?:ERROR:[\w.-]+:|[\w.]*(?:Error|Exception)\b)")


def check(folder: str | os.PathLike[str]) -> None:
    """EdgekvError unless ``folder`` looks like a checkpoint and this installation can convert one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise EdgekvError(f"{folder}: is a folder without config.json; pass a checkpoint as transformers saves it, "
                          "or a .gguf file")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise EdgekvError(f"{folder}: holds no weights (*.safetensors); fetch the whole checkpoint")
    require("convert", "torch", "transformers", "sentencepiece", what=f"{folder}: converting a checkpoint")
    if not CONVERTER.is_file():
        raise EdgekvError(f"{CONVERTER}: is missing, install edgekv with `pip install .`")


def to_gguf(folder: str | os.PathLike[str], out: str | os.PathLike[str], outtype: str = "auto", *,
            name: str | None = None, progress: bool = False) -> None:
    """Write the checkpoint in ``folder`` as a GGUF file, in a process of its own that reaches no network.

    ``out`` is written as it goes: pass a temporary name.

    Args:
        outtype: one of ``OUTTYPES``.
        name: the model's name in the file; default: what the converter makes of the folder.

    Raises:
        EdgekvError: :func:`check` fails, the converter does not know the architecture or the tokenizer, the checkpoint
            is damaged, or ``out`` cannot be written.
    """
    check(folder)
    command = [sys.executable, os.fspath(CONVERTER), os.fspath(folder), "--outfile", os.fspath(out),
               "--outtype", outtype]
    if name is not None:
        command += ["--model-name", name]
    last: deque[str] = deque(maxlen=200)
    done = 0
    with bar(f"converting {Path(folder).name}", 100, "%", show=progress) as advance:

        def each(line: str) -> None:
            nonlocal done
            if found := _PERCENT.match(line):
                advance(int(found[1]) - done)
                done = int(found[1])
            elif line.strip():
                last.append(line)

        # the folder is all there is: nothing is fetched
        status = child.run(command, each, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1",
                                           "TOKENIZERS_PARALLELISM": "false"})
    if os.environ.get("EDGEKV_DEBUG", "0") not in ("", "0"):
        print(*last, sep="\n", file=sys.stderr)
    if status:
        raise EdgekvError(_why(Path(folder), Path(out), list(last), status))


def _why(folder: Path, out: Path, lines: list[str], status: int) -> str:
    if _FULL.search("\n".join(lines)):
        return f"{out}: the disk is full; free some space or write elsewhere"
    failures = [line for line in lines if _FAILURE.match(line)]
    reason = failures[-1].split(":", 2)[-1].strip() if failures and failures[-1].startswith("ERROR:") else (
        failures[-1] if failures else f"its process ended with status {status}")
    return f"{folder}: llama.cpp's converter cannot take this checkpoint: {reason}"
