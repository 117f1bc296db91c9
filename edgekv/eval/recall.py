"""How much of a model's true attention a setting holds: in the tokens that an eviction keeps, in the pages that a
selection reads, against the best possible choice of as many.

A run of the model itself, as in :mod:`edgekv.attention`: a text is read, its last tokens as decode steps, and their
queries and the cached keys give the attention weights in float64.

**Evictions** are judged by the steps of the full cache. Every setting evicts from a copy of the prompt's cache, and the
steps are read behind the whole prompt. The attention of a key is the sum of its weights over all steps and over the
query heads that share the KV head. Every share has the same denominator, the attention that goes to the tokens of the
prompt; what the steps pay to each other is never evicted and counts neither above nor below the line. With n tokens
that stay in a KV head, a share is that of

``held``    the tokens that stay;
``best``    the n that hold the most among the choices that keep the same sinks and window as the eviction does;
``top``     the n that hold the most;
``random``  the same sinks and window and a random choice of the others, in expectation;
``window``  the sinks and the last tokens, n in all (StreamingLLM, arXiv 2309.17453).

**Selections** are judged by their own steps, and a share is a mean over the steps and over the query heads, or the sets
of query heads, that choose pages; its denominator is all attention, also that to the newest tokens. ``held``, ``best``
and ``window`` are those of :mod:`edgekv.attention`: in the pages that were read, in the best of as many, in the first
page and the newest ones, as many. Where query heads choose for themselves, so does ``best``.

With ``values`` every weight is multiplied by the norm of the key's V: what the token adds to the output of the head, as
far as its length tells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.eval.setting import ON_DEMAND, Setting
from edgekv.filters import QFilters, read
from edgekv.gguf_file import GGUF
from edgekv.progress import bar
from edgekv.settings import EvictionSettings, needs_filters

if TYPE_CHECKING:
    from edgekv.attention import Score
    from edgekv.session import Session

N_STEPS = 64
FIGURES = ("held", "best", "top", "random", "window")
OF_SELECTION = ("held", "best", "window")


@dataclass(frozen=True)
class Recall:
    """What one setting holds: shares, float64 ``[n_layers, n_head_kv]``, NaN where a layer has fewer KV heads than
    another; see the module for their meaning.

    Attributes:
        layers: the layers of the model that were judged: those that are evicted from, or that a part may be read of.
        tokens: that stay per KV head, or that are read per step, in whole pages; the mean.
        part: the same as a share of the prompt's tokens, or of the pages that had something to read.
        top, random: of evictions only.
    """

    setting: Setting
    layers: list[int]
    tokens: float
    part: float
    held: np.ndarray
    best: np.ndarray
    window: np.ndarray
    top: np.ndarray | None = None
    random: np.ndarray | None = None

    @property
    def figures(self) -> dict[str, np.ndarray]:
        """Name -> shares, without those that selections do not have."""
        return {name: values for name in FIGURES if (values := getattr(self, name)) is not None}

    def mean(self, name: str = "held") -> float:
        """Over all KV heads."""
        return float(np.nanmean(getattr(self, name)))

    def least(self, name: str = "held") -> tuple[float, int, int]:
        """The lowest share, the layer of the model and the KV head that have it."""
        values = getattr(self, name)
        row, head = np.unravel_index(np.nanargmin(values), values.shape)
        return float(values[row, head]), self.layers[row], int(head)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: a list per layer, one number per KV head that the layer has."""
        return {
            "setting": self.setting.label,
            "kind": "selection" if self.top is None else "eviction",
            "tokens": self.tokens,
            "part": self.part,
            "mean": {name: self.mean(name) for name in self.figures},
            "least": {name: self.least(name)[0] for name in self.figures},
            "least_held_in": list(self.least()[1:]),
            "layers": [{"layer": il, **{name: [float(x) for x in values[i] if x == x]
                                        for name, values in self.figures.items()}}
                       for i, il in enumerate(self.layers)],
        }


