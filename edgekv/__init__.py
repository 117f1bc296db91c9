"""Long contexts for local language models: a KV cache that is evicted by Q-Filter score and selected from by page.

Importing this package points the published ``llama_cpp`` bindings at the patched runtime in ``edgekv/lib``.
"""

from edgekv import _runtime
from edgekv.errors import EdgekvError

__version__ = "0.1.0"
__all__ = ["EdgekvError", "EvictionSettings", "Llama", "QFilters", "SelectionSettings", "__version__"]

_runtime.prepare()


def __getattr__(name: str):
    # numpy and the bindings are loaded by those who need them: `edgekv --help` should answer at once
    if name == "Llama":
        from edgekv.llama import Llama

        return Llama
    if name in ("EvictionSettings", "SelectionSettings"):
        from edgekv import settings

        return getattr(settings, name)
    if name == "QFilters":
        from edgekv.filters import QFilters

        return QFilters
    raise AttributeError(f"module 'edgekv' has no attribute {name!r}")
