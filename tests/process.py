"""Commands in processes of their own."""

import sys


def python(code: str) -> list[str]:
    """A command that runs code with this process' import path: ``-c`` alone would put the working folder first, and so
    the checkout before the installed package."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]


EDGEKV = python("from edgekv.cli import main; main()")