@dataclass(frozen=True)
class RecallReport:
    """What was found on one text, or on several (:func:`pooled`).

    Attributes:
        results: one for every setting that evicts or selects, in the order of the settings.
        sources, n_prompt: of each text its name and the tokens before the steps.
        n_steps: the last tokens of a text, whose queries say what attention is.
        values: whether weights were multiplied by the norm of V.
        prompt: the share of all attention that the steps pay to the prompt, float64 ``[n_layers, n_head_kv]``: of this
            the shares of evictions are shares. None without evictions.
    """

    results: list[Recall]
    sources: list[str]
    n_prompt: list[int]
    n_steps: int
    values: bool
    prompt: np.ndarray | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "texts": [{"text": s, "n_prompt": n} for s, n in zip(self.sources, self.n_prompt)],
            "n_steps": self.n_steps,
            "values": self.values,
            "prompt": None if self.prompt is None else float(np.nanmean(self.prompt)),
            "settings": [result.as_dict() for result in self.results],
        }


def pooled(reports: Sequence[RecallReport]) -> RecallReport:
    """One report of several texts, which count alike: the means of their figures, head by head.

    ValueError unless all are of the same settings, steps and weights.
    """
    first = reports[0]
    for other in reports[1:]:
        same = [(r.setting, r.layers) for r in first.results] == [(r.setting, r.layers) for r in other.results]
        if not same or (first.n_steps, first.values) != (other.n_steps, other.values):
            raise ValueError("reports of different settings")
    results = []
    for of_texts in zip(*(report.results for report in reports)):
        names = ("tokens", "part", *of_texts[0].figures)
        means = {name: np.mean([getattr(r, name) for r in of_texts], axis=0) for name in names}
        means.update({name: float(means[name]) for name in ("tokens", "part")})
        results.append(replace(of_texts[0], **means))
    return replace(
        first,
        results=results,
        sources=[s for report in reports for s in report.sources],
        n_prompt=[n for report in reports for n in report.n_prompt],
        prompt=None if first.prompt is None else np.mean([report.prompt for report in reports], axis=0),
    )


def eviction_shares(mass: np.ndarray, kept: np.ndarray, keep: int, window: int) -> np.ndarray:
    """What an eviction holds in one KV head, beside other choices of as many tokens.

    Args:
        mass: the attention of each token of the prompt, ``[n_prompt]``, in any unit.
        kept: the positions that stayed, ascending.
        keep, window: the first and the last tokens, which an eviction must keep.

    Returns:
        float64 ``[5]`` in the order of ``FIGURES``; all are 1 where the prompt gets no attention.
    """
    n, n_kept = len(mass), len(kept)
    stays = np.zeros(n, bool)
    stays[kept] = True
    position = np.arange(n)
    duty = stays & ((position < keep) | (position >= n - window))
    n_free, rest = n_kept - duty.sum(), mass[~duty]
    on_duty = mass[duty].sum()
    sinks = min(keep, n_kept)
    held = np.array([
        mass[stays].sum(),
        on_duty + np.sort(rest)[len(rest) - n_free :].sum(),
        np.sort(mass)[n - n_kept :].sum(),
        on_duty + rest.sum() * n_free / max(len(rest), 1),
        mass[:sinks].sum() + mass[n - (n_kept - sinks) :].sum(),
    ])
    return _share(held, np.full(len(held), mass.sum()))


