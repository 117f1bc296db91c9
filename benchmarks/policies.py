"""Ideas for eviction policies, scored in NumPy and evicted by the shipped runtime: which are worth a file of their own?

    python benchmarks/policies.py MODEL [-c 1024] [-n 12] [-s 0] [--ideas "keydiff; vnorm"] [-o md]
    python benchmarks/policies.py MODEL --loss TEXT [-c 4096] [--kv-budget 256,512] [--ideas ...] [-o md]

A document as those of ``edgekv eval niah`` is read once; each idea scores its keys and values, the runtime evicts a
copy by these scores (policy ``given``), and the copy is asked. With ``--loss`` a text is read 32 tokens at a time and
evicted to the budget after each, much as ``edgekv eval ppl`` does. What won is in ggml_ops/llama/policies/; what lost
stays here.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from edgekv.calibrate import filters_for, read_text
from edgekv.eval import perplexity
from edgekv.eval.haystack import Haystack, default_paragraphs
from edgekv.eval.needles import N_UBATCH, answer
from edgekv.eval.report import FORMATS, Score, needle_report, table
from edgekv.eval.setting import ON_DEMAND
from edgekv.eval.tasks import needle_documents
from edgekv.progress import bar
from edgekv.pull import resolve_model
from edgekv.session import Session
from edgekv.settings import EvictionSettings

TASKS = ("words", "key", "values", "chain")


def z(scores: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 per head, so that scores of different kinds can be added."""
    return (scores - scores.mean(axis=-1, keepdims=True)) / (scores.std(axis=-1, keepdims=True) + 1e-6)


def unlike(rows: np.ndarray) -> np.ndarray:
    """Minus the cosine with the mean of the normalised rows, per head (arXiv 2504.15364)."""
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    mean = unit.mean(axis=-2, keepdims=True)
    return -(unit * mean).sum(axis=-1) / np.linalg.norm(mean, axis=-1)


