"""Questions about a document that is longer than the cache: full cache against evicted caches.

    python examples/ask_the_manual.py MODEL-with-filters.gguf

The document is a part of edgekv's own documentation (examples/manual.md, an older state that stays as it is) with three facts
put into it; each question asks for one of them. The cache is evicted while the document is read, before a question is
known. A table compares memory, speed and answers.
"""

import argparse
from pathlib import Path

import edgekv

MANUAL = Path(__file__).parent / "manual.md"
FACTS = {  # share of the document before each: what it says, what is asked, the answer
    0.25: ("The favourite fruit of Peter is the papaya.", "What is the favourite fruit of Peter?", "papaya"),
    0.5: ("The special magic city for Anna is Lisbon.", "What is the special magic city for Anna?", "Lisbon"),
    0.75: ("The lighthouse keeper of the island is called Maria.", "What is the lighthouse keeper of the island called?", "Maria"),
}


def document() -> str:
    """The manual, with the facts as paragraphs of their own."""
    paragraphs = MANUAL.read_text().split("\n\n")
    for share, (fact, _, _) in sorted(FACTS.items(), reverse=True):
        paragraphs.insert(round(share * len(paragraphs)), fact)
    return "\n\n".join(paragraphs)


def ask(model: str, text: str, n_ubatch: int, **settings) -> dict:
    llama = edgekv.Llama(model, n_ctx=4096, n_batch=n_ubatch, n_ubatch=n_ubatch, **settings)
    answers, timings = [], []
    for _, question, _ in FACTS.values():
        messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
        answer = llama.create_chat_completion(messages, max_tokens=24, temperature=0)
        answers.append(answer["choices"][0]["message"]["content"].strip())
        timings.append(answer["timings"])
    stats, first = llama.stats(), timings[0]
    return {
        "prompt": first["prompt_n"],
        "cells": stats.cells_allocated,
        "mib": stats.kv_bytes / 2**20,
        "prompt_t_s": first["prompt_per_second"],
        "answer_t_s": sum(t["predicted_n"] - 1 for t in timings) / sum(t["predicted_ms"] for t in timings) * 1000,
        "evict_ms": stats.evict_us / 1000,
        "again_ms": timings[1]["prompt_ms"],
        "answers": answers,
        "right": [wanted.lower() in answer.lower() for (_, _, wanted), answer in zip(FACTS.values(), answers)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv-budget", type=int, default=1792, help="about half of the document")
    parser.add_argument("-ub", type=int, default=256)
    args = parser.parse_args()

    text = document()
    settings = {
        "full cache": {},
        **{policy: {"kv_evict": policy, "kv_budget": args.kv_budget}
           for policy in ("kvdiff+qfilters+recency", "kvdiff", "qfilters", "streaming")},
        "full cache, quest": {"selection": "quest"},
    }
    rows = {name: ask(args.model, text, args.ub, **s) for name, s in settings.items()}

    prompt = rows["full cache"]["prompt"]
    print(f"\nA document of {prompt:,} tokens, and three questions: {' '.join(question for _, question, _ in FACTS.values())}\n")
    print("| cache | cells | KV memory | prompt t/s | the second question's prompt | answer t/s | right | answers |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    for name, r in rows.items():
        short = " / ".join(answer.split("\n")[0][:60] for answer in r["answers"])
        print(f"| {name} | {r['cells']:,} | {r['mib']:.1f} MiB | {r['prompt_t_s']:.0f} | {r['again_ms'] / 1000:.2f} s "
              f"| {r['answer_t_s']:.0f} | {sum(r['right'])} of {len(FACTS)} | {short} |")

    assert prompt > rows["qfilters"]["cells"], "the document must not fit the evicted cache"
    if not any(rows["full cache"]["right"]):
        raise SystemExit("the full cache answered none of the questions: this example proves nothing on this model")


if __name__ == "__main__":
    main()
