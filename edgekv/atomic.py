"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from edgekv.errors import EdgekvError


def write(path: str | os.PathLike[str], pieces: Iterable[bytes], mode: int | None = None) -> None:
    """Write ``pieces`` to a temporary file beside ``path``, and rename it once it is complete and on disk.

    Whatever interrupts it, nothing half-written stays and an older file of that name is untouched. ``mode``: the
    permissions of the new file.

    Raises:
        EdgekvError: naming ``path``, which cannot be written.
    """
    path = Path(os.path.realpath(path))  # through a link, so that the rename replaces the file and not the link
    if path.is_dir():
        raise EdgekvError(f"{path}: is a folder; name a file")

    # named before it exists: an interrupt may come right after the system has made it
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as out:
            for data in pieces:
                out.write(data)
            out.flush()
            os.fsync(out.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EdgekvError(f"{path}: the disk is full; free some space or write elsewhere") from None
        raise EdgekvError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        try:
            os.unlink(temporary)
        except OSError:
            pass  # renamed or never made; and if it cannot be removed, the reason for being here matters more
