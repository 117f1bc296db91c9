"""The command line, in this process and in processes of their own."""

import os
import subprocess
import sys

from click.testing import CliRunner

from edgekv import cli


def python(code: str) -> list[str]:
    """A command that runs code with this process' import path: ``-c`` alone would put the working folder first, and so
    the checkout before the installed package."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]


# a shell's background job is born with Ctrl-C ignored, and so are its children
EDGEKV = python("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                "from edgekv.cli import main; main()")


def edgekv(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args])


def edgekv_apart(*args, **environment):
    """In a process of its own, where the log of llama.cpp would show."""
    return subprocess.run([*EDGEKV, *map(str, args)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


def fails(why, *args, status=1, **environment):
    """One line that says why; with an environment in a process of its own."""
    r = edgekv_apart(*args, **environment) if environment else edgekv(*args)
    assert (r.returncode if environment else r.exit_code) == status, (r.stdout, r.stderr)
    assert r.stdout == "" and r.stderr.startswith("edgekv: error: ") and r.stderr.count("\n") == 1, (r.stdout, r.stderr)
    assert why in r.stderr, r.stderr
    return r
