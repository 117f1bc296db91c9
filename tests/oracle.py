"""What eviction should do, in NumPy and float64: scores, choice, row moves, and the whole rule for one sequence.

Written from the contracts (``ggml-edgekv.h``, ``llama-edgekv.h``), not from the code that they describe.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import gguf
import numpy as np

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
EPS = 2.0**-24  # relative rounding error of float32


# --- keys ------------------------------------------------------------------------------------------------------------


def dequantise(kind: str, rows: np.ndarray) -> np.ndarray:
    """float64 ``[..., n]`` from the bytes ``[..., row bytes]`` of a cache type."""
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()]).astype(np.float64)


def random_rows(rng: np.random.Generator, kind: str, shape: tuple[int, ...], n: int) -> np.ndarray:
    """Bytes ``[*shape, row bytes]`` of rows of n elements: every bit pattern of the quants, moderate scales."""
    if kind in ("f32", "f16"):
        return rng.standard_normal((*shape, n)).astype(kind.replace("f", "float")).view(np.uint8)
    if kind == "bf16":
        return (rng.standard_normal((*shape, n)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    data = rng.integers(0, 256, (*shape, n // block, size), np.uint8)
    n_scales = 2 if kind.endswith("_1") else 1  # a block begins with its scale, and minimum if it has one
    scales = rng.uniform(-1, 1, (*shape, n // block, n_scales)).astype(np.float16)
    data[..., : 2 * n_scales] = scales.view(np.uint8)
    return data.reshape(*shape, -1)


def hadamard(n: int) -> np.ndarray:
    """The orthonormal Walsh-Hadamard matrix in Sylvester's order: the sign of (i, j) is the parity of i & j."""
    i = np.arange(n)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    return (1 - 2 * parity) / np.sqrt(n)


