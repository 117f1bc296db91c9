"""SnapKV's scores in NumPy and float64, written from the steps of the paper (arXiv 2404.14469, section 3.2) as kvpress
takes them; tests/test_kvpress.py proves it against kvpress itself."""

from __future__ import annotations

import numpy as np


def scores(queries: np.ndarray, keys: np.ndarray, kernel: int = 5, scale: float | None = None) -> np.ndarray:
    """Scores ``[KV heads, n_tokens - window]`` of the cells before the window, whose own cells always stay.

    Args:
        queries: ``[heads, window, head size]`` of the last ``window`` tokens, behind RoPE.
        keys: ``[KV heads, n_tokens, head size]`` in the order of their positions, behind RoPE; window < n_tokens.
        scale: of the products of queries and keys; default: 1 / sqrt(head size).
    """
    queries, keys = np.asarray(queries, np.float64), np.asarray(keys, np.float64)
    (n_heads, window, size), (n_kv_heads, n_tokens, _) = queries.shape, keys.shape
    n_before, group = n_tokens - window, n_heads // n_kv_heads
    result = np.zeros((n_kv_heads, n_before))
    for head in range(n_heads):
        logits = queries[head] @ keys[head // group].T * (size**-0.5 if scale is None else scale)
        logits[np.arange(n_tokens) > n_before + np.arange(window)[:, None]] = -np.inf  # the future
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)  # over the window's cells too, which are cut off only now
        mass = weights[:, :n_before].mean(axis=0)
        for cell in range(n_before):  # always over `kernel` cells: those beyond either end count as 0
            near = mass[max(0, cell - kernel // 2) : cell + kernel // 2 + 1]
            result[head // group, cell] += near.sum() / kernel / group
    return result
