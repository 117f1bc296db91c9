"""Adding Q-Filters to a GGUF file.

The new file keeps the bytes of the old one: all other metadata in the same order, the tensor descriptions, the tensor
data. Only the number of metadata pairs, the ``edgekv.qfilters.*`` pairs at the end of the metadata and the padding
before the tensor data differ. Offsets of tensors count from the start of the tensor data, so they stay.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from edgekv import atomic
from edgekv.errors import EdgekvError
from edgekv.filters import PREFIX, QFilters
from edgekv.gguf_file import ARRAY, GGUF, MAGIC, SCALARS, STRING


def encode_kv(key: str, vtype: int, item_type: int | None, value: object) -> bytes:
    """One GGUF key-value pair."""
    out = _string(key) + struct.pack("<I", vtype)
    if vtype == ARRAY:
        out += struct.pack("<IQ", item_type, len(value))
        if item_type == STRING:
            return out + b"".join(map(_string, value))
        return out + np.asarray(value, "<" + SCALARS[item_type]).tobytes()
    return out + (_string(value) if vtype == STRING else struct.pack("<" + SCALARS[vtype], value))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _pieces(src: GGUF, filters: QFilters) -> Iterator[bytes]:
    """The new file, piece by piece."""
    kept = [f for f in src.fields.values() if not f.key.startswith(PREFIX)]
    new = [encode_kv(*item) for item in filters.metadata()]
    at = 0

    def count(data: bytes) -> bytes:
        nonlocal at
        at += len(data)
        return data

    yield count(MAGIC + struct.pack("<IQQ", src.version, len(src.tensors), len(kept) + len(new)))
    for f in kept:
        for data in src.chunks(f.start, f.end - f.start):
            yield count(data)
    yield count(b"".join(new))
    for data in src.chunks(src.kv_end, src.infos_end - src.kv_end):
        yield count(data)
    yield bytes(-at % src.alignment)
    yield from src.chunks(src.data_offset, max(0, src.size - src.data_offset))


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], filters: QFilters,
            progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``src`` with ``filters`` in its metadata (replacing those it has) to ``dst``, which may be ``src``.

    Written to a temporary file beside ``dst`` and renamed once it is complete and on disk; whatever interrupts it,
    nothing half-written stays. Memory does not grow with the model. ``progress(done, total)`` is called in bytes.

    Raises EdgekvError if ``src`` is no GGUF, the filters do not fit it, or ``dst`` cannot be written.
    """
    if Path(src).is_dir():
        raise EdgekvError(f"{src}: converting Hugging Face folders comes with a later version; pass a .gguf file")
    gguf = GGUF(src)
    filters.validate(gguf)

    def counted() -> Iterator[bytes]:
        done = 0
        for data in _pieces(gguf, filters):
            yield data
            done += len(data)
            if progress is not None:
                progress(min(done, gguf.size), gguf.size)

    atomic.write(dst, counted(), mode=stat.S_IMODE(os.stat(src).st_mode))


def save_filters(dst: str | os.PathLike[str], gguf: GGUF, filters: QFilters) -> None:
    """Write filters alone: a GGUF without tensors that ``convert --qfilters`` takes. EdgekvError as :func:`convert`."""
    items = [("general.architecture", STRING, None, gguf.architecture), *filters.metadata()]
    header = MAGIC + struct.pack("<IQQ", 3, 0, len(items))
    atomic.write(dst, [header, *(encode_kv(*item) for item in items)])
