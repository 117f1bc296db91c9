"""How much of a model's attention the pages hold that selection reads (Quest, arXiv 2406.10774).

A run of the model itself: a text is read, its last tokens as decode steps that select pages; the runtime hands over
their queries and the pages that it chose, the cache its keys. From these follow, in float64, the attention weights of
all cells, and with them three shares of their sum: in the pages that were chosen, in the best choice of as many pages,
and in a sliding window of as many pages (the first page and the newest ones). A share is a mean over the decode steps
and over the query heads that share a KV head; 1 is everything.

The queries are those of the selecting run: what a layer left out has changed what the layers behind it see.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgekv import native
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.progress import bar
from edgekv.session import Session, Vocabulary
from edgekv.settings import SelectionSettings

DECODE_TOKENS = 8  # LLAMA_EDGEKV_DECODE_TOKENS: a batch of at most as many is a decode step
MAX_TOKENS = 4096  # of a text, unless told otherwise
N_STEPS = 64

# Architectures that scale their queries before they meet the cache, as src/models of the pinned llama.cpp has them
_SCALED_QUERIES = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "phi2", "phi3", "phimoe")
# and those whose scores follow from neither the head size nor the metadata
_OTHER_SCORES = ("bailingmoe", "deepseek2", "grok", "jais", "t5")


@dataclass(frozen=True)
class AttentionShares:
    """Shares of the attention, float64 ``[n_layers, n_head_kv]``, NaN where a layer has fewer KV heads than another.

    Attributes:
        layers: the layers of the model that were judged: those that selection may read a part of.
        held: in the pages that the runtime chose.
        best: in the pages that hold the most, as many as were chosen. No choice can hold more.
        window: in the first page and the newest ones, as many as were chosen.
        n_tokens, n_steps: of the text; the last ones, which were judged.
        n_selecting: steps that selected; in the others the budget covered the cache, and everything is held.
        budget: tokens per step and KV head, in whole pages, as the last step had it.
        page_size: tokens per page.
        pages_read, pages_total: chosen, and with a token to read; summed over steps, layers and KV heads.
    """

    layers: list[int]
    held: np.ndarray
    best: np.ndarray
    window: np.ndarray
    n_tokens: int
    n_steps: int
    n_selecting: int
    budget: int
    page_size: int
    pages_read: int
    pages_total: int


@dataclass(frozen=True)
class Score:
    """How a model turns ``<query, key>`` into an attention score: times ``scale`` (None: ``1 / sqrt(head_size)``),
    then, unless ``softcap`` is 0, ``softcap * tanh(score / softcap)``."""

    scale: float | None = None
    softcap: float = 0.0

    @classmethod
    def of(cls, gguf: GGUF) -> Score:
        """From a model's metadata. EdgekvError for models whose attention is not a softmax over such scores."""
        arch = gguf.architecture
        if arch in _OTHER_SCORES:
            raise EdgekvError(f"{gguf.path}: the scale of the attention of {arch} models is not known here")
        if any("attn_sinks" in name for name in gguf.tensors):
            raise EdgekvError(f"{gguf.path}: has attention sinks beside the cache, which cannot be judged yet")
        scale = 1.0 if arch in _SCALED_QUERIES else gguf.get(f"{arch}.attention.scale") or None
        return cls(scale, gguf.get("gemma2.attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0)


def page_mass(queries: np.ndarray, keys: np.ndarray, positions: np.ndarray, page_size: int,
              score: Score = Score()) -> np.ndarray:
    """The attention that each page gets.

    Args:
        queries: of one KV head's group, ``[n_steps, heads of the group, head_size]``.
        keys: of that KV head, cell by cell, ``[n_cells, head_size]``; cell i is position i.
        positions: of the queries, ``[n_steps]``; a query sees the cells up to its own.

    Returns:
        float64 ``[n_steps, n_pages]``: shares, the mean over the query heads; a row adds up to 1.
    """
    n_steps, n_group, size = queries.shape
    s = queries.reshape(-1, size).astype(np.float64) @ keys.astype(np.float64).T
    s = s.reshape(n_steps, n_group, -1) * (size**-0.5 if score.scale is None else score.scale)
    if score.softcap:
        s = score.softcap * np.tanh(s / score.softcap)
    unseen = np.arange(len(keys)) > positions[:, None]
    s[np.broadcast_to(unseen[:, None], s.shape)] = -np.inf
    s -= s.max(axis=-1, keepdims=True)
    weights = np.add.reduceat(np.exp(s, out=s), np.arange(0, len(keys), page_size), axis=-1)
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)


def shares(mass: np.ndarray, pages: np.ndarray, newest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What chosen pages hold, what the best of as many hold, and what a window of as many holds.

    Args:
        mass: see :func:`page_mass`.
        pages: the choice, int ``[n_steps, n_chosen]``, -1 where there is none.
        newest: the newest page of each step, ``[n_steps]``.

    Returns:
        Three float64 ``[n_steps]``.
    """
    step, n = np.arange(len(mass)), (pages >= 0).sum(axis=-1)
    held = np.where(pages >= 0, np.take_along_axis(mass, np.maximum(pages, 0), axis=1), 0.0).sum(axis=-1)
    best = np.cumsum(-np.sort(-mass, axis=-1), axis=-1)[step, n - 1]
    up_to = np.cumsum(mass, axis=-1)
    return held, best, mass[:, 0] + up_to[step, newest] - up_to[step, newest - n + 1]


def decode_steps(
    session: Session,
    tokens: list[int],
    pos: int,
    each: Callable[[int], None] = lambda n: None,
) -> tuple[list[np.ndarray], list[list[np.ndarray | None]]]:
    """Read tokens as decode steps, a few per batch, in a session with ``tap_queries``.

    Returns:
        For each layer of the cache the post-RoPE queries, float32 ``[n, n_head, head_size]``, and, batch by batch, the
        pages that were chosen: int32 ``[batch, n_head_kv, n_chosen]``, or None where all cells were read.
    """
    n_layers = len(session.layers())
    queries, pages = ([[] for _ in range(n_layers)] for _ in range(2))
    for i in range(0, len(tokens), DECODE_TOKENS):
        batch = tokens[i : i + DECODE_TOKENS]
        session.decode(batch, pos + i)
        for i_layer in range(n_layers):
            q, p = native.last_step(session.ctx, i_layer, session.per_query_head)
            queries[i_layer].append(q)
            pages[i_layer].append(p)
        each(len(batch))
    return [np.concatenate(q) for q in queries], pages


def context_for(gguf: GGUF, length: int | None, n_steps: int, n_before: int) -> int:
    """Tokens of context for judging ``n_steps`` steps with at least ``n_before`` tokens before them.

    EdgekvError, naming the flag, if the model was not trained on so many or they are too few.
    """
    if length is not None and length > gguf.context_length:
        raise EdgekvError(f"--length {length}: the model was trained on {gguf.context_length} tokens of context")
    n_ctx = length or min(MAX_TOKENS, gguf.context_length)
    if n_steps + n_before > n_ctx:
        raise EdgekvError(f"--steps {n_steps}: leaves too little to read before them of {n_ctx} tokens")
    return n_ctx


def first_tokens(vocabulary: Vocabulary, text: str, n: int, length: int | None, n_steps: int, n_before: int,
                 source: str) -> list[int]:
    """The first n tokens of a text, or all if there are fewer; of a long text no more is tokenised than is needed.

    EdgekvError, naming ``source``, unless they are enough for what :func:`context_for` takes.
    """
    size = 16 * n
    while True:
        tokens = vocabulary.tokenize(text[:size])
        if size >= len(text) or len(tokens) >= 2 * n:  # where a text is cut, the tokens around are others
            break
        size *= 4
    tokens = tokens[:n]
    if len(tokens) < max(length or 0, n_steps + n_before):
        wanted = f"--length {length} asks for more" if length else f"more than --steps {n_steps} are needed"
        raise EdgekvError(f"{source}: {len(tokens)} tokens are too few, {wanted}")
    return tokens


def judged_layers(session: Session, selection: SelectionSettings) -> list[int]:
    """The layers of the cache that a selection may read a part of. EdgekvError, naming the flag, if there is none."""
    judged = [i for i, layer in enumerate(session.layers()) if layer.il >= selection.dense_layers]
    if not judged:
        raise EdgekvError(f"--kv-dense-layers {selection.dense_layers}: leaves no layer to judge")
    return judged


def measure(
    path: str | os.PathLike[str],
    text: str,
    selection: SelectionSettings = SelectionSettings(dense_layers=0),
    *,
    length: int | None = None,
    n_steps: int = N_STEPS,
    n_threads: int | None = None,
    progress: bool = False,
    source: str = "the text",
) -> AttentionShares:
    """Judge a model's selection on a text: its last ``n_steps`` tokens are decode steps, those before them a prompt.

    Args:
        length: tokens of the text that are used; default: all, but no more than ``MAX_TOKENS`` and the trained context.
        source: what errors call the text.

    Raises:
        EdgekvError: the text is too short, the model cannot be loaded, or its attention cannot be judged.
    """
    if selection.per_query_head:
        raise EdgekvError("pages that are chosen per query head are judged by edgekv eval attention")
    gguf = GGUF(path)
    score = Score.of(gguf)
    n_ctx = context_for(gguf, length, n_steps, 1)

    with Session(path, n_ctx=n_ctx, n_threads=n_threads, flash_attn=True, selection=selection,
                 tap_queries=True) as session:
        tokens = first_tokens(session, text, n_ctx, length, n_steps, 1, source)
        layers, judged = session.layers(), judged_layers(session, selection)

        n_prompt = len(tokens) - n_steps
        with bar("reading", len(tokens), unit="tokens", show=progress) as advance:
            session.read(tokens[:n_prompt], each=advance)
            queries, chosen = decode_steps(session, tokens[n_prompt:], n_prompt, advance)

        positions = np.arange(n_prompt, len(tokens))
        found = np.full((3, len(judged), max(layers[i].n_head_kv for i in judged)), np.nan)
        n_read = n_total = 0
        for row, i in enumerate(judged):
            layer, pages = layers[i], whole_choices(chosen[i], layers[i].n_head_kv, positions // selection.page_size)
            n_read += int((pages >= 0).sum())
            n_total += int((positions // selection.page_size + 1).sum()) * layer.n_head_kv
            groups = np.split(queries[i], layer.n_head_kv, axis=1)
            for head, group in enumerate(groups):
                keys = session.rows(i, head, values=False).view(np.float16)
                mass = page_mass(group, keys, positions, selection.page_size, score)
                parts = shares(mass, pages[:, head], positions // selection.page_size)
                found[:, row, head] = [part.mean() for part in parts]

    selecting = [(DECODE_TOKENS * j, p) for j, p in enumerate(chosen[judged[0]]) if p is not None]
    budget = selection.budget or native.auto_budget(len(tokens))
    return AttentionShares(
        [layers[i].il for i in judged], *found,
        n_tokens=len(tokens),
        n_steps=n_steps,
        n_selecting=sum(min(DECODE_TOKENS, n_steps - at) for at, _ in selecting),
        budget=selecting[-1][1].shape[-1] * selection.page_size if selecting else budget,
        page_size=selection.page_size,
        pages_read=n_read,
        pages_total=n_total,
    )


def whole_choices(chosen: list[np.ndarray | None], n_choices: int, newest: np.ndarray) -> np.ndarray:
    """The choices of all steps, int32 ``[n_steps, n_choices, n_pages]``: all pages where nothing was chosen. ``n_choices``:
    heads that choose by themselves."""
    numbers = np.arange(newest[-1] + 1)
    pages = np.where(numbers <= newest[:, None], numbers, -1)[:, None].repeat(n_choices, axis=1)
    at = 0
    for part in chosen:
        end = min(at + DECODE_TOKENS, len(newest))
        if part is not None:
            n = min(part.shape[-1], len(numbers))  # a budget may have room for pages that are not there
            pages[at:end] = -1
            pages[at:end, :, :n] = part[..., :n]
        at = end
    return pages
