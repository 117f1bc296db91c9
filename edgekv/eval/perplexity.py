"""Loss along a text in a bounded cache: the library behind ``edgekv eval ppl``.

How it measures:

- A text is read once per setting, ``n_ubatch`` tokens at a time, in a cache that is bounded while it reads, as a long
  generation has it. The logits of every token are computed, and from them, in float64, the loss of the token that
  follows: minus the natural logarithm of its probability. Loss ``i`` is that of token ``i + 1``, predicted at position
  ``i``; the first one counts too. (llama-perplexity counts the second half of each window only.)
- A budget of 512 means that 512 tokens are left by each eviction. They come before a ubatch that the cache has no room
  for, so a query sees between ``budget + 1`` and ``budget + n_ubatch`` tokens; small ubatches are nearer to generation,
  which decodes token by token, and take longer.
- Nothing is evicted before position ``budget``, so there all policies have the full cache's loss. From position
  ``budget + n_ubatch`` on every query sees an evicted cache: "behind the budget".
- Every loss is stored, rounded to a millionth of a nat, so that settings are compared token by token. A budget that the
  text does not exceed is read like any other; its losses are those of the full cache.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekv import calibrate
from edgekv.attention import DECODE_TOKENS
from edgekv.errors import EdgekvError
from edgekv.eval.setting import Setting
from edgekv.eval.stats import Interval, Paired, mean_interval, paired
from edgekv.filters import QFilters
from edgekv.gguf_file import GGUF
from edgekv.progress import bar
from edgekv.session import CACHE_TYPES, Session, Vocabulary
from edgekv.settings import FLOAT_TYPES, needs_filters

BLOCK = 64  # tokens: losses that are near each other are not independent, so whole blocks are drawn
N_RESAMPLES = 10_000
_HELD = 1 << 21  # numbers held at a time


class Records(Protocol):
    """What is asked of a journal: results so far by key, and a way to add one."""

    @property
    def done(self) -> Mapping[str, Any]: ...

    def add(self, key: str, record: Any) -> None: ...


@dataclass(frozen=True)
class Text:
    """Tokens to read, begun as the model begins a text; ``name`` says where they are from."""

    name: str
    tokens: tuple[int, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.array(self.tokens, np.int32).tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Loss:
    """What one setting costs.

    Attributes:
        nll: float64 ``[n_texts, length - 1]``, in nats; ``nll[t, i]`` is the loss of token ``i + 1`` of text ``t``.
        n_ubatch: tokens read at once.
        cells_used: the most cells that were in use; cells_allocated, kv_bytes, scratch_bytes: see
            ``llama_edgekv_stats``.
        n_evictions: while one text was read.
    """

    setting: Setting
    texts: list[str]
    nll: np.ndarray
    n_ubatch: int
    cells_used: int
    cells_allocated: int
    kv_bytes: int
    scratch_bytes: int
    n_evictions: int

    @property
    def length(self) -> int:
        return self.nll.shape[1] + 1

    @property
    def mean(self) -> float:
        return float(self.nll.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean)

    @property
    def behind(self) -> int | None:
        """The first position where every policy of this budget sees an evicted cache; None if there is none."""
        return behind(self.setting, self.length, self.n_ubatch)

    def mean_from(self, position: int) -> float:
        """Mean loss at the positions from ``position`` on."""
        return float(self.nll[:, position:].mean())

    def curve(self, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
        """The first position of each block of ``block`` positions (the last may be shorter), and the block's mean loss
        over all texts."""
        starts = np.arange(0, self.nll.shape[1], block)
        sums = np.add.reduceat(self.nll.mean(axis=0), starts)
        return starts, sums / np.diff(np.append(starts, self.nll.shape[1]))


def behind(setting: Setting, length: int, n_ubatch: int) -> int | None:
    """``budget + n_ubatch``, None if nothing is evicted there or no loss is measured from there on."""
    if setting.policy == "none":
        return None
    position = setting.eviction(length, "bounded").budget + n_ubatch
    return position if position < length - 1 else None


# --- texts -----------------------------------------------------------------------------------------------------------


def windows(vocabulary: Vocabulary, text: str, name: str, *, length: int, n: int | None = None) -> list[Text]:
    """At most ``n`` windows of a text that do not overlap, evenly spread over it; all that fit by default.

    Each has ``length`` tokens and begins as the model begins a text. EdgekvError, naming ``name``, if the text is too
    short for one.
    """
    begin = vocabulary.tokenize("")
    tokens = vocabulary.tokenize(text)[len(begin) :]
    size = length - len(begin)
    if size < 1:
        raise EdgekvError(f"{name}: windows of {length} tokens are too short, give a larger length")
    found = len(tokens) // size
    if found == 0:
        raise EdgekvError(f"{name}: has {len(tokens)} tokens, {size} are needed; give a longer text or a smaller "
                          "length")
    n = found if n is None else min(n, found)
    starts = np.linspace(0, len(tokens) - size, n).astype(int) if n > 1 else [0]
    return [Text(name if n == 1 else f"{name}, window {i + 1} of {n}", (*begin, *tokens[start : start + size]))
            for i, start in enumerate(starts)]


def read_texts(path: str | os.PathLike[str], files: Iterable[str | os.PathLike[str]], *, length: int,
               n: int | None = None) -> list[Text]:
    """:func:`windows` of each file for the model ``path``. EdgekvError, naming the file that cannot be read or is too
    short."""
    with Vocabulary(path) as vocabulary:
        return [text for file in files
                for text in windows(vocabulary, calibrate.read_text(Path(file)), str(file), length=length, n=n)]


def calibrated_on(filters: QFilters | None, text: str) -> bool:
    """Whether the filters are known to be made from this very text, so that it cannot judge them. Only whole texts are
    recognised: filters carry their hashes."""
    return filters is not None and hashlib.sha256(text.encode()).hexdigest() in filters.text_sha256


# --- reading ---------------------------------------------------------------------------------------------------------


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
    progress: bool = False,
) -> list[Loss]:
    """The losses of every setting, in their order. One context at a time; it reads all texts.

    Args:
        texts: each of ``length`` tokens; see :func:`windows`.
        settings: budgets such as ``x4`` are shares of ``length``.
        journal: gets a record per setting and text, and what is in it is not measured again.
        filters: for policies that score with them; see :func:`edgekv.calibrate.filters_for`.
        progress: show a bar on a terminal.

    Raises:
        EdgekvError: a setting, the length or a text does not suit, or the model cannot be run; names which.
    """
    open_session = prepare(path, texts, settings, length=length, n_ubatch=n_ubatch, flash_attn=flash_attn,
                           n_threads=n_threads, filters=filters, n_gpu_layers=n_gpu_layers, rpc_servers=rpc_servers)
    jobs = [(setting, [i for i in range(len(texts)) if key("ppl", setting, i, texts[i]) not in journal.done])
            for setting in settings]
    with bar("reading", sum(len(missing) for _, missing in jobs) * length, unit="tokens", show=progress) as advance:
        for setting, missing in jobs:
            if not missing:
                continue
            with open_session(setting) as session:
                for i in missing:
                    record = _read(session, texts[i], n_ubatch, setting, advance)
                    journal.add(key("ppl", setting, i, texts[i]), record)

    results = []
    for setting in settings:
        records = [journal.done[key("ppl", setting, i, text)] for i, text in enumerate(texts)]
        nll = np.array([record["nll"] for record in records], np.float64)
        results.append(Loss(setting, [text.name for text in texts], nll, n_ubatch, **cache_figures(records)))
    return results


def prepare(
    path: str | os.PathLike[str],
    texts: Sequence[Text],
    settings: Sequence[Setting],
    *,
    length: int,
    n_ubatch: int,
    flash_attn: bool,
    filters: QFilters | None,
    **options: Any,
) -> Callable[[Setting], Session]:
    """Check all that can be wrong before anything is read; returns what opens the bounded context of a setting.
    EdgekvError, naming the flag or the file."""
    gguf = GGUF(path)
    if n_ubatch < 1:
        raise EdgekvError(f"-ub {n_ubatch}: must be at least 1")
    if length < 2:
        raise EdgekvError(f"a length of {length} tokens has nothing to predict; give a larger one")
    if length > gguf.context_length:
        raise EdgekvError(f"{path}: was trained on {gguf.context_length} tokens of context, {length} are too many; "
                          "give a smaller length")
    if not texts:
        raise EdgekvError("there is no text to read; name a file")
    for text in texts:
        if len(text.tokens) != length:
            raise EdgekvError(f"{text.name}: has {len(text.tokens)} tokens, {length} are needed")
    if len({setting.label for setting in settings}) < len(settings):
        raise ValueError("two settings have the same label")

    for s in settings:
        s.eviction(length, "bounded")
        for flag, name in (("-ctk", s.type_k), ("-ctv", s.type_v)):
            if name not in CACHE_TYPES:
                raise EdgekvError(f"{flag} {name}: unknown cache type, choose one of {', '.join(CACHE_TYPES)}")
        if not flash_attn and s.type_v not in FLOAT_TYPES:
            raise EdgekvError(f"-ctv {s.type_v}: a quantised V needs flash attention: -fa on")
        if not flash_attn and s.selection.needs_flash_attention:
            raise EdgekvError(f"{s.label}: needs flash attention: -fa on")
        if s.selection.method != "none" and n_ubatch > DECODE_TOKENS:
            raise EdgekvError(f"{s.label}: -ub {n_ubatch} reads the whole cache, a selection is made for at most "
                              f"{DECODE_TOKENS} tokens at once: -ub {DECODE_TOKENS}")
        if needs_filters(s.policy) and filters is None:
            raise EdgekvError(f"{path}: has no Q-Filters for {s.label}: run `edgekv convert {path} --with-qfilters`")

    session = partial(Session, path, n_ctx=length, n_ubatch=n_ubatch, flash_attn=flash_attn, **options)
    return lambda s: session(settings=s.eviction(length, "bounded"), filters=filters if needs_filters(s.policy) else None,
                             selection=s.selection, type_k=s.type_k, type_v=s.type_v)


def key(measure: str, setting: Setting, number: int, text: Text) -> str:
    """Of a record in the journal; another text of the same number has another one."""
    return f"{measure}, {setting.label}, text {number + 1} {text.digest}"


def log_softmax(logits: np.ndarray, where: str) -> np.ndarray:
    """Natural logarithms of the probabilities, float64, as ``logits`` float32 ``[n, n_vocab]``. A logit may be minus
    infinity: a token that cannot come. EdgekvError, naming ``where``, if others are not finite."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x -= x.max(axis=1, keepdims=True)
        total = np.exp(x).sum(axis=1, keepdims=True)
    if not np.isfinite(total).all():
        raise EdgekvError(f"{where}: the logits are NaN or infinite; the model is damaged or its cache type too coarse")
    x -= np.log(total)
    return x


