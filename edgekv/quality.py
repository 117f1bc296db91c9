"""How well Q-Filters fit their model: does the score of a key tell how much attention the key will get?

A run of the model itself, as in :mod:`edgekv.attention`: a text is read, its last tokens as decode steps. Their queries
and the cached keys give, in float64, the true attention of each cell. For every KV head this is compared with what the
filter says of the same keys by Spearman's rank correlation, the same for K-norm (arXiv 2406.11430, which keeps the keys
of the smallest norm), and counted is how many of the queries project positively on the filter, as the method assumes of
nearly all (arXiv 2503.02812, section 3).

Calibration stores a report of the same kind with the filters, see :mod:`edgekv.filters`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.filters import QFilters, read
from edgekv.gguf_file import GGUF

N_STEPS = 64
N_SINKS = 4  # the first tokens, which evictions always keep: their scores decide nothing

# The rule for marks. For normal projections both bounds say the same.
MIN_POSITIVE = 0.9    # share of the queries that project positively on the filter
MIN_ONE_SIDED = 0.79  # mean / root mean square of the projections


@dataclass(frozen=True)
class FilterQuality:
    """What was found out about filters, float64 ``[n_layers, n_head_kv]``, NaN where a layer has fewer KV heads than
    another; None for what was not measured.

    Attributes:
        layers: the layers of the model that have the filters.
        spearman: rank correlation of the filter's score with the attention that the keys get.
        spearman_knorm: the same of K-norm's score.
        positive: share of the queries whose projection on the filter is positive.
        energy, one_sided: see the calibration report in :mod:`edgekv.filters`.
        n_tokens, n_steps: of the text; the last ones, whose queries were used. 0 for a stored report.
    """

    layers: list[int]
    spearman: np.ndarray | None = None
    spearman_knorm: np.ndarray | None = None
    positive: np.ndarray | None = None
    energy: np.ndarray | None = None
    one_sided: np.ndarray | None = None
    n_tokens: int = 0
    n_steps: int = 0

    @property
    def marked(self) -> np.ndarray:
        """The heads that their filter does not fit, bool ``[n_layers, n_head_kv]``: less than ``MIN_POSITIVE`` of the
        queries project positively, or ``one_sided`` is below ``MIN_ONE_SIDED``, or the correlation is not positive."""
        marks = np.zeros((len(self.layers), 1), bool)
        if self.positive is not None:
            marks = marks | (self.positive < MIN_POSITIVE)
        if self.one_sided is not None:
            marks = marks | (self.one_sided < MIN_ONE_SIDED)
        if self.spearman is not None:
            marks = marks | (self.spearman <= 0)
        return marks

    def marked_heads(self) -> list[tuple[int, int]]:
        """The same as (layer of the model, KV head)."""
        return [(self.layers[row], int(head)) for row, head in np.argwhere(self.marked)]


def stored(filters: QFilters) -> FilterQuality | None:
    """The calibration report that filters carry; None if they carry none."""
    if not filters.report:
        return None
    return FilterQuality(filters.layers, **{name: _padded(filters.by_layer(name)) for name in filters.report})


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two series, equal values sharing their mean rank. 0 if one of them is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / size, -1, 1)) if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def judge(session, vectors: dict[int, np.ndarray], tokens: list[int], n_steps: int, score,
          each: Callable[[int], None] = lambda n: None) -> dict[str, list[np.ndarray]]:
    """Judge filters on tokens, in a session with ``tap_queries`` whose cache is empty.

    The keys that are judged are those of the tokens between the first ``N_SINKS`` and the last ``n_steps``. The
    attention of a key is its share of the softmax over all keys that a query sees, the mean over the steps and over the
    query heads of the group.

    Args:
        vectors: model layer -> filters ``[n_head_kv, head_size]``.
        score: see :class:`edgekv.attention.Score`.
        each: is told how many tokens were read.

    Returns:
        ``spearman``, ``spearman_knorm`` and ``positive``: per layer of ``vectors``, float64 ``[n_head_kv]``.

    Raises:
        EdgekvError: queries or keys are not finite.
    """
    from edgekv.attention import decode_steps, page_mass

    n_prompt = len(tokens) - n_steps
    session.read(tokens[:n_prompt], each=each)
    queries, _ = decode_steps(session, tokens[n_prompt:], n_prompt, each)

    found: dict[str, list[np.ndarray]] = {"spearman": [], "spearman_knorm": [], "positive": []}
    numbers = {layer.il: i for i, layer in enumerate(session.layers())}
    for il, filters in vectors.items():
        i_layer, heads = numbers[il], []
        groups = np.split(queries[i_layer], len(filters), axis=1)
        for h, (f, group) in enumerate(zip(filters.astype(np.float64), groups)):
            keys = session.rows(i_layer, h, values=False).view(np.float16).astype(np.float64)
            if not (np.isfinite(keys).all() and np.isfinite(group).all()):
                raise EdgekvError(f"the keys or queries of layer {il} are not finite; the model file is damaged")
            mass = page_mass(group, keys, np.arange(n_prompt, len(tokens)), 1, score).mean(axis=0)
            judged = keys[N_SINKS:n_prompt]
            heads.append((spearman(judged @ f, mass[N_SINKS:n_prompt]),
                          spearman(-np.linalg.norm(judged, axis=1), mass[N_SINKS:n_prompt]), (group @ f > 0).mean()))
        for name, values in zip(found, zip(*heads)):
            found[name].append(np.array(values))
    return found


def measure(
    path: str | os.PathLike[str],
    text: str,
    *,
    filters: QFilters | None = None,
    length: int | None = None,
    n_steps: int = N_STEPS,
    n_threads: int | None = None,
    progress: bool = False,
    source: str = "the text",
) -> FilterQuality:
    """Judge a model's filters on a text; see :func:`judge` for what is compared.

    Args:
        filters: default: those in the model's file.
        length: tokens of the text that are used; default: all, but no more than 4,096 and the trained context.
        n_steps: the last of them, whose queries say what attention is.
        source: what errors call the text.

    Raises:
        EdgekvError: there are no filters or they do not fit, the text is too short, the model cannot be loaded, or its
            attention cannot be judged.
    """
    gguf = GGUF(path)
    filters = filters or read(gguf)
    if filters is None:
        raise EdgekvError(f"{path}: has no Q-Filters; edgekv convert {path} --with-qfilters adds them")
    filters.validate(gguf)

    from edgekv.attention import Score, context_for, first_tokens
    from edgekv.progress import bar
    from edgekv.session import Session

    score = Score.of(gguf)
    n_before = N_SINKS + 2  # a rank correlation needs two keys
    n_ctx = context_for(gguf, length, n_steps, n_before)

    with Session(path, n_ctx=n_ctx, n_threads=n_threads, flash_attn=True, tap_queries=True) as session:
        tokens = first_tokens(session, text, n_ctx, length, n_steps, n_before, source)
        cached = {layer.il for layer in session.layers()}
        vectors = {il: v for il, v in zip(filters.layers, filters.vectors) if il in cached}
        if not vectors:
            raise EdgekvError(f"{path}: its Q-Filters are for none of the layers that attend to the whole text")
        with bar("reading", len(tokens), unit="tokens", show=progress) as advance:
            found = judge(session, vectors, tokens, n_steps, score, advance)
    return FilterQuality(list(vectors), **{name: _padded(layers) for name, layers in found.items()},
                         n_tokens=len(tokens), n_steps=n_steps)


def _padded(layers: list[np.ndarray]) -> np.ndarray:
    result = np.full((len(layers), max(map(len, layers))), np.nan)
    for row, values in zip(result, layers):
        row[: len(values)] = values
    return result
