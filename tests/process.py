"""Commands in processes of their own."""

import sys


def python(code: str) -> list[str]:
    """A command that runs code with this process' import path: ``-c`` alone would put the working folder first, and so
    the checkout before the installed package."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]


# a shell's background job is born with Ctrl-C ignored, and so are its children
EDGEKV = python("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                "from edgekv.cli import main; main()")
