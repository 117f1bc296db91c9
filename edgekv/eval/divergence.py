"""How far compression moves a model's predictions from those with the full cache: behind ``edgekv eval kl``.

The figures are those of ``llama-perplexity --kl-divergence`` under its names, with the full f16 cache as its base
model: the Kullback-Leibler divergence ``sum p_base (ln p_base - ln p)`` over the vocabulary, whether both give the most
probability to the same token, and by how much the probability of the true next token changes. Ours are computed in
float64 from the logits themselves; llama-perplexity rounds those of the base to 16 bits, leaves out tokens of less
probability than ``exp(-16)``, and counts the second half of each window only (``start`` does that here).

The full cache and the settings read the same ubatch, their logits are compared, and only figures are kept. How a
bounded cache breathes, and what "behind the budget" means, is said in :mod:`edgekv.eval.perplexity`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekv.errors import EdgekvError
from edgekv.eval import perplexity
from edgekv.eval.perplexity import Records, Text, Watch, block_mean, key
from edgekv.eval.setting import Setting
from edgekv.filters import QFilters
from edgekv.progress import bar
from edgekv.session import Session

_FIGURES = ("kld", "delta_p", "same_top", "nll", "nll_base")

# of :meth:`Divergence.statistics` -> as llama-perplexity prints it (and in its unit: shares in per cent)
NAMES = {
    "ppl": "Mean PPL(Q)",
    "ppl_base": "Mean PPL(base)",
    "ln_ppl_ratio": "Mean ln(PPL(Q)/PPL(base))",
    "kld_mean": "Mean KLD",
    "kld_max": "Maximum KLD",
    "kld_999": "99.9% KLD",
    "kld_99": "99.0% KLD",
    "kld_median": "Median KLD",
    "delta_p_mean": "Mean Δp",
    "delta_p_rms": "RMS Δp",
    "same_top": "Same top p",
}


@dataclass(frozen=True)
class Divergence:
    """What one setting changes, at every position that has a next token: arrays ``[n_texts, length - 1]``.

    Attributes:
        kld: KL divergence of the predictions from those with the full cache, in nats.
        delta_p: probability of the true next token, minus that with the full cache.
        same_top: whether both put the same token first.
        nll, nll_base: loss of the next token, in nats, here and with the full cache.
        n_ubatch, cells_used, cells_allocated, kv_bytes, scratch_bytes, n_evictions: see
            :class:`edgekv.eval.perplexity.Loss`.
    """

    setting: Setting
    texts: list[str]
    kld: np.ndarray
    delta_p: np.ndarray
    same_top: np.ndarray
    nll: np.ndarray
    nll_base: np.ndarray
    n_ubatch: int
    cells_used: int
    cells_allocated: int
    kv_bytes: int
    scratch_bytes: int
    n_evictions: int

    @property
    def length(self) -> int:
        return self.kld.shape[1] + 1

    @property
    def behind(self) -> int | None:
        """The first position where every query sees an evicted cache; None if there is none."""
        return perplexity.behind(self.setting, self.length, self.n_ubatch)

    def statistics(self, start: int = 0) -> dict[str, float]:
        """The figures of ``NAMES`` over the positions from ``start`` on, and the ends of bootstrap intervals (95 %,
        over blocks of tokens) of ``kld_mean`` and ``same_top``. Probabilities are shares, not per cent; quantiles are
        interpolated between two values."""
        kld, delta_p, same_top, nll, base = (getattr(self, name)[:, start:] for name in _FIGURES)
        mean_kld, mean_same = block_mean(kld), block_mean(same_top.astype(np.float64))
        return {
            "ppl": math.exp(nll.mean()),
            "ppl_base": math.exp(base.mean()),
            "ln_ppl_ratio": float((nll - base).mean()),
            "kld_mean": mean_kld.mean,
            "kld_mean_low": mean_kld.low,
            "kld_mean_high": mean_kld.high,
            "kld_max": float(kld.max()),
            "kld_999": float(np.quantile(kld, 0.999)),
            "kld_99": float(np.quantile(kld, 0.99)),
            "kld_median": float(np.median(kld)),
            "delta_p_mean": float(delta_p.mean()),
            "delta_p_rms": math.sqrt((delta_p**2).mean()),
            "same_top": mean_same.mean,
            "same_top_low": mean_same.low,
            "same_top_high": mean_same.high,
        }


def evaluate(
    path: str | os.PathLike[str],
    texts: Sequence[Text],
    settings: Sequence[Setting],
    *,
    length: int,
    journal: Records,
    n_ubatch: int = 32,
    flash_attn: bool = True,
    n_threads: int | None = None,
    filters: QFilters | None = None,
    n_gpu_layers: int | None = None,
    rpc_servers: str | Sequence[str] = (),
    at_once: int = 4,
    progress: bool = False,
) -> list[Divergence]:
    """What every setting changes, in their order. The full cache among them is compared with itself, in a second
    context: all zero unless something is wrong.

    Args:
        at_once: settings that are read beside the full cache, each with a context and model of its own. The full cache
            is read again for the next ones.
        others: as :func:`edgekv.eval.perplexity.evaluate`.

    Raises:
        EdgekvError: as there.
    """
    if at_once < 1:
        raise EdgekvError(f"{at_once} settings at once: at least 1 is needed beside the full cache")
    open_session = perplexity.prepare(
        path, texts, settings, length=length, n_ubatch=n_ubatch, flash_attn=flash_attn, n_threads=n_threads,
        filters=filters, n_gpu_layers=n_gpu_layers, rpc_servers=rpc_servers)

    missing = {s: [i for i, text in enumerate(texts) if key("kl", s, i, text) not in journal.done] for s in settings}
    waiting = [s for s in settings if missing[s]]
    groups = [waiting[i : i + at_once] for i in range(0, len(waiting), at_once)]
    readings = sum(len(set().union(*(missing[s] for s in group))) + sum(len(missing[s]) for s in group)
                   for group in groups)
    with bar("comparing", readings * length, unit="tokens", show=progress) as advance:
        for group in groups:
            with ExitStack() as stack:
                full = stack.enter_context(open_session(Setting()))
                sessions = {s: stack.enter_context(open_session(s)) for s in group}
                for i, text in enumerate(texts):
                    here = {s: session for s, session in sessions.items() if i in missing[s]}
                    for s, record in _read(full, here, text, n_ubatch, advance).items():
                        journal.add(key("kl", s, i, text), record)

    results = []
    for s in settings:
        records = [journal.done[key("kl", s, i, text)] for i, text in enumerate(texts)]
        figures = {name: np.array([record[name] for record in records], np.float64) for name in _FIGURES}
        figures["same_top"] = figures["same_top"] > 0
        results.append(Divergence(s, [text.name for text in texts], **figures, n_ubatch=n_ubatch,
                                  **perplexity.cache_figures(records)))
    return results


def _read(full: Session, sessions: Mapping[Setting, Session], text: Text, n_ubatch: int,
          advance: Callable[[int], None]) -> dict[Setting, dict[str, Any]]:
    """Records of all ``sessions``, which read a text in step with the full cache; nothing if there are none."""
    if not sessions:
        return {}
    for session in (full, *sessions.values()):
        session.clear()
    watches = {s: Watch(session) for s, session in sessions.items()}
    found: dict[Setting, list[dict[str, np.ndarray]]] = {s: [] for s in sessions}
    tokens = np.array(text.tokens)
    for start in range(0, len(tokens), n_ubatch):
        chunk = tokens[start : start + n_ubatch]
        base = _predictions(full, chunk, start, tokens, f"{text.name}, full cache")
        for s, session in sessions.items():
            figures = compare(base, _predictions(session, chunk, start, tokens, f"{text.name}, {s.label}"))
            if not np.isfinite(figures["kld"]).all():
                raise EdgekvError(f"{text.name}, {s.label}: tokens that the full cache may choose have no chance at all: "
                                  "the divergence is infinite")
            found[s].append(figures)
            watches[s].look()
        advance(len(chunk) * (1 + len(sessions)))

    records = {}
    for s, parts in found.items():
        joined = {name: np.concatenate([part[name] for part in parts]) for name in _FIGURES}
        # rounded: a divergence may be tiny, losses and probabilities are good to a millionth
        records[s] = {name: [float(f"{v:.7g}") for v in joined[name]] if name == "kld"
                      else joined[name].astype(int).tolist() if name == "same_top"
                      else joined[name].round(6).tolist() for name in _FIGURES} | watches[s].figures()
    return records


@dataclass(frozen=True)
class Predictions:
    """Of some positions that have a next token: float64 log-probabilities ``[n, n_vocab]``, and the loss of that token
    ``[n]``."""

    log_p: np.ndarray
    nll: np.ndarray


def _predictions(session: Session, chunk: np.ndarray, start: int, tokens: np.ndarray, where: str) -> Predictions:
    log_p = perplexity.log_softmax(session.decode(chunk, start, logits="all"), where)
    nll = perplexity.next_losses(log_p, tokens, start, where)
    return Predictions(log_p[: len(nll)], nll)


def compare(base: Predictions, other: Predictions) -> dict[str, np.ndarray]:
    """The figures of each position. A token that the base cannot give counts nothing; among equally likely tokens the
    first is on top."""
    p = np.exp(base.log_p)
    apart = np.subtract(base.log_p, other.log_p, out=np.zeros_like(p), where=p > 0)
    return {
        "kld": np.maximum((p * apart).sum(axis=1), 0),  # it is never negative but for rounding
        "delta_p": np.exp(-other.nll) - np.exp(-base.nll),
        "same_top": base.log_p.argmax(axis=1) == other.log_p.argmax(axis=1),
        "nll": other.nll,
        "nll_base": base.nll,
    }


def rows(results: Sequence[Divergence]) -> list[dict[str, Any]]:
    """A table: one row per setting, over all positions, and behind the budget (``behind_...``) where there is such a
    part; None elsewhere and where an interval is not known."""

    def known(figures: Mapping[str, float]) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in figures.items()}

    table = []
    for r in results:
        figures = known(r.statistics())
        later = {} if r.behind is None else known(r.statistics(r.behind))
        table.append({
            "setting": r.setting.label,
            "method": r.setting.method,
            "budget": r.setting.eviction(r.length, "bounded").budget or None,
            "n_texts": len(r.texts),
            "length": r.length,
            "n_ubatch": r.n_ubatch,
            **figures,
            "behind": r.behind,
            **{f"behind_{name}": later.get(name) for name in figures},
            "cells_used": r.cells_used,
            "cells_allocated": r.cells_allocated,
            "kv_bytes": r.kv_bytes,
            "scratch_bytes": r.scratch_bytes,
            "n_evictions": r.n_evictions,
        })
    return table
