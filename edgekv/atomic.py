"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgekv.errors import EdgekvError


def check(path: str | os.PathLike[str], flag: str) -> None:
    """Check, before the work and not after, that a file can be written there. EdgekvError, naming ``flag``, if not."""
    path = Path(path)
    folder = path.resolve().parent
    if path.is_dir():
        raise EdgekvError(f"{flag} {path}: is a folder; name a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise EdgekvError(f"{flag} {path}: {folder} is no folder that can be written to")


def write(path: str | os.PathLike[str], pieces: Iterable[bytes], mode: int | None = None) -> None:
    """Write ``pieces`` to a temporary file beside ``path``, and rename it once it is complete and on disk.

    Whatever interrupts it, nothing half-written stays and an older file of that name is untouched. ``mode``: the
    permissions of the new file.

    Raises:
        EdgekvError: naming ``path``, which cannot be written.
    """
    write_all([(path, pieces, mode)])


def write_all(files: Sequence[tuple[str | os.PathLike[str], Iterable[bytes], int | None]]) -> None:
    """Write files (path, pieces, permissions) that belong together and of which readers open the first: all or none.

    Each is written to a temporary file beside it; all are renamed once they are complete and on disk, the first last.
    Older files that others of them replace are kept until then, and in between no first file stands, so that nobody reads
    old and new together. EdgekvError, naming the file, if one cannot be written.
    """
    token = secrets.token_hex(8)
    # the file, its temporary, and where an older file of its name waits for the outcome; named before they exist: an
    # interrupt may come right after the system has made one
    names = []
    for name, _, _ in files:
        path = Path(os.path.realpath(name))  # through a link, so that the rename replaces the file and not the link
        if path.is_dir():
            raise EdgekvError(f"{path}: is a folder; name a file")
        names.append((path, *(path.with_name(f".{path.name}.{token}.{kind}") for kind in ("tmp", "old"))))

    first, first_temporary, first_older = names[0]
    existed: list[bool] | None = None
    try:
        for (path, temporary, _), (_, pieces, mode) in zip(names, files):
            with open(temporary, "xb") as out:
                for data in pieces:
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())
            if mode is not None:
                os.chmod(temporary, mode)

        existed = [path.exists() for path, _, _ in names]
        if existed[0] and len(names) > 1:
            os.replace(first, first_older)
        for (path, temporary, older), exists in zip(names[1:], existed[1:]):
            if exists:
                os.replace(path, older)
            os.replace(temporary, path)
        path = first
        os.replace(first_temporary, first)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EdgekvError(f"{path}: the disk is full; free some space or write elsewhere") from None
        raise EdgekvError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        # what has happened is read off the files: an interrupt may come between a rename and a note of it
        valid = existed is not None and not first_temporary.exists() and first.exists()
        if existed is not None and not valid:
            for (path, temporary, older), exists in reversed(list(zip(names, existed))):
                with contextlib.suppress(OSError):  # the reason for being here matters more
                    if not temporary.exists() and (older.exists() or not exists):
                        os.replace(path, temporary)
                    if older.exists():
                        os.replace(older, path)
        for _, temporary, older in names:
            for path in (temporary, older) if valid else (temporary,):
                with contextlib.suppress(OSError):
                    os.unlink(path)
