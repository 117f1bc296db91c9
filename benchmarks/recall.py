"""Which budget should grow with the context, and how: the share of the attention that selected pages hold.

    python benchmarks/recall.py MODEL [-f TEXT] [--lengths 1024,...]

Needs the package `gguf` (`pip install '.[test]'`). A model reads a text densely; the last tokens before each length are
decode steps whose queries are kept. For each of them Quest's choice is made in NumPy, for any number of pages, from the
stored keys: pages ranked by their bound, the first and the newest always read. So all budgets are compared on the same
queries. `auto` is the runtime's rule; each rule is set against the fixed budget that reads as much on average over the
lengths, every length counting the same; nobody reads more than there is. Means over layers (without the first two), KV
heads and steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import edgekv  # noqa: E402, F401  before oracle: it says which library the bindings load
import oracle  # noqa: E402
from edgekv import attention, native  # noqa: E402
from edgekv.calibrate import default_text  # noqa: E402
from edgekv.gguf_file import GGUF  # noqa: E402
from edgekv.pull import resolve_model  # noqa: E402
from edgekv.session import Session  # noqa: E402

DENSE_LAYERS = 2
RULES = {
    "auto (the runtime's)": lambda n: native.auto_budget(n),
    "max(512, n / 8)": lambda n: max(512, n / 8),
    "16 sqrt(n)": lambda n: 16 * n**0.5,
}


def held_by_number(group: np.ndarray, keys: np.ndarray, positions: np.ndarray, page_size: int,
                   score: attention.Score) -> tuple[np.ndarray, np.ndarray]:
    """What one KV head's chosen pages hold, and the best as many.

    Args:
        group: queries [n_steps, heads of the group, head_size]; keys: [n_cells, head_size]; positions: of the queries.

    Returns:
        float64 [n_pages + 1] each, by the number of pages: means over the steps. Number 2 is the least that is meant.
    """
    mass = attention.page_mass(group, keys, positions, page_size, score)
    high, low = np.split(oracle.summaries(keys.astype(np.float64), page_size), 2, axis=-1)
    q = group.astype(np.float64)
    bounds = (np.maximum(q, 0) @ high.T + np.minimum(q, 0) @ low.T).max(axis=1)  # [n_steps, n_pages]

    numbers, newest = np.arange(mass.shape[1]), (positions // page_size)[:, None]
    bounds[np.broadcast_to(numbers == 0, bounds.shape) | (numbers == newest)] = np.inf
    bounds[numbers > newest] = -np.inf
    order = np.argsort(-bounds, axis=-1, kind="stable")
    curves = np.take_along_axis(mass, order, axis=-1), -np.sort(-mass, axis=-1)
    return tuple(np.concatenate([[0.0], np.cumsum(c, axis=-1).mean(axis=0)]) for c in curves)


def curves(model: str, text: str, lengths: list[int], n_steps: int,
           page_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each length the shares by the number of pages, see :func:`held_by_number`."""
    score = attention.Score.of(GGUF(model))
    with Session(model, n_ctx=lengths[-1], flash_attn=True, tap_queries=True) as session:
        tokens = session.tokenize(text)[: lengths[-1]]
        if len(tokens) < lengths[-1]:
            sys.exit(f"the text has {len(tokens)} tokens only")
        queries, at = [], 0
        for length in lengths:  # a step sees the past only, so one reading serves all lengths
            session.read(tokens[at : length - n_steps], at)
            queries.append(attention.decode_steps(session, tokens[length - n_steps : length], length - n_steps)[0])
            at = length
        sums = [0.0 for _ in lengths]
        n = 0
        for i, layer in enumerate(session.layers()):
            if layer.il < DENSE_LAYERS:
                continue
            for head in range(layer.n_head_kv):
                keys = session.rows(i, head, values=False).view(np.float16)
                n += 1
                for j, length in enumerate(lengths):
                    group = np.split(queries[j][i], layer.n_head_kv, axis=1)[head]
                    positions = np.arange(length - n_steps, length)
                    sums[j] += np.stack(held_by_number(group, keys[:length], positions, page_size, score))
    return [tuple(s / n) for s in sums]


def at_pages(curve: np.ndarray, n: float) -> float:
    """A curve at a number of pages that need not be whole: some steps read one page more."""
    return float(np.interp(n, np.arange(len(curve)), curve))


def equal_reads(pages: np.ndarray, there: np.ndarray) -> float:
    """The fixed number of pages that reads as many on average."""
    wanted, low, high = np.minimum(pages, there).mean(), 0.0, float(there.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle, there).mean() < wanted else (low, middle)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a path, a known name or hf:ORG/REPO/FILE.gguf")
    parser.add_argument("-f", "--file", help="a text [default: the help topics of Python]")
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--page-size", type=int, default=16)
    args = parser.parse_args()

    lengths = sorted(map(int, args.lengths.split(",")))
    if lengths[0] <= args.steps or min(np.diff(lengths), default=args.steps) < args.steps:
        parser.error("the lengths must be further apart than the steps")
    text = Path(args.file).read_text(encoding="utf-8") if args.file else default_text()
    found = curves(str(resolve_model(args.model)), text, lengths, args.steps, args.page_size)

    for name, rule in RULES.items():
        pages = [-(-rule(n) // args.page_size) for n in lengths]
        fixed = equal_reads(np.array(pages, float), np.array(lengths) / args.page_size)
        print(f"\n{name}, against {fixed * args.page_size:,.0f} tokens at every length\n")
        print("| context | budget | held by it | held by the fixed one | best possible | best possible, fixed |")
        print("|--:|--:|--:|--:|--:|--:|")
        columns = np.array([[at_pages(curve, n) for n in (p, fixed) for curve in pair]
                            for pair, p in zip(found, pages)])[:, [0, 2, 1, 3]]
        for n, p, shares in zip(lengths, pages, columns):
            row(f"{n:,}", f"{p * args.page_size:,.0f}", shares)
        row("mean", "", columns.mean(axis=0))
        row("least", "", columns.min(axis=0))


def row(length: str, budget: str, shares: np.ndarray) -> None:
    print(f"| {length} | {budget} | " + " | ".join(f"{share:.4f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
