"""A context as long as asked for without reading so much: cells filled with copies of those of a short text.

For measurements of speed and memory only, which do not depend on what the cells hold; what the model says then means
nothing. The bytes are those of llama.cpp's file of one sequence (``llama_state_seq_save_file``) in the pinned version.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import llama_cpp
from edgekv import native
from edgekv.errors import EdgekvError
from edgekv.session import Session

_MAGIC_AND_VERSION = struct.pack("<II", llama_cpp.LLAMA_STATE_SEQ_MAGIC, llama_cpp.LLAMA_STATE_SEQ_VERSION)


def fill_with_copies(session: Session, n_tokens: int) -> None:
    """Make sequence 0 ``n_tokens`` long: the cells that it has, again and again, at positions that go on.

    The copies pass through a file in the system's folder for temporary ones (TMPDIR), as large as the cache.

    Raises:
        EdgekvError: the cache is of a kind that cannot be filled so (windows, a recurrent half, several positions per
            token, an eviction), or the file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="edgekv-") as folder:
        short, long = Path(folder, "short"), Path(folder, "long")
        if not llama_cpp.llama_state_seq_save_file(session.ctx, os.fsencode(short), 0, (llama_cpp.llama_token * 1)(), 0):
            raise EdgekvError(f"{folder}: the cache cannot be written: {native.log_error() or 'llama.cpp does not say why'}")
        size = short.stat().st_size * n_tokens // max(1, session.stats(0).cells_used)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise EdgekvError(f"{folder}: {size:,} bytes are needed to fill the cache with copies, {free:,} are free: set "
                              "TMPDIR to a folder on another disk")
        try:
            with open(short, "rb") as source, open(long, "wb") as target:
                _repeat(source, target, n_tokens, len(session.layers()))
        except OSError as error:
            raise EdgekvError(f"{long}: {error.strerror or error}") from None
        short.unlink()
        native.clear_error()
        n_read, room = ctypes.c_size_t(), (llama_cpp.llama_token * 1)()
        if not llama_cpp.llama_state_seq_load_file(session.ctx, os.fsencode(long), 0, room, 1, n_read):
            raise EdgekvError(native.last_error() or native.log_error() or "the cache cannot be filled with copies")


def _repeat(source: BinaryIO, target: BinaryIO, n_tokens: int, n_layers: int) -> None:
    """Copy the file of a sequence so that it has ``n_tokens`` cells: those of ``source`` in turn."""
    refused = EdgekvError("this model's cache cannot be filled with copies, it has more than K and V of one sequence: read "
                          "the context instead (--fill read)")

    def take(form: str) -> tuple:
        data = source.read(struct.calcsize(form))
        if len(data) != struct.calcsize(form):
            raise refused
        return struct.unpack(form, data)

    def put(form: str, *values) -> None:
        target.write(struct.pack(form, *values))

    def tile(size: int, count: int) -> None:
        """``count`` cells of ``size`` bytes."""
        data = source.read(size * count)
        if len(data) != size * count:
            raise refused
        whole, rest = divmod(n_tokens, count)
        for _ in range(whole):
            target.write(data)
        target.write(data[: rest * size])

    if source.read(len(_MAGIC_AND_VERSION)) != _MAGIC_AND_VERSION or take("<II") != (0, 1):  # tokens, streams
        raise refused
    (count,) = take("<I")
    if not count:
        raise EdgekvError("there is no cell to copy")
    for i in range(count):
        if take("<iIi") != (i, 1, 0):  # position, sequences, sequence
            raise refused
    v_transposed, n = take("<II")
    if v_transposed > 1 or n != n_layers:
        raise refused

    target.write(_MAGIC_AND_VERSION)
    put("<III", 0, 1, n_tokens)
    for i in range(n_tokens):
        put("<iIi", i, 1, 0)
    put("<II", v_transposed, n)
    for part in ("k", "v"):
        for _ in range(n):
            kind, size = (take("<iQ") if part == "k" or not v_transposed else take("<iI"))
            if part == "k" or not v_transposed:
                put("<iQ", kind, size)
                tile(size, count)
            else:  # size is that of one element, and each channel has its cells in a row
                (channels,) = take("<I")
                put("<iII", kind, size, channels)
                for _ in range(channels):
                    tile(size, count)
    if source.read(1):
        raise refused