def pooled(scores: np.ndarray, width: int, how: Callable) -> np.ndarray:
    """Over so many neighbours: text comes in words and sentences."""
    edges = [(0, 0)] * (scores.ndim - 1) + [(width // 2, width // 2)]
    return how(np.lib.stride_tricks.sliding_window_view(np.pad(scores, edges, "edge"), width, axis=-1), axis=-1)


def rank(scores: np.ndarray) -> np.ndarray:
    return scores.argsort(axis=-1).argsort(axis=-1) / scores.shape[-1]


class Cache:
    """What ideas may look at, each float32 ``[n_head_kv, n_tokens]`` of one layer, higher means: keep; ``distance``:
    how many tokens ago each was read, ``ages``: the same in budgets, see :meth:`within`."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, filters: np.ndarray, distance: np.ndarray):
        self.qfilters = z(np.einsum("htd,hd->ht", keys, filters))
        self.keydiff = z(unlike(keys))
        self.valuediff = z(unlike(values))
        self.vnorm = z(np.linalg.norm(values, axis=-1))
        self.knorm = z(-np.linalg.norm(keys, axis=-1))
        self.kvdiff = self.keydiff + self.valuediff + self.vnorm
        self.distance = distance
        self.doublings = np.log2(distance)

    def within(self, budget: int) -> Cache:
        """The same for a budget; all that does not depend on it is shared."""
        found = copy.copy(self)
        found.ages = self.distance / budget
        return found


def together(scores: np.ndarray) -> np.ndarray:
    """All heads of a layer keep the same tokens."""
    return z(np.broadcast_to(scores.mean(axis=0), scores.shape))


IDEAS: dict[str, Callable[[Cache], np.ndarray]] = {
    "qfilters": lambda c: c.qfilters,
    "keydiff": lambda c: c.keydiff,
    "valuediff": lambda c: c.valuediff,
    "vnorm": lambda c: c.vnorm,
    "qfilters + keydiff": lambda c: c.qfilters + c.keydiff,
    "qfilters or keydiff, by rank": lambda c: np.maximum(rank(c.qfilters), rank(c.keydiff)),
    "qfilters + keydiff, mean of 5": lambda c: pooled(c.qfilters + c.keydiff, 5, np.mean),
    "qfilters + keydiff, best of 5": lambda c: pooled(c.qfilters + c.keydiff, 5, np.max),
    "qfilters + keydiff + vnorm": lambda c: c.qfilters + c.keydiff + c.vnorm,
    "keydiff, mean of 5": lambda c: pooled(c.keydiff, 5, np.mean),
    "keydiff + vnorm": lambda c: c.keydiff + c.vnorm,
    "keydiff + valuediff": lambda c: c.keydiff + c.valuediff,
    "keydiff + valuediff + qfilters": lambda c: c.keydiff + c.valuediff + c.qfilters,
    "kvdiff": lambda c: c.kvdiff,
    "kvdiff, vnorm twice": lambda c: c.kvdiff + c.vnorm,
    "kvdiff + qfilters": lambda c: c.kvdiff + c.qfilters,
    "kvdiff + knorm / 2": lambda c: c.kvdiff + c.knorm / 2,
    "kvdiff, mean of 3": lambda c: pooled(c.kvdiff, 3, np.mean),
    "kvdiff, all heads of a layer together": lambda c: together(c.kvdiff),
    "kvdiff - age / 2": lambda c: c.kvdiff - c.ages / 2,
    "kvdiff - age": lambda c: c.kvdiff - c.ages,
    "kvdiff - doublings of age": lambda c: c.kvdiff - c.doublings,
    "kvdiff - 2 doublings of age": lambda c: c.kvdiff - 2 * c.doublings,
    "kvdiff - 2 log2(1 + age)": lambda c: c.kvdiff - 2 * np.log2(1 + c.ages),
    "kvdiff together - 2 log2(1 + age)": lambda c: together(c.kvdiff) - 2 * np.log2(1 + c.ages),
    "qfilters + keydiff - 2 doublings of age": lambda c: c.qfilters + c.keydiff - 2 * c.doublings,
    "kvdiff + qfilters / 2 - age": lambda c: c.kvdiff + c.qfilters / 2 - c.ages,
    "kvdiff + qfilters - age": lambda c: c.kvdiff + c.qfilters - c.ages,
    "kvdiff + qfilters / 2 - 1.5 age (the default)": lambda c: c.kvdiff + c.qfilters / 2 - 1.5 * c.ages,
    "kvdiff + qfilters - 1.5 age": lambda c: c.kvdiff + c.qfilters - 1.5 * c.ages,
    "kvdiff + qfilters - 2 doublings of age": lambda c: c.kvdiff + c.qfilters - 2 * c.doublings,
}


def caches(session: Session, filters: dict[int, np.ndarray], n_past: int) -> list[Cache]:
    """What sequence 0 holds, layer by layer."""
    found = []
    for i, layer in enumerate(session.layers()):
        heads = range(layer.n_head_kv)
        keys, values = (np.stack([session.rows(i, h, values=v).view(np.float16) for h in heads]).astype(np.float32)
                        for v in (False, True))
        distance = n_past - np.stack([session.positions(i, h) for h in heads])
        found.append(Cache(keys, values, filters[layer.il], distance))
    return found


def evict(session: Session, idea: Callable[[Cache], np.ndarray], held: Sequence[Cache], how: EvictionSettings,
          seq_id: int = 0) -> None:
    """Score what is held, and let the runtime evict a sequence that holds just that."""
    scores = [idea(layer.within(how.budget)) for layer in held]
    session.evict_as(replace(how, policy="given"), seq_id=seq_id, scores=scores)


def settings(budget: str, n_tokens: int) -> EvictionSettings:
    return EvictionSettings.resolve("streaming", budget, mode="prompt", n_ctx=n_tokens)


def needles(path, ideas: dict[str, Callable], args) -> str:
    filters, scores = vectors(path), []
    with Session(path, n_ctx=args.length + 256, n_ubatch=N_UBATCH, n_seq_max=2, flash_attn=True, settings=ON_DEMAND,
                 n_threads=args.threads) as s:
        begin = len(s.tokenize(""))

        def tokenize(text: str) -> list[int]:
            return s.tokenize(text, special=False)

        documents = list(needle_documents(Haystack(default_paragraphs()), tokenize, lengths=[args.length], tasks=TASKS,
                                          seeds=range(args.seed, args.seed + args.documents), reserve=8))
        with bar("documents", len(documents)) as advance:
            for d in documents:
                tokens = s.tokenize(d.text)
                n = len(tokens)
                s.clear()
                s.read(tokens)
                held = caches(s, filters, n)
                for name, budget in [("none", ""), *product(ideas, args.kv_budget.split(","))]:
                    s.remove(0, seq_id=1)
                    s.copy(0, 1)
                    ratio = 1.0
                    if budget:
                        how = settings(budget, n)
                        evict(s, ideas[name], held, how, seq_id=1)
                        ratio = n / how.budget
                    for q in d.questions:
                        asked = s.tokenize(q.asked)[begin:]
                        right = q.score(answer(s, 1, n, asked, q, [], N_UBATCH))
                        scores.append(Score(d.key, d.length, q.task, None, f"{name} {budget}".strip(), name, ratio,
                                            right))
                        if not s.remove(n, seq_id=1):
                            raise SystemExit(f"{path}: its cache cannot be cut back behind a question")
                advance(1)
    return needle_report(scores, args.output)


def losses(path, ideas: dict[str, Callable], args) -> str:
    filters, rows = vectors(path), []
    runs = [("none", ""), *product(["streaming", *ideas], args.kv_budget.split(","))]
    with Session(path, n_ctx=args.length + 64, n_ubatch=32, flash_attn=True, settings=ON_DEMAND,
                 n_threads=args.threads) as s:
        text, = perplexity.windows(s, read_text(Path(args.loss)), args.loss, length=args.length, n=1)
        tokens = np.array(text.tokens)
        with bar("reading", len(runs) * len(tokens), unit="tokens") as advance:
            for name, budget in runs:
                s.clear()
                found = []
                how = settings(budget, len(tokens)) if budget else None
                for start in range(0, len(tokens), 32):
                    logits = s.decode(tokens[start : start + 32], start, logits="all")
                    log_p = perplexity.log_softmax(logits, args.loss)
                    found.append(perplexity.next_losses(log_p, tokens, start, args.loss))
                    n = start + len(logits)
                    if how and n > how.budget:
                        if name == "streaming":
                            s.evict_as(how)
                        else:
                            evict(s, ideas[name], caches(s, filters, n), how)
                    advance(len(logits))
                loss = float(np.concatenate(found).mean())
                rows.append({"setting": f"{name} {budget}".strip(), "loss": loss})
    for row in rows:
        row["added"] = row["loss"] - rows[0]["loss"]
    return table(rows, [("setting", "setting", str, False), ("loss", "loss", "{:.4f}".format, True),
                        ("added", "added", "{:+.4f}".format, True)], args.output)


def vectors(path) -> dict[int, np.ndarray]:
    filters = filters_for(path)
    return dict(zip(filters.layers, filters.vectors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--loss", metavar="TEXT", help="the loss along this text instead of needles")
    parser.add_argument("-c", "--length", type=int, help="tokens [default: 1024; 4096 with --loss]")
    parser.add_argument("-n", "--documents", type=int, default=12)
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("--kv-budget", help="[default: x2,x4,x8; 256,512 with --loss]")
    parser.add_argument("--ideas", help="names with semicolons between them [default: all]")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", choices=FORMATS, default="md")
    args = parser.parse_args()
    args.length = args.length or (4096 if args.loss else 1024)
    args.kv_budget = args.kv_budget or ("256,512" if args.loss else "x2,x4,x8")
    path = resolve_model(args.model)
    names = [name.strip() for name in args.ideas.split(";")] if args.ideas else list(IDEAS)
    if unknown := [name for name in names if name not in IDEAS]:
        parser.error(f"--ideas {unknown[0]}: there is none of that name")
    print((losses if args.loss else needles)(path, {name: IDEAS[name] for name in names}, args))


if __name__ == "__main__":
    main()