def rotated(filters: np.ndarray, quantised: bool) -> np.ndarray:
    """Filters ``[..., head size]`` in the basis in which K is stored: quantised keys are rotated in blocks of the
    largest power of two that divides the head size, if that is at least 64."""
    size = filters.shape[-1]
    block = size & -size
    if not quantised or block < 64:
        return filters.astype(np.float64)
    blocks = filters.astype(np.float64).reshape(*filters.shape[:-1], size // block, block)
    return (blocks @ hadamard(block).T).reshape(filters.shape)


# --- scores: each with a bound on the error of the same sum in float32 -----------------------------------------------
#
# A sum of n products in float32, in any order, fused or not, is off by at most n * EPS * sum |a_i b_i| to first order.
# Two more roundings pay for the second order and for what is done with the sum afterwards.


def dot(keys: np.ndarray, vec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``<vec, key>`` for keys ``[n, size]``."""
    return keys @ vec, (len(vec) + 2) * EPS * (np.abs(keys) @ np.abs(vec))


def norm(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``|key|``; the square root halves the relative error of the sum."""
    value = np.sqrt((keys**2).sum(axis=-1))
    return value, (keys.shape[-1] / 2 + 3) * EPS * value


def cos(keys: np.ndarray, vec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``<vec, key> / |key|``, 0 for a zero key: the errors of both."""
    value, error = dot(keys, vec)
    length, length_error = norm(keys)
    safe = np.where(length > 0, length, 1)
    result = np.where(length > 0, value / safe, 0)
    return result, np.where(length > 0, error / safe + np.abs(result) * (length_error / safe + EPS), 0)


def key_mean(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of ``key / |key|``, zero keys counting as zero vectors: the norms' error and a last rounding."""
    length, _ = norm(keys)
    unit = keys / np.where(length > 0, length, 1)[:, None]
    return unit.mean(axis=0), (keys.shape[-1] / 2 + 4) * EPS * np.abs(unit).mean(axis=0)


def unlike(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How unlike each row is to the mean of the normalised rows: minus ``<mean, row> / |row|``."""
    mean, mean_error = key_mean(rows)
    value, error = cos(rows, mean)
    return -value, error + np.abs(rows) @ mean_error / np.maximum(norm(rows)[0], 1e-300)


def zscore(value: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(value - mean) / standard deviation``: the errors of the value, of both sums, and of the scale."""
    spread = np.sqrt(value.var() + 1e-12)
    z = (value - value.mean()) / spread
    n = len(value)
    shift = error.mean() + n * EPS * np.abs(value).mean()
    return z, 2 * ((error + shift) / spread + np.abs(z) * ((error.max() + shift) / spread + (n + 4) * EPS))


def policy_scores(policy: str, keys: np.ndarray, values: np.ndarray, vec: np.ndarray | None,
                  ages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one head's tokens (higher stays) and their error bounds; ``vec`` is its filter, ``ages`` how many budgets
    ago each was read."""
    if policy == "qfilters":
        return dot(keys, vec)
    if policy == "streaming":
        return np.arange(len(keys), dtype=np.float64), np.zeros(len(keys))
    if policy == "knorm":
        value, error = norm(keys)
        return -value, error
    if policy == "keydiff":
        return unlike(keys)
    kvdiff = [(1, unlike(keys)), (1, unlike(values)), (1, norm(values))]
    parts = {"kvdiff": lambda: kvdiff, "kvdiff+qfilters+recency": lambda: [*kvdiff, (0.5, dot(keys, vec))],
             "qfilters+keydiff": lambda: [(1, dot(keys, vec)), (1, unlike(keys))]}[policy]()
    scores = [(weight, *zscore(*part)) for weight, part in parts]
    total = sum(weight * value for weight, value, _ in scores)
    error = sum(weight * (error + EPS * np.abs(value)) for weight, value, error in scores)
    if "recency" in policy:
        total, error = total - 1.5 * ages, error + 3 * EPS * (np.abs(total) + 1.5 * ages)
    return total, error


# --- choice and moves ------------------------------------------------------------------------------------------------


def choose(scores: np.ndarray, n_keep: int, window: int, n_chosen: int) -> np.ndarray:
    """The cells of one head that stay, ascending: the first, the last, the best of the rest; a tie goes to the later
    cell, NaN ranks below everything, -0 equals 0."""
    n = len(scores)
    rest = np.arange(n_keep, n - window)
    value = scores[rest] + 0.0
    known = ~np.isnan(value)
    best = np.lexsort((rest, np.where(known, value, 0), known))[::-1]  # the last key counts most
    rest = rest[best[: n_chosen - n_keep - window]]
    return np.sort(np.concatenate([np.arange(n_keep), rest, np.arange(n - window, n)]))


# --- the whole rule --------------------------------------------------------------------------------------------------


@dataclass
class Head:
    """What one KV head of one layer holds: true positions and stored bytes, in cell order."""

    positions: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @classmethod
    def empty(cls, k_bytes: int, v_bytes: int) -> Head:
        return cls(np.empty(0, np.int32), np.empty((0, k_bytes), np.uint8), np.empty((0, v_bytes), np.uint8))

    def take(self, cells) -> Head:
        return Head(self.positions[cells], self.k[cells], self.v[cells])


@dataclass
class Rule:
    """Bounded (or prompt-mode) eviction of one sequence."""

    policy: str
    budget: int
    window: int
    keep: int
    n_ubatch: int
    n_ctx: int
    type_k: str
    type_v: str
    shapes: list[tuple[int, int, int]]  # per cache layer: KV heads, bytes of a head's row of K, of V
    filters: list[np.ndarray] | None = None  # per cache layer [KV heads, head size], as stored keys meet them
    bounded: bool = True

    n_past: int = 0
    floor: int = 0
    n_evictions: int = 0
    heads: dict[tuple[int, int], Head] = field(default_factory=dict)

    def __post_init__(self):
        self.clear()

    @property
    def used(self) -> int:
        return len(self.heads[0, 0].positions)

    def clear(self) -> None:
        self.n_past = self.floor = 0
        self.heads = {(l, h): Head.empty(k, v) for l, (n, k, v) in enumerate(self.shapes) for h in range(n)}

    def due(self, n_tokens: int) -> bool:
        """Whether an eviction precedes a ubatch of n tokens."""
        return self.bounded and self.used + n_tokens > self.budget + self.n_ubatch

    def fits(self, n_tokens: int) -> bool:
        return self.n_past + n_tokens <= self.n_ctx

    def evict(self, budget: int, observed) -> None:
        """Evict. ``observed(layer, head)`` gives the true positions that the runtime kept: where scores are within
        float32 rounding of the threshold, its choice is as good as ours and is taken over; AssertionError otherwise."""
        kept = {}
        for (layer, h), head in self.heads.items():
            vec = self.filters[layer][h] if self.filters is not None else None
            ages = (self.n_past - head.positions) / budget
            scores, error = policy_scores(self.policy, dequantise(self.type_k, head.k), dequantise(self.type_v, head.v), vec, ages)
            ours = choose(scores, self.keep, self.window, budget)
            theirs = np.searchsorted(head.positions, observed(layer, h))
            assert np.array_equal(head.positions[np.minimum(theirs, self.used - 1)], observed(layer, h))
            self._same_but_for_ties(head, scores, error, ours, theirs)
            kept[layer, h] = head.take(theirs)
        self.heads = kept
        self.floor = max(self.floor, self.n_past - self.window)
        self.n_evictions += 1

    def _same_but_for_ties(self, head: Head, scores, error, ours, theirs) -> None:
        assert len(theirs) == len(ours) and (np.diff(theirs) > 0).all()
        lost, extra = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
        if not len(lost):
            return
        # the mandatory cells are no matter of scores
        assert lost.min() >= self.keep and lost.max() < self.used - self.window
        a, b = lost[scores[lost].argmax()], extra[scores[extra].argmin()]
        assert scores[a] - scores[b] <= error[a] + error[b], "a lower score was kept"
        # equal bytes have equal scores in any arithmetic: there the tie rule holds to the letter
        for a in lost:
            for b in extra:
                assert b > a or not np.array_equal(head.k[a], head.k[b]), "a tie went to the earlier cell"

    def append(self, n_tokens: int, new_rows) -> None:
        """``new_rows(layer, head)`` gives K and V as the runtime wrote them."""
        positions = np.arange(self.n_past, self.n_past + n_tokens, dtype=np.int32)
        for (layer, h), head in self.heads.items():
            k, v = new_rows(layer, h)
            self.heads[layer, h] = Head(np.concatenate([head.positions, positions]),
                                        np.concatenate([head.k, k]), np.concatenate([head.v, v]))
        self.n_past += n_tokens

    def removable(self, p0: int, p1: int) -> bool:
        """The rule for removal of positions [p0, p1); negative means from the start, to the end."""
        p0 = max(p0, 0)
        p1 = self.n_past if p1 < 0 else min(p1, self.n_past)
        nothing = p0 >= p1
        everything = p0 == 0 and p1 == self.n_past
        tail = p1 == self.n_past and p0 >= self.floor
        return nothing or everything or tail

    def remove(self, p0: int, p1: int) -> None:
        """A removal that the rule allows: nothing, or a tail."""
        p0 = max(p0, 0)
        p1 = self.n_past if p1 < 0 else min(p1, self.n_past)
        if p0 >= p1:
            return
        n = max(0, self.used - (self.n_past - p0))
        if n == 0:
            self.clear()
        else:
            self.heads = {key: head.take(slice(n)) for key, head in self.heads.items()}
            self.n_past = p0


# --- selection ---------------------------------------------------------------------------------------------------------


def f16_not_below(x: np.ndarray) -> np.ndarray:
    """The least f16 that is not below x, as float64."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float16)
    return np.where(y.astype(np.float64) < x, np.nextafter(y, np.float16(np.inf)), y).astype(np.float64)


def summaries(keys: np.ndarray, page_size: int) -> np.ndarray:
    """keys [..., cells, size] -> [..., pages, 2 * size]: maxima, then minima, rounded outward to f16."""
    parts = [keys[..., c : c + page_size, :] for c in range(0, keys.shape[-2], page_size)]
    high = np.stack([part.max(axis=-2) for part in parts], axis=-2)
    low = np.stack([part.min(axis=-2) for part in parts], axis=-2)
    return np.concatenate([f16_not_below(high), -f16_not_below(-low)], axis=-1)


def page_scores(q: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """q [heads of a group, size], bounds [pages, 2 * size] -> [pages]."""
    high, low = np.split(bounds, 2, axis=-1)
    return np.maximum(q[:, None, :] * high, q[:, None, :] * low).sum(axis=-1).max(axis=0)


def choose_pages(scores: np.ndarray, visible: np.ndarray, page_size: int, n_first: int, n_chosen: int) -> np.ndarray:
    """scores [pages], visible [cells] -> [n_chosen]: first pages, last page and the best of the rest, then -1."""
    seen = [p for p in range(len(scores)) if visible[p * page_size : (p + 1) * page_size].any()]
    if len(seen) > n_chosen:
        rest = seen[n_first:-1]
        values = np.array([-np.inf if np.isnan(scores[p]) else scores[p] for p in rest])
        known = np.array([not np.isnan(scores[p]) for p in rest])
        order = np.lexsort((rest, values, known))[::-1]  # the best first, of equal ones the later
        seen = sorted([*seen[:n_first], *(rest[i] for i in order[: n_chosen - n_first - 1]), seen[-1]])
    return np.array([*seen, *[-1] * (n_chosen - len(seen))], np.int32)


def attention(q, keys, values, mask, scale: float, softcap: float = 0.0, sink: float | None = None) -> np.ndarray:
    """One query head: q [size], keys [cells, size], values [cells, size of V], mask [cells] -> [size of V]."""
    s = scale * (keys @ q)
    if softcap:
        s = softcap * np.tanh(s / softcap)
    s = s + mask
    top = max(s.max(initial=-np.inf), -np.inf if sink is None else sink)
    if top == -np.inf:
        return np.zeros(values.shape[-1])
    w = np.exp(s - top)
    return w @ values / (w.sum() + (0.0 if sink is None else np.exp(sink - top)))
