"""What an evaluation has found so far: a file of JSON lines to which cases are added one by one, and from which a later
run goes on.

The first line is the header: what is evaluated, with which model, versions and machine. It is written before any work.
Each further line is a case, under a key of its own.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import json
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgekv.errors import EdgekvError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 1
_START = b'{"edgekv_eval": '  # how every header begins
_MAX_LINE = 1 << 24  # bytes; a first line longer than that is not ours


def header(kind: str, gguf_path: str | os.PathLike[str], config: Mapping[str, Any],
           n_threads: int | None = None, cases: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The first line of a journal.

    Args:
        kind: the evaluation, such as ``niah``.
        gguf_path: the model; of a split one the first part. All parts are hashed, one after the other.
        config: everything that results depend on. What may differ when the evaluation goes on does not belong here.
        n_threads, cases: for the record. Which cases there are may change: their keys tell them apart.

    Raises:
        EdgekvError: the model cannot be read.
    """
    import numpy as np

    import edgekv
    from edgekv import _runtime, native
    from edgekv.bench import machine
    from edgekv.gguf_file import GGUF
    from edgekv.session import default_threads

    gguf = GGUF(gguf_path)
    digest = hashlib.sha256()
    for part in gguf.parts:
        try:
            with open(part.path, "rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
        except OSError as e:
            raise EdgekvError(f"{part.path}: {e.strerror or e}") from None
    return {
        "edgekv_eval": VERSION,
        "kind": kind,
        "config": dict(config),
        "cases": dict(cases or {}),
        "model": {"file": gguf.path.name, "sha256": digest.hexdigest(), "size": gguf.size,
                  "architecture": gguf.architecture},
        "versions": {"edgekv": edgekv.__version__, "llama_cpp_python": _runtime.BINDINGS_VERSION,
                     "python": platform.python_version(), "numpy": np.__version__},
        "machine": {"name": machine(), "cores": os.cpu_count(), "threads": n_threads or default_threads(),
                    "cpu_variant": native.cpu_variant()},
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


class Journal:
    """Cases by key, in memory and, if it has a path, on disk. Made by :meth:`open`; a context manager.

    Attributes: ``header``, ``done`` (key -> record, as they are read back from JSON).
    """

    def __init__(self, header: dict[str, Any]):
        self.header = header
        self.done: dict[str, dict[str, Any]] = {}
        self.path: Path | None = None
        self._file: io.FileIO | None = None
        self._size = 0  # bytes, of whole lines

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, header: Mapping[str, Any]) -> Journal:
        """Begin a journal, or go on with the one at ``path``; without a path nothing is written.

        A line at the end that a kill has cut off is removed. No other process can open the file until :meth:`close`.

        Raises:
            EdgekvError: the file is no journal, is damaged, is in use, belongs to another evaluation (other settings,
                model, versions or CPU variant), or cannot be read or written.
        """
        self = cls(json.loads(_line(header)))
        if path is None:
            return self
        self.path = Path(path)
        try:
            self._file = _open(self.path)
            self._load()
        except OSError as e:
            self.close()
            raise self._failed(e) from None
        except BaseException:
            self.close()
            raise
        return self

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a case; it is on disk when this returns. EdgekvError if it cannot be written: the file then holds the
        cases before it, whole."""
        if key in self.done or "key" in record:
            raise ValueError(f"{key!r} is there already" if key in self.done else "a record has no key of its own")
        line = _line({"key": key, **record})
        if self._file is not None:
            self._append(line)
        self.done[key] = _record(line)[1]

    def close(self) -> None:
        """Let others have the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        try:
            self._file.seek(self._size)
            self._file.truncate()  # what an interrupted call has left
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as e:
            try:
                self._file.truncate(self._size)
            except OSError:
                pass  # the next start drops the broken line
            raise self._failed(e) from None
        self._size += len(line)

    def _load(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        first = self._file.read(_MAX_LINE) if size else b""
        # killed before the header was whole: nothing was done yet
        begun = b"\n" not in first and (first.startswith(_START) or _START.startswith(first))
        if not size or begun and size < _MAX_LINE:
            self._append(_line(self.header))
            return

        if not first.startswith(_START) or b"\n" not in first:
            raise EdgekvError(f"{self.path}: is no log of edgekv eval; give another --log file")
        old = _parsed(first[:first.index(b"\n")])
        if old is None or not isinstance(old.get("edgekv_eval"), int):
            raise EdgekvError(f"{self.path}: line 1 is damaged; give another --log file or remove this one")
        if old["edgekv_eval"] != VERSION:
            raise EdgekvError(f"{self.path}: is a log of another version of edgekv eval ({old['edgekv_eval']}, not "
                              f"{VERSION}); give another --log file or remove this one")
        for what, a, b in _differences(old, self.header):
            other = "other" if what.endswith("s") else "another"
            raise EdgekvError(f"{self.path}: was begun with {other} {what} ({a}, now {b}); give another --log file or "
                              "remove this one")

        lines = (first + self._file.readall()).split(b"\n")  # the last one is not ended: empty, or cut off
        kept = len(lines[0]) + 1
        for number, line in enumerate(lines[1:-1], 2):
            found = _record(line)
            if found is None and number == len(lines) - 1 and not lines[-1]:
                break
            if found is None or found[0] in self.done:
                why = "is damaged" if found is None else f"has the key {found[0]!r} for the second time"
                raise EdgekvError(f"{self.path}: line {number} {why}; give another --log file or remove this one")
            self.done[found[0]] = found[1]
            kept += len(line) + 1
        if kept < size:
            self._file.truncate(kept)
            os.fsync(self._file.fileno())
        self._size = kept

    def _failed(self, e: OSError) -> EdgekvError:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            return EdgekvError(f"{self.path}: the disk is full; free some space and start again, or give another --log "
                               "file")
        return EdgekvError(f"{self.path}: cannot be used as a log: {e.strerror or e}; give another --log file")


def _open(path: Path) -> io.FileIO:
    """Open, or make, and lock."""
    if path.is_dir():
        raise EdgekvError(f"{path}: is a folder; name a file with --log")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise EdgekvError(f"{path}: there is no folder {folder}; make it or give another --log file")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise EdgekvError(f"{path}: is no regular file; give another --log file")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)
    file = io.FileIO(descriptor, "r+")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise EdgekvError(f"{path}: another evaluation is writing to it; wait for it or give another --log "
                              "file") from None
        except OSError:
            pass  # a file system without locks
    return file


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, default=lambda x: x.tolist()).encode() + b"\n"  # NumPy's scalars and arrays


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _record(line: bytes) -> tuple[str, dict[str, Any]] | None:
    record = _parsed(line)
    key = record.pop("key", None) if record is not None else None
    return (key, record) if isinstance(key, str) else None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the results depend on and is not the same: a name for it, how it was, how it is."""
    def at(value: Any, *names: str) -> Any:
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    compared = [("evaluation", ("kind",)), ("model", ("model", "sha256")), ("edgekv", ("versions", "edgekv")),
                ("llama-cpp-python", ("versions", "llama_cpp_python")), ("CPU variant", ("machine", "cpu_variant"))]
    old_config, new_config = at(old, "config"), at(new, "config")
    if not isinstance(old_config, dict):
        compared.append(("configuration", ("config",)))
    else:
        compared += [(name, ("config", name)) for name in dict.fromkeys([*new_config, *old_config])]
    for what, names in compared:
        a, b = at(old, *names), at(new, *names)
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            yield what, _short(a), _short(b)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else "nothing" if value is None else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:18] + " ... " + text[-18:]
