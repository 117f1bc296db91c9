"""The order of a K head's channels in llama.cpp, beside that in transformers.

transformers mostly rotates channel i with channel i + d/2: halves. Some architectures of llama.cpp rotate 2i with 2i + 1
instead: pairs; for them the conversion permutes the rows of Q and K. Which ones, ``rope_layout.json`` says;
tools/rope_layout.py wrote it by running the pinned converter.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from edgekv.errors import EdgekvError


@lru_cache(maxsize=None)
def _table() -> dict:
    return json.loads(Path(__file__).with_name("rope_layout.json").read_text())


def permuted(architecture: str) -> bool:
    """Whether the conversion to this GGUF architecture turns halves into pairs; where it does not, it keeps the order.

    EdgekvError, naming the architecture, if that is not known.
    """
    if found := _table()["architectures"].get(architecture):
        return found["permuted"]
    why = _table()["undecided"].get(architecture, "the pinned converter does not know it")
    raise EdgekvError(f"architecture {architecture!r}: which channel of transformers' keys is which of llama.cpp's is "
                      f"not known ({why}); calibrate instead, on the GGUF file")


def halves_to_pairs(vectors: np.ndarray) -> np.ndarray:
    """The last axis from ``[a0 .. a(d/2-1), b0 .. b(d/2-1)]`` to ``[a0, b0, a1, b1, ...]``; its length must be even."""
    return _swap(vectors, 2, vectors.shape[-1] // 2)


def pairs_to_halves(vectors: np.ndarray) -> np.ndarray:
    """The inverse of :func:`halves_to_pairs`."""
    return _swap(vectors, vectors.shape[-1] // 2, 2)


def _swap(vectors: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return vectors.reshape(*vectors.shape[:-1], rows, columns).swapaxes(-1, -2).reshape(vectors.shape)