def measure(
    path: str | os.PathLike[str],
    text: str,
    settings: Sequence[Setting],
    *,
    length: int | None = None,
    n_steps: int = N_STEPS,
    values: bool = False,
    filters: QFilters | None = None,
    n_threads: int | None = None,
    progress: bool = False,
    source: str = "the text",
) -> RecallReport:
    """Judge settings on a text: its last ``n_steps`` tokens are decode steps, those before them the prompt.

    Args:
        settings: those that neither evict nor select hold everything and are passed over. Budgets such as ``x4`` are
            shares of the prompt.
        length: tokens of the text that are used; default: all, but no more than 4,096 and the trained context.
        values: weigh with the norm of V.
        filters: for policies that need them; default: those in the model's file.
        source: what errors call the text.

    Raises:
        EdgekvError: a setting cannot be judged, filters are missing, the text is too short, the model cannot be loaded,
            or its attention cannot be judged.
    """
    gguf = GGUF(path)
    evictions, selections = _split(settings)
    filters = _filters(gguf, evictions, filters)

    from edgekv.attention import Score, context_for, decode_steps, first_tokens, judged_layers
    from edgekv.session import Session

    score = Score.of(gguf)
    n_ctx = context_for(gguf, length, n_steps, 1)
    # the text is read once: a context that selects loads its state, so it has to have as many sequences, and evictions
    common = dict(n_ctx=n_ctx, n_threads=n_threads, flash_attn=True, tap_queries=True,
                  n_seq_max=2 if evictions else 1, settings=ON_DEMAND if evictions else None)
    found: dict[Setting, Recall] = {}
    prompt = None

    with Session(path, **common) as session:
        tokens = first_tokens(session, text, n_ctx, length, n_steps, 1, source)
        n_prompt = len(tokens) - n_steps
        judged = [judged_layers(session, s.selection) for s in selections]
        budgets = [s.eviction(n_prompt) for s in evictions]
        with bar("reading", len(tokens), unit="tokens", show=progress) as advance:
            session.read(tokens[:n_prompt], each=advance)
            state = session.save(0) if selections else b""
            kept = [_evicted(session, budget, filters) for budget in budgets]
            if evictions:
                queries, _ = decode_steps(session, tokens[n_prompt:], n_prompt, advance)
        if evictions:
            layers = [layer.il for layer in session.layers()]
            figures, prompt = _judge(session, queries, n_prompt, kept, budgets, score, values)
            for setting, stays, parts in zip(evictions, kept, figures):
                n_kept = float(np.mean([len(positions) for heads in stays for positions in heads]))
                found[setting] = Recall(setting, layers, n_kept, n_kept / n_prompt, **dict(zip(FIGURES, parts)))

    with bar("selecting", n_steps * len(selections), unit="steps", show=progress and bool(selections)) as advance:
        for i, setting in enumerate(selections):
            with Session(path, selection=setting.selection, **common) as session:
                session.load(state, 0)
                found[setting] = _selected(session, setting, judged[i], tokens, n_prompt, score, values, advance)

    results = [found[s] for s in dict.fromkeys(settings) if s in found]
    return RecallReport(results, [source], [n_prompt], n_steps, values, prompt)


def _split(settings: Sequence[Setting]) -> tuple[list[Setting], list[Setting]]:
    """The settings that evict and those that select, each once."""
    for s in settings:
        if s.cache != ("f16", "f16"):
            raise EdgekvError(f"-ctk {s.type_k} -ctv {s.type_v}: a cache that keeps every token holds all attention; "
                              "eval attention judges evictions and selections of an f16 cache")
        if s.policy != "none" and s.selection.method != "none":
            raise EdgekvError(f"{s.label}: an eviction and a selection are judged one by one, not together")
    evictions = [s for s in dict.fromkeys(settings) if s.policy != "none"]
    selections = [s for s in dict.fromkeys(settings) if s.selection.method != "none"]
    if not evictions + selections:
        raise EdgekvError("nothing to judge: give --kv-evict with --kv-budget, or --kv-select")
    return evictions, selections


def _filters(gguf: GGUF, evictions: Sequence[Setting], filters: QFilters | None) -> QFilters | None:
    if not any(needs_filters(s.policy) for s in evictions):
        return None
    filters = filters or read(gguf)
    if filters is None:
        raise EdgekvError(f"{gguf.path}: has no Q-Filters; edgekv convert {gguf.path} --with-qfilters adds them")
    filters.validate(gguf)
    return filters


def _evicted(session: Session, settings: EvictionSettings, filters: QFilters | None) -> list[list[np.ndarray]]:
    """The positions that stay in a copy of sequence 0, which is gone afterwards: per layer of the cache and KV head."""
    from edgekv import native

    session.copy(0, 1)
    if fault := native.last_error():
        raise EdgekvError(fault)
    session.evict_as(settings, filters, seq_id=1)
    kept = [[session.positions(i, h, seq_id=1) for h in range(layer.n_head_kv)]
            for i, layer in enumerate(session.layers())]
    session.remove(0, -1, seq_id=1)
    return kept


