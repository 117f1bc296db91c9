"""Work in a process of its own: it cannot take this one down with it, and Ctrl-C stops it wherever it is."""

from __future__ import annotations

import codecs
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence

_LINE_END = re.compile(r"[\r\n]+")


def run(argv: Sequence[str | os.PathLike[str]], each: Callable[[str], None], env: dict[str, str] | None = None) -> int:
    """Run a command without input and hand every line that it prints to ``each``; its exit status.

    A line that a progress bar draws over counts as a line. Whatever interrupts this, the command and what it started
    are gone when it returns. ``env``: variables beside those of this process.
    """
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
        # a terminal's Ctrl-C goes to this process alone, which decides what happens
        start_new_session=True)
    try:
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        rest = ""
        while data := process.stdout.read1(1 << 16):
            *lines, rest = _LINE_END.split(rest + decode(data))
            for line in lines:
                each(line)
        if rest:
            each(rest)
        return process.wait()
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it has ended
        process.stdout.close()
        process.wait()
