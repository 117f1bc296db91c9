"""Ideas for eviction policies, scored in NumPy and evicted by the shipped runtime: which are worth a file of their own?

    python benchmarks/policies.py MODEL [-c 1024] [-n 12] [-s 0] [--ideas "keydiff; vnorm"] [-o md]

A document as those of ``edgekv eval niah`` is read once; each idea scores its keys and values, the runtime evicts a copy
by these scores (policy ``given``), and the copy is asked. What won is in ggml_ops/llama/policies/; what lost stays here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np

from edgekv.calibrate import filters_for
from edgekv.eval.haystack import Haystack, default_paragraphs
from edgekv.eval.needles import N_UBATCH, answer
from edgekv.eval.report import FORMATS, Score, needle_report
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
    """What ideas may look at, each float32 ``[n_head_kv, n_tokens]`` of one layer, higher means: keep."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, filters: np.ndarray):
        self.qfilters = z(np.einsum("htd,hd->ht", keys, filters))
        self.keydiff = z(unlike(keys))
        self.valuediff = z(unlike(values))
        self.vnorm = z(np.linalg.norm(values, axis=-1))
        self.knorm = z(-np.linalg.norm(keys, axis=-1))


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
    "keydiff + valuediff + vnorm (kvdiff)": lambda c: c.keydiff + c.valuediff + c.vnorm,
    "kvdiff, vnorm twice": lambda c: c.keydiff + c.valuediff + 2 * c.vnorm,
    "kvdiff + qfilters": lambda c: c.keydiff + c.valuediff + c.vnorm + c.qfilters,
    "kvdiff + knorm / 2": lambda c: c.keydiff + c.valuediff + c.vnorm + c.knorm / 2,
    "kvdiff, mean of 3": lambda c: pooled(c.keydiff + c.valuediff + c.vnorm, 3, np.mean),
}


def rows(session: Session, i_layer: int, n_head_kv: int, values: bool) -> np.ndarray:
    """float32 [n_head_kv, n_tokens, head_size]"""
    heads = [session.rows(i_layer, h, values=values).view(np.float16) for h in range(n_head_kv)]
    return np.stack(heads).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-c", "--length", type=int, default=1024)
    parser.add_argument("-n", "--documents", type=int, default=12)
    parser.add_argument("-s", "--seed", type=int, default=0)
    parser.add_argument("--kv-budget", default="x2,x4,x8")
    parser.add_argument("--ideas", help="names with semicolons between them [default: all]")
    parser.add_argument("-o", "--output", choices=FORMATS, default="md")
    args = parser.parse_args()
    path = resolve_model(args.model)
    names = [name.strip() for name in args.ideas.split(";")] if args.ideas else list(IDEAS)
    if unknown := [name for name in names if name not in IDEAS]:
        parser.error(f"--ideas {unknown[0]}: there is none of that name")
    ideas = {name: IDEAS[name] for name in names}
    filters = filters_for(path)

    scores = []
    with Session(path, n_ctx=args.length + 256, n_ubatch=N_UBATCH, n_seq_max=2, flash_attn=True, settings=ON_DEMAND) as s:
        begin = len(s.tokenize(""))
        vectors = dict(zip(filters.layers, filters.vectors))

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
                layers = s.layers()
                cache = [Cache(*(rows(s, i, layer.n_head_kv, values) for values in (False, True)), vectors[layer.il])
                         for i, layer in enumerate(layers)]
                for name, budget in [("none", ""), *product(ideas, args.kv_budget.split(","))]:
                    s.remove(0, seq_id=1)
                    s.copy(0, 1)
                    ratio = 1.0
                    if budget:
                        how = replace(EvictionSettings.resolve("streaming", budget, mode="prompt", n_ctx=n), policy="given")
                        s.evict_as(how, seq_id=1, scores=[ideas[name](layer) for layer in cache])
                        ratio = n / how.budget
                    for q in d.questions:
                        asked = s.tokenize(q.asked)[begin:]
                        right = q.score(answer(s, 1, n, asked, q, [], N_UBATCH))
                        scores.append(Score(d.key, d.length, q.task, None, f"{name} {budget}".strip(), name, ratio,
                                            right))
                        if not s.remove(n, seq_id=1):
                            parser.error(f"{args.model}: its cache cannot be cut back behind a question")
                advance(1)
    print(needle_report(scores, args.output))


if __name__ == "__main__":
    main()