def _judge(session: Session, queries: list[np.ndarray], n_prompt: int, kept: list[list[list[np.ndarray]]],
           budgets: list[EvictionSettings], score: Score, values: bool) -> tuple[np.ndarray, np.ndarray]:
    """``[n_settings, 5, n_layers, n_head_kv]``, and the prompt's share of all attention ``[n_layers, n_head_kv]``."""
    layers = session.layers()
    shape = len(layers), max(layer.n_head_kv for layer in layers)
    figures, prompt = np.full((len(kept), len(FIGURES), *shape), np.nan), np.full(shape, np.nan)
    for i, layer in enumerate(layers):
        for h, group in enumerate(np.split(queries[i], layer.n_head_kv, axis=1)):
            mass = _mass(session, i, h, group, n_prompt, score, values).sum(axis=0)
            prompt[i, h] = _share(mass[:n_prompt].sum(), mass.sum())
            for s, budget in enumerate(budgets):
                figures[s, :, i, h] = eviction_shares(mass[:n_prompt], kept[s][i][h], budget.keep, budget.window)
    return figures, prompt


def _selected(session: Session, setting: Setting, judged: list[int], tokens: list[int], n_prompt: int, score: Score,
              values: bool, advance: Callable[[int], None]) -> Recall:
    """Judge the steps of a context that selects and has the prompt in its cache, in the layers ``judged`` of the cache.
    """
    from edgekv import attention

    size, layers = setting.selection.page_size, session.layers()
    queries, chosen = attention.decode_steps(session, tokens[n_prompt:], n_prompt, advance)
    newest = np.arange(n_prompt, len(tokens)) // size
    starts = np.arange(0, len(tokens), size)
    figures = np.full((len(OF_SELECTION), len(judged), max(layers[i].n_head_kv for i in judged)), np.nan)
    n_read = n_total = n_choices = 0
    for row, i in enumerate(judged):
        layer = layers[i]
        # a choice is made for all query heads of a KV head together, or for each of them
        n_sets = next((p.shape[1] for p in chosen[i] if p is not None), layer.n_head_kv)
        pages = attention.whole_choices(chosen[i], n_sets, newest)
        n_read += int((pages >= 0).sum())
        n_total += int((newest + 1).sum()) * n_sets
        n_choices += len(newest) * n_sets
        sets = np.split(queries[i], n_sets, axis=1)
        per_head = n_sets // layer.n_head_kv
        for h in range(layer.n_head_kv):
            parts = []
            for c in range(h * per_head, (h + 1) * per_head):
                mass = _mass(session, i, h, sets[c], n_prompt, score, values)
                by_page = np.add.reduceat(mass, starts, axis=1)
                held = np.stack(attention.shares(by_page, pages[:, c], newest))
                parts.append(_share(held, np.broadcast_to(mass.sum(axis=1), held.shape)).mean(axis=1))
            figures[:, row, h] = np.mean(parts, axis=0)
    return Recall(setting, [layers[i].il for i in judged], n_read * size / n_choices, n_read / n_total,
                  **dict(zip(OF_SELECTION, figures)))


def _mass(session: Session, i_layer: int, head: int, queries: np.ndarray, n_prompt: int, score: Score,
          values: bool) -> np.ndarray:
    """The attention that every cell gets from each step, float64 ``[n_steps, n_cells]``: the mean over the query heads,
    with ``values`` times the norm of V. EdgekvError if something is not finite."""
    from edgekv.attention import page_mass

    keys = session.rows(i_layer, head, values=False).view(np.float16)
    norms = np.ones(len(keys))
    if values:
        norms = np.linalg.norm(session.rows(i_layer, head, values=True).view(np.float16).astype(np.float64), axis=1)
    if not all(np.isfinite(x).all() for x in (queries, keys, norms)):
        raise EdgekvError(f"the queries, keys or values of layer {session.layers()[i_layer].il} are not finite; "
                          "the model file is damaged")
    return page_mass(queries, keys, n_prompt + np.arange(len(queries)), 1, score) * norms


def _share(part, total):
    """``part / total``, float64; 1 where there is nothing to hold."""
    part, total = np.asarray(part, np.float64), np.asarray(total, np.float64)
    return np.divide(part, total, out=np.ones_like(part), where=total > 0)
