"""Adding Q-Filters to a GGUF file.

The new file keeps the bytes of the old one: all other metadata in the same order, the tensor descriptions, the tensor
data. Only the number of metadata pairs, the ``edgekv.qfilters.*`` pairs at the end of the metadata and the padding
before the tensor data differ. Offsets of tensors count from the start of the tensor data, so they stay. A split model
stays split: its metadata is in the first part, the others keep all their bytes.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgekv import atomic
from edgekv.errors import EdgekvError
from edgekv.filters import PREFIX, QFilters
from edgekv.gguf_file import ARRAY, GGUF, MAGIC, SCALARS, STRING, Part, part_path, split_name


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


def _pieces(src: Part, filters: QFilters) -> Iterator[bytes]:
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


def output_paths(gguf: GGUF, dst: str | os.PathLike[str]) -> list[Path]:
    """The files that :func:`convert` writes: ``dst``, which for a split model names the first part, and the other parts
    beside it. EdgekvError if ``dst`` does not name a first part of as many."""
    path, count = Path(dst), len(gguf.parts)
    if path.is_dir():
        raise EdgekvError(f"{path}: is a folder; name a file")
    if count == 1:
        return [path]
    prefix, *named = split_name(path) or [path.name.removesuffix(".gguf")]
    paths = [part_path(path, prefix, number, count) for number in range(1, count + 1)]
    if named != [1, count]:
        raise EdgekvError(f"{dst}: the model has {count} parts and stays split; name the first part, {paths[0].name}")
    return paths


def convert(src: str | os.PathLike[str], dst: str | os.PathLike[str], filters: QFilters,
            progress: Callable[[int, int], None] | None = None) -> None:
    """Write ``src`` with ``filters`` in its metadata (replacing those it has) to ``dst``, which may be ``src``.

    Of a split model both name the first part (:func:`output_paths`): that one gets the filters, the others are copied,
    but for those that are the same files already.

    Written to temporary files beside ``dst`` and renamed once all are complete and on disk, the first part last.
    Whatever interrupts it, nothing half-written stays, and older files of these names are as they were. Only a kill
    between the renames of a split model can leave some parts; the first is not among them, so nothing loads them, and
    older parts then lie beside them as ``.NAME.*.old``. Memory does not grow with the model. ``progress(done, total)``
    is called in bytes; those that need not be written count as done.

    Raises EdgekvError if ``src`` is no GGUF or lacks a part, the filters do not fit it, ``dst`` does not name a first
    part of as many, or it cannot be written.
    """
    gguf = GGUF(src)
    filters.validate(gguf)
    done = 0

    def counted(pieces: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal done
        for data in pieces:
            yield data
            done += len(data)
            if progress is not None:
                progress(min(done, gguf.size), gguf.size)

    files = []
    for part, path in zip(gguf.parts, output_paths(gguf, dst)):
        is_first = part is gguf.parts[0]
        if not is_first and os.path.exists(path) and os.path.samefile(path, part.path):
            done += part.size
            continue
        pieces = _pieces(part, filters) if is_first else part.chunks(0, part.size)
        files.append((path, counted(pieces), stat.S_IMODE(os.stat(part.path).st_mode)))
    atomic.write_all(files)


def save_filters(dst: str | os.PathLike[str], gguf: GGUF, filters: QFilters) -> None:
    """Write filters alone: a GGUF without tensors that ``convert --qfilters`` takes. EdgekvError as :func:`convert`."""
    items = [("general.architecture", STRING, None, gguf.architecture), *filters.metadata()]
    header = MAGIC + struct.pack("<IQQ", 3, 0, len(items))
    atomic.write(dst, [header, *(encode_kv(*item) for item in items)])
