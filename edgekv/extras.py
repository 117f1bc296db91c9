"""Optional dependencies: a missing one is a line that says what to install."""

from __future__ import annotations

from importlib.util import find_spec

from edgekv.errors import EdgekvError


def require(extra: str, *modules: str, what: str) -> None:
    """EdgekvError, naming the extra that brings them, unless the modules that ``what`` needs are installed."""
    if not all(map(find_spec, modules)):  # looked for, not imported: torch takes seconds
        raise EdgekvError(f"{what} needs {' and '.join(modules)}; pip install 'edgekv[{extra}]'")
