"""One question about a document that is longer than the cache: full cache against evicted caches.

    python examples/ask_the_manual.py MODEL-with-filters.gguf

The document is edgekv's own documentation with one sentence put into its middle; the question asks for that sentence.
The cache is evicted while the document is read, before the question is known. A table compares memory and speed.
"""

import argparse
import time
from pathlib import Path

import edgekv

DOCS = Path(__file__).parents[1] / "docs"
NEEDLE = "The special magic city for Anna is Lisbon."
QUESTION = "What is the special magic city for Anna?"
ANSWER = "Lisbon"


def document() -> str:
    """The documentation, with the needle as a paragraph of its own in the middle."""
    paragraphs = "\n\n".join((DOCS / name).read_text() for name in ("eviction.md", "architecture.md")).split("\n\n")
    middle = len(paragraphs) // 2
    return "\n\n".join([*paragraphs[:middle], NEEDLE, *paragraphs[middle:]])


def ask(model: str, text: str, n_ubatch: int, **settings) -> dict:
    llama = edgekv.Llama(model, n_ctx=4096, n_batch=n_ubatch, n_ubatch=n_ubatch, **settings)
    messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    n_prompt = len(llama.chat_tokens(messages))

    began = time.perf_counter()
    first, words, n = None, [], 0
    for piece in llama.create_chat_completion(messages, max_tokens=24, temperature=0, stream=True):
        word = piece["choices"][0]["delta"].get("content")
        if word:
            first = first or time.perf_counter()
            words.append(word)
            n += 1
    ended = time.perf_counter()

    stats = llama.stats()
    return {
        "prompt": n_prompt,
        "cells": stats.cells_allocated,
        "mib": stats.kv_bytes / 2**20,
        "prompt_t_s": n_prompt / (first - began),
        "answer_t_s": (n - 1) / (ended - first),
        "evict_ms": stats.evict_us / 1000,
        "answer": "".join(words).strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv-budget", type=int, default=1280, help="about half of the document")
    parser.add_argument("-ub", type=int, default=256)
    args = parser.parse_args()

    text = document()
    settings = {
        "full cache": {},
        **{policy: {"kv_evict": policy, "kv_budget": args.kv_budget}
           for policy in ("kvdiff+qfilters+recency", "kvdiff", "qfilters", "keydiff", "streaming")},
    }
    rows = {name: ask(args.model, text, args.ub, **s) for name, s in settings.items()}

    prompt = rows["full cache"]["prompt"]
    print(f"\nA document of {prompt:,} tokens with its question: {QUESTION}\n")
    print("| cache | cells | KV memory | prompt t/s | answer t/s | time in evictions | answer |")
    print("|---|--:|--:|--:|--:|--:|---|")
    for name, r in rows.items():
        print(f"| {name} | {r['cells']:,} | {r['mib']:.1f} MiB | {r['prompt_t_s']:.0f} | {r['answer_t_s']:.0f} "
              f"| {r['evict_ms']:.0f} ms | {r['answer']} |")

    assert prompt > rows["qfilters"]["cells"], "the document must not fit the evicted cache"
    if ANSWER not in rows["full cache"]["answer"]:
        raise SystemExit("the full cache did not answer the question: this example proves nothing on this model")
    right = [name for name, r in rows.items() if ANSWER in r["answer"]]
    print(f"\nThe right answer came from: {', '.join(right)}.")


if __name__ == "__main__":
    main()