def next_losses(log_p: np.ndarray, tokens: np.ndarray, start: int, where: str) -> np.ndarray:
    """Losses of the tokens that follow those at the positions from ``start`` on; the last token of a text has no
    follower. ``log_p`` ``[n, n_vocab]``: log-probabilities there."""
    follow = tokens[start + 1 : start + 1 + len(log_p)]
    nll = -log_p[np.arange(len(follow)), follow]
    if not np.isfinite(nll).all():
        raise EdgekvError(f"{where}: the text has a token that the model cannot give")
    return nll


def cache_figures(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of all texts, which have the same length: the largest of each."""
    return {name: max(record[name] for record in records)
            for name in ("cells_used", "cells_allocated", "kv_bytes", "scratch_bytes", "n_evictions")}


class Watch:
    """Figures of a session's cache from now on, for a record."""

    def __init__(self, session: Session):
        self._session, self._first, self._cells = session, session.stats(0).n_evictions, 0

    def look(self) -> None:
        """After each ubatch: the cache is at its largest then."""
        self._cells = max(self._cells, self._session.stats(0).cells_used)

    def figures(self) -> dict[str, int]:
        stats = self._session.stats(0)
        return {"cells_used": self._cells, "cells_allocated": stats.cells_allocated, "kv_bytes": stats.kv_bytes,
                "scratch_bytes": stats.scratch_bytes, "n_evictions": stats.n_evictions - self._first}


def _read(session: Session, text: Text, n_ubatch: int, setting: Setting,
          advance: Callable[[int], None]) -> dict[str, Any]:
    session.clear()
    watch, where = Watch(session), f"{text.name}, {setting.label}"
    tokens, losses = np.array(text.tokens), []
    for start in range(0, len(tokens), n_ubatch):
        chunk = tokens[start : start + n_ubatch]
        logits = session.decode(chunk, start, logits="all")
        watch.look()
        losses.append(next_losses(log_softmax(logits, where), tokens, start, where))
        advance(len(chunk))
    return {"nll": np.concatenate(losses).round(6).tolist(), **watch.figures()}


# --- comparing -------------------------------------------------------------------------------------------------------


def difference(a: Loss, b: Loss, *, start: int = 0) -> Interval:
    """Mean loss of ``a`` minus that of ``b`` at the positions from ``start`` on, with a bootstrap interval over blocks
    of ``BLOCK`` tokens."""
    return block_mean((a.nll - b.nll)[:, start:])


def compare(a: Loss, b: Loss, *, start: int = 0) -> Paired:
    """By how much the mean loss of ``a`` is below that of ``b`` at the positions from ``start`` on, tested over blocks
    of ``BLOCK`` tokens; a block is better where ``a`` loses less."""
    ours, theirs = a.nll[:, start:], b.nll[:, start:]
    return paired(-ours.ravel(), -theirs.ravel(), blocks(ours.shape))


def block_mean(values: np.ndarray) -> Interval:
    """Mean of ``values`` ``[n_texts, n]``, one per token, with a bootstrap interval over blocks of ``BLOCK`` tokens."""
    return mean_interval(values.ravel(), blocks(values.shape))


def blocks(shape: tuple[int, int]) -> np.ndarray:
    """The number of each value's block, flat: runs of ``BLOCK`` neighbours of a text, its last one may be shorter."""
    n_texts, n = shape
    return (np.arange(n_texts)[:, None] * -(-n // BLOCK) + np.arange(n) // BLOCK).ravel()


def full_cache(results: Sequence[Loss]) -> Loss:
    """The result of the full f16 cache, with which all are compared. ValueError if it was not measured."""
    for result in results:
        if result.setting == Setting():
            return result
    raise ValueError("the full cache was not measured")


def removed_share(results: Sequence[Loss], policy: str, baseline: str = "streaming") -> dict[str, Interval | None]:
    """How much of the loss that evictions add a policy takes away: ``(baseline - policy) / (baseline - full cache)`` in
    mean losses, for each of its settings by label; 1 is the full cache's loss, 0 the baseline's.

    The baseline has the same budget, window and first tokens; settings without one are left out. None where the
    baseline adds no loss. The interval is that of a bootstrap over blocks of ``BLOCK`` tokens; NaN where the baseline's
    added loss may well be none (a share of it says nothing then), or where there is one block.
    """
    full, shares = full_cache(results), {}
    for result in results:
        if result.setting.policy != policy:
            continue
        same = replace(result.setting, policy=baseline)
        if other := next((r for r in results if r.setting == same), None):
            shares[result.setting.label] = _share(other.nll - result.nll, other.nll - full.nll)
    return shares


def _share(removed: np.ndarray, added: np.ndarray) -> Interval | None:
    if added.sum() <= 0:
        return None
    removed, added = (np.bincount(blocks(values.shape), values.ravel()) for values in (removed, added))
    n, share = len(added), float(removed.sum() / added.sum())
    rng, sums = np.random.default_rng(0), []
    step = max(1, _HELD // n)
    for begin in range(0, N_RESAMPLES, step):
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=min(step, N_RESAMPLES - begin))  # how often each block is in
        sums.append(drawn @ np.stack([removed, added], axis=1))
    removed, added = np.concatenate(sums).T
    if n == 1 or np.quantile(added, 0.025) <= 0:
        return Interval(share, math.nan, math.nan, n)
    adds = added > 0  # the few resamples that add none have no share
    low, high = np.quantile(removed[adds] / added[adds], [0.025, 0.975])
    return Interval(share, float(low), float(high), n)


def rows(results: Sequence[Loss]) -> list[dict[str, Any]]:
    """A table: one row per setting, with the loss that it adds to that of the full cache, over all positions and behind
    the budget, and the share of StreamingLLM's added loss that it removes. None where there is nothing to say."""
    full = full_cache(results)
    shares = {}
    for policy in dict.fromkeys(r.setting.policy for r in results if r.setting.policy not in ("none", "streaming")):
        shares |= removed_share(results, policy)

    def flat(name: str, found: Interval | None) -> dict[str, float | None]:
        values = (found.mean, found.low, found.high) if found else (None,) * 3
        return {f"{name}{suffix}": None if v is None or math.isnan(v) else v
                for suffix, v in zip(("", "_low", "_high"), values)}

    table = []
    for r in results:
        start = r.behind
        table.append({
            "setting": r.setting.label,
            "method": r.setting.method,
            "budget": r.setting.eviction(r.length, "bounded").budget or None,
            "n_texts": len(r.texts),
            "length": r.length,
            "n_ubatch": r.n_ubatch,
            "loss": r.mean,
            "ppl": r.perplexity,
            **flat("added", None if r is full else difference(r, full)),
            "behind": start,
            "loss_behind": None if start is None else r.mean_from(start),
            "full_loss_behind": None if start is None else full.mean_from(start),
            **flat("added_behind", None if start is None else difference(r, full, start=start)),
            **flat("removed_share", shares.get(r.setting.label)),
            "cells_used": r.cells_used,
            "cells_allocated": r.cells_allocated,
            "kv_bytes": r.kv_bytes,
            "scratch_bytes": r.scratch_bytes,
            "n_evictions": r.n_evictions,
        })
    return table
