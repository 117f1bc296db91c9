"""A long document in one context: memory and speed while it is read, and what is still known of it afterwards.

    python benchmarks/long.py MODEL [-c 32000] [-o FILE.json] [--plot FILE.svg]
    python benchmarks/long.py --record FILE.json [--plot FILE.svg]      the table and picture of a record again

Each setting reads the same document in a process of its own, as `edgekv.Llama` reads prompts: a bounded cache is evicted
while it reads, long before there is a question. Facts of three kinds stand at the document's beginning, middle and end (2,
50 and 98 % of its paragraphs); then each is asked for by itself, behind the document. Answers are greedy and begin with the
fact's own words, so that a base model can give them.

The last columns say whether the cost stays flat: time per token in the last quarter of the document against that in the
second quarter, and the memory that was added from a quarter on, up to the last ubatch: before that, an evicted cache is
kept as a checkpoint, so that the next question need not read the document again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import edgekv
from edgekv import atomic, bench, plot
from edgekv._runtime import BINDINGS_VERSION
from edgekv.calibrate import filters_for
from edgekv.errors import EdgekvError
from edgekv.eval.haystack import Haystack, default_paragraphs
from edgekv.gguf_file import GGUF
from edgekv.meter import Trace, peak_rss_bytes
from edgekv.progress import bar
from edgekv.pull import resolve_model
from edgekv.session import CACHE_TYPES
from edgekv.settings import needs_filters
from edgekv.table import markdown, to_json

# what a fact says up to its value, and how one asks for it
FACTS = [("The favourite fruit of {} is the", "What is the favourite fruit of {}?"),
         ("The city that {} visited is", "Which city did {} visit?"),
         ("The pass key of {} is", "What is the pass key of {}?")]
PLACES = {  # name: share of the document before it, and whose facts stand there
    "beginning": (0.02, [("Martha", "papaya"), ("Oscar", "Lisbon"), ("Helen", "48213")]),
    "middle": (0.5, [("Walter", "cherry"), ("Irene", "Helsinki"), ("Simon", "90467")]),
    "end": (0.98, [("Louise", "mango"), ("Felix", "Nairobi"), ("Grace", "31758")]),
}
QUARTERS = 4
N_DECODE = 64
N_UBATCH = 512


def settings(budgets: list[int], windows: bool) -> dict[str, dict]:
    """Names and arguments of `edgekv.Llama`."""
    found = {"full cache": {}}
    if windows:
        found["full cache, windows only"] = {"swa_full": False}
    found |= {f"full cache, {name}": {"type": name} for name in ("q8_0", "q4_0")}
    found["full cache, quest"] = {"selection": "quest"}
    for budget in budgets:
        found |= {f"{policy} {budget:,}": {"kv_evict": policy, "kv_budget": budget}
                  for policy in ("kvdiff+qfilters+recency", "kvdiff", "keydiff", "streaming")}
    return found


def document(llama: edgekv.Llama, n_tokens: int) -> str:
    """A text of about ``n_tokens`` tokens, the same one for a tokeniser and a Python, with the facts in it."""
    def tokenize(text: str) -> list[int]:
        return llama.tokenize(text.encode(), add_bos=False)

    facts = {share: [f"{FACTS[i][0].format(name)} {value}." for i, (name, value) in enumerate(known)]
             for share, known in PLACES.values()}
    room = n_tokens - sum(len(tokenize(fact + "\n")) for place in facts.values() for fact in place)
    paragraphs = Haystack(default_paragraphs()).fill(random.Random(0), room, tokenize)
    for share, place in sorted(facts.items(), reverse=True):
        paragraphs[(at := round(share * len(paragraphs))):at] = place
    return "\n".join(paragraphs)


def read(model: str, n_tokens: int, arguments: dict) -> dict:
    """In a process of its own: read the document under one setting, decode, ask."""
    arguments = dict(arguments)
    if kind := arguments.pop("type", None):
        arguments |= {"type_k": CACHE_TYPES[kind], "type_v": CACHE_TYPES[kind]}
    if needs_filters(arguments.get("kv_evict", "none")):
        arguments["qfilters"] = filters_for(model)
    threads = arguments.pop("n_threads", None)
    llama = edgekv.Llama(model, n_ctx=n_tokens + 512, n_batch=N_UBATCH, n_ubatch=N_UBATCH, flash_attn=True,
                         n_threads=threads, n_threads_batch=threads, **arguments)
    tokens = llama.tokenize(document(llama, n_tokens).encode())
    warm = llama.tokenize(b"A few words to begin with, so that everything is in its place.")
    llama.read(warm)
    llama.reset()

    trace = Trace()
    trace.sample("start", 0, 0)
    with bar("reading", len(tokens), unit="tokens") as advance:
        done = 0

        def on_progress(n: int, _total: int) -> None:
            nonlocal done
            advance(n - done)
            done = n
            trace.sample("prompt", n, llama.stats().cells_used)

        llama.on_progress = on_progress
        llama.read(tokens)
    llama.on_progress = lambda done, total: None
    stats = llama.stats()

    text_of = {}
    for place, (_, known) in PLACES.items():
        text_of[place] = []
        for i, (name, value) in enumerate(known):
            begun, question = (part.format(name) for part in FACTS[i])
            asked = llama.tokenize(f"\n\nQuestion: {question}\nAnswer: {begun}".encode(), add_bos=False)
            answer = llama.create_completion([*tokens, *asked], max_tokens=8, temperature=0, stop=["\n"])
            text_of[place].append({"question": question, "value": value, "answer": answer["choices"][0]["text"].strip()})

    llama.read(tokens)
    start = time.perf_counter()
    for token in tokens[:N_DECODE]:
        llama.eval([token])
    decode = N_DECODE / (time.perf_counter() - start)
    return {"n_tokens": len(tokens), "kv_bytes": stats.kv_bytes, "cells": stats.cells_allocated,
            "n_evictions": stats.n_evictions, "peak_rss_bytes": peak_rss_bytes(), "decode_t_s": decode,
            "answers": text_of, "trace": trace.rows()}


def quarters(trace: list[dict]) -> list[float]:
    """Seconds per token in each quarter of the document."""
    n = trace[-1]["tokens"]
    ends = [min(trace, key=lambda sample: abs(sample["tokens"] - n * i / QUARTERS)) for i in range(QUARTERS + 1)]
    return [(b["seconds"] - a["seconds"]) / (b["tokens"] - a["tokens"]) for a, b in zip(ends, ends[1:])]


def growth(trace: list[dict]) -> int:
    """Bytes of resident memory that were added from the first quarter of the document on, without the last ubatch."""
    later = [sample["rss_bytes"] for sample in trace[:-1] if sample["tokens"] >= trace[-1]["tokens"] / QUARTERS]
    return later[-1] - later[0]


def right(answers: list[dict]) -> int:
    return sum(entry["value"].lower() in entry["answer"].lower() for entry in answers)


def table(rows: dict[str, dict]) -> str:
    mib = 1 << 20

    def column(text) -> list[str]:
        return [text(row) for row in rows.values()]

    columns = [("setting", list(rows), False),
               ("KV memory", column(lambda r: f"{r['kv_bytes'] / mib:.1f} MiB"), True),
               ("peak memory", column(lambda r: f"{r['peak_rss_bytes'] / mib:.0f} MiB"), True),
               ("reading", column(lambda r: f"{r['n_tokens'] / r['trace'][-1]['seconds']:.0f} t/s"), True),
               ("decoding behind it", column(lambda r: f"{r['decode_t_s']:.0f} t/s"), True)]
    for i, place in enumerate(PLACES):
        columns.append((place, column(lambda r, place=place: f"{right(r['answers'][place])} of {len(FACTS)}"), True))
    columns += [("time per token, last / second quarter", column(
                    lambda r: f"{100 * (quarters(r['trace'])[-1] / quarters(r['trace'])[1] - 1):+.0f} %"), True),
                ("memory added", column(lambda r: f"{growth(r['trace']) / mib:.1f} MiB"), True)]
    return markdown(columns)


def report(record: dict, picture: str | None) -> None:
    rows = record["rows"]
    n_tokens = next(iter(rows.values()))["n_tokens"]
    print(f"{record['model']}, a document of {n_tokens:,} tokens; {record['machine']}; edgekv {record['edgekv']}, "
          f"llama-cpp-python {record['llama_cpp_python']}\n\n{table(rows)}")
    for name, row in rows.items():
        print(f"{name}: " + "; ".join(f"{place}: {', '.join(entry['answer'] for entry in entries)}"
                                      for place, entries in row["answers"].items()))
    if picture:
        plot.reading_curves({name: row["trace"] for name, row in rows.items()}, picture,
                            f"{record['model']}: {record['machine']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a path or a known name, such as gemma3-270m")
    parser.add_argument("-c", "--length", type=int, default=32000, help="tokens of the document")
    parser.add_argument("--kv-budget", default="4096,2048", help="budgets of the evictions")
    parser.add_argument("--only", help="settings to measure, with semicolons between them")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", help="keep the record there, as JSON")
    parser.add_argument("--plot", help="draw it there (.png or .svg)")
    parser.add_argument("--record", help="measure nothing, report what is in this file")
    args = parser.parse_args()
    if args.output:
        atomic.check(args.output, "-o")
    if args.plot:
        plot.check(args.plot)

    if args.record:
        try:
            with open(args.record) as file:
                report(json.load(file), args.plot)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdgekvError(f"--record {args.record}: {error!r}: give what -o wrote") from None
        return
    if not args.model:
        parser.error("MODEL is missing")
    path = str(resolve_model(args.model))
    gguf = GGUF(path)
    windows = f"{gguf.architecture}.attention.sliding_window" in gguf
    found = settings([int(n) for n in args.kv_budget.split(",")], windows)
    if args.only:
        names = [name.strip() for name in args.only.split(";")]
        if unknown := [name for name in names if name not in found]:
            raise EdgekvError(f"--only {unknown[0]}: choose from {'; '.join(found)}")
        found = {name: found[name] for name in names}
    if any(needs_filters(arguments.get("kv_evict", "none")) for arguments in found.values()):
        filters_for(path, n_threads=args.threads)  # once, before anything is measured

    rows = {}
    for name, arguments in found.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows[name] = pool.submit(read, path, args.length, {**arguments, "n_threads": args.threads}).result()
    record = {"model": gguf.path.name, "machine": bench.machine(), "edgekv": edgekv.__version__,
              "llama_cpp_python": BINDINGS_VERSION, "n_ubatch": N_UBATCH, "rows": rows}
    if args.output:
        atomic.write(args.output, [to_json(record).encode()])
    report(record, args.plot)


if __name__ == "__main__":
    try:
        main()
    except EdgekvError as error:
        sys.exit(f"long.py: {error}")
