"""Load on llama-server: many conversations at once, nothing mixed, memory flat, and how fast against another server.

    python benchmarks/serve.py MODEL --server stock=PATH --server ours=PATH
        --flags ours="--kv-evict kvdiff --kv-budget 512"
        [-n 200] [--clients 8] [--slots 4] [-c 4096] [-t 2] [-r 2] [--seed 0] [-o FILE.json]

Needs `pip install '.[test]'`. Each client holds one conversation of five turns after another. The system prompt has a
secret number that the conversation's own answers should repeat and that no other answer may contain. One turn brings a
text of 50 to 1,500 tokens (log-uniform), the others ask only; answers have 24 to 32 tokens, at temperature 0. The same
requests go to each server, a fresh one per round; in every second round the servers come in reverse order.

Resident memory (VmRSS in /proc, so Linux only) is read each second; its slope is that of a straight line through the
samples after the first quarter of the requests. The time to the first token begins when the request is sent, so it has
the wait for a slot in it. Exit status 1 if a request failed, an answer had another conversation's secret, or fewer than
half of the answers had their own: then the question whether they are mixed was not asked.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import shlex
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from served import Served, events, served  # noqa: E402

from edgekv import atomic, bench, table  # noqa: E402
from edgekv.calibrate import default_text  # noqa: E402
from edgekv.errors import EdgekvError  # noqa: E402
from edgekv.pull import resolve_model  # noqa: E402
from edgekv.session import Vocabulary  # noqa: E402

N_TURNS = 5
TEXT_TOKENS = 50, 1500
ANSWER_TOKENS = 24, 32
WARM_UP = 0.25  # of the requests
OWN_SHARE = 0.5  # of the answers must have their secret

SYSTEM = 'You are an assistant. Begin every answer with "The secret number is {}."'
QUESTION = "What is the secret number?"
# every idle slot would be copied for every request otherwise, and settings would depend on the free memory
FLAGS = ("-fit", "off", "--no-kv-unified", "--cache-ram", "256", "--no-cache-idle-slots")


@dataclass(frozen=True)
class Conversation:
    """``turns``: what the user says, and of how many tokens the answer is."""

    secret: str
    turns: list[tuple[str, int]]


def conversations(model: str, n_requests: int, seed: int) -> list[Conversation]:
    """As many turns as requests; the last conversation may be shorter than the others."""
    rng = np.random.default_rng(seed)
    text = default_text()
    with Vocabulary(model) as vocabulary:
        tokens = vocabulary.tokenize(text[:200_000], special=False)
        found, secrets = [], set()
        for first in range(0, n_requests, N_TURNS):
            n_turns = min(N_TURNS, n_requests - first)
            while (secret := str(rng.integers(100_000, 1_000_000))) in secrets or secret in text:
                pass
            secrets.add(secret)
            said = [QUESTION] * n_turns
            n = int(np.exp(rng.uniform(*np.log(TEXT_TOKENS))))
            at = int(rng.integers(len(tokens) - n))
            said[rng.integers(n_turns)] = f"{vocabulary.text(tokens[at : at + n])}\n\n{QUESTION}"
            low, high = ANSWER_TOKENS
            found.append(Conversation(secret, [(s, int(rng.integers(low, high + 1))) for s in said]))
    return found


class Load:
    """One workload on one server. ``answers``: a record per answered request; ``failures``: a line per other one."""

    def __init__(self, server: Served, work: list[Conversation], n_clients: int):
        self.server, self.answers, self.failures = server, [], []
        self.memory: list[tuple[float, int, float]] = []  # seconds, requests done, MiB
        self._secrets = {c.secret for c in work}
        self._asked = sum(len(c.turns) for c in work)
        self._work: queue.SimpleQueue[tuple[int, Conversation]] = queue.SimpleQueue()
        for numbered in enumerate(work):
            self._work.put(numbered)
        self._end = threading.Event()
        self._began = time.monotonic()
        self.seconds = self._run(n_clients)

    def _run(self, n_clients: int) -> float:
        clients = [threading.Thread(target=self._client, daemon=True) for _ in range(n_clients)]
        watch = threading.Thread(target=self._watch, daemon=True)
        for thread in (*clients, watch):
            thread.start()
        try:
            for thread in clients:
                thread.join()
            return time.monotonic() - self._began
        finally:
            self._end.set()
            watch.join()

    def _watch(self) -> None:
        while not self._end.is_set() and (mib := resident_mib(self.server.process.pid)):
            done = len(self.answers) + len(self.failures)
            self.memory.append((round(time.monotonic() - self._began, 2), done, round(mib, 2)))
            self._end.wait(1)

    def _client(self) -> None:
        while not self._end.is_set():
            try:
                number, conversation = self._work.get_nowait()
            except queue.Empty:
                return
            messages = [{"role": "system", "content": SYSTEM.format(conversation.secret)}]
            for turn, (said, n_tokens) in enumerate(conversation.turns):
                messages.append({"role": "user", "content": said})
                try:
                    record = self._ask(messages, n_tokens)
                except Exception as error:  # a thread that ends would take the rest of its conversation along unseen
                    why = " ".join(str(error).split())[:200]
                    left = len(conversation.turns) - turn
                    self.failures += [f"conversation {number}, turn {turn}: {type(error).__name__}: {why}"] * left
                    break
                answer = record["answer"]
                messages.append({"role": "assistant", "content": answer})
                record |= conversation_record(number, turn, conversation.secret, answer, self._secrets)
                self.answers.append(record)

    def _ask(self, messages: list[dict], n_tokens: int) -> dict:
        began = time.monotonic()
        connection, reply = self.server.open_stream("/v1/chat/completions", {
            "messages": messages, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True,
            "stream_options": {"include_usage": True}})
        try:
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {reply.read()[:200]!r}")
            parts, first, usage, timings = [], None, None, {}
            for event in events(reply):
                if "error" in event:
                    raise ValueError(str(event["error"]))
                for choice in event["choices"]:
                    if content := choice["delta"].get("content"):
                        first = first or time.monotonic()
                        parts.append(content)
                usage, timings = event.get("usage") or usage, event.get("timings") or timings
        finally:
            connection.close()
        if usage is None or usage["completion_tokens"] != n_tokens or first is None:
            raise ValueError(f"an answer of {n_tokens} tokens ended with {usage}")
        return {"answer": "".join(parts), "first_s": first - began, "total_s": time.monotonic() - began,
                "prompt_tokens": usage["prompt_tokens"], "answer_tokens": n_tokens,
                **{k: v for k, v in timings.items() if k in ("cache_n", "prompt_n") or k.startswith("kv_")}}

    # --- what came of it ---------------------------------------------------------------------------------------------

    def figures(self) -> dict:
        """Everything about this run, with the samples and the answers."""
        answers = self.answers
        read = sum(a.get("prompt_n", 0) for a in answers)
        slope = memory_slope(self.memory, len(answers) + len(self.failures))
        return {
            "seconds": round(self.seconds, 2), "asked": self._asked,
            "requests": len(answers) + len(self.failures), "failures": sorted(self.failures),
            "mixed": [a for a in answers if a["others"]],
            "own_share": share([a["own"] for a in answers]),
            "requests_per_min": 60 * len(answers) / self.seconds,
            "answer_tokens_per_s": sum(a["answer_tokens"] for a in answers) / self.seconds,
            "prompt_tokens": sum(a["prompt_tokens"] for a in answers), "prompt_tokens_read": read,
            "first_s": median_p95([a["first_s"] for a in answers]),
            "total_s": median_p95([a["total_s"] for a in answers]),
            "rss_mib": {"peak": max((m for *_, m in self.memory), default=None), **slope}, "memory": self.memory,
            "answers": answers,
        }


def conversation_record(number: int, turn: int, secret: str, answer: str, secrets: set[str]) -> dict:
    """Whose secrets an answer has."""
    there = set(re.findall(r"(?=(\d{6}))", answer))
    return {"conversation": number, "turn": turn, "own": secret in there, "others": sorted(there & secrets - {secret})}


def resident_mib(pid: int) -> float | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else None


def memory_slope(samples: list[tuple[float, int, float]], n_requests: int) -> dict:
    """The straight line through the samples after the warm-up, and how far they lie apart."""
    after = np.array([s for s in samples if s[1] >= WARM_UP * n_requests], float).reshape(-1, 3)
    if len(after) < 3 or np.ptp(after[:, 0]) == 0:
        return {"after_requests": int(WARM_UP * n_requests), "samples": len(after)}
    slope = float(np.polyfit(after[:, 0], after[:, 2], 1)[0])
    requests = np.ptp(after[:, 1]) / np.ptp(after[:, 0])
    return {"after_requests": int(WARM_UP * n_requests), "samples": len(after), "low": float(after[:, 2].min()),
            "high": float(after[:, 2].max()), "slope_per_min": 60 * slope,
            "slope_per_100_requests": 100 * slope / requests if requests else None}


def median_p95(values: list[float]) -> dict:
    if not values:
        return {"median": None, "p95": None}
    return {"median": statistics.median(values), "p95": float(np.quantile(values, 0.95))}


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0


def wrong(run: dict) -> list[str]:
    """What a run must not have."""
    who = f"{run['server']}, round {run['round']}"
    lines = [f"{who}: {line}" for line in run["failures"]]
    if run["requests"] != run["asked"]:
        lines.append(f"{who}: {run['requests']} of {run['asked']} requests were accounted for")
    lines += [f"{who}: conversation {a['conversation']}, turn {a['turn']} has the secrets of others: {a['others']}"
              for a in run["mixed"]]
    if run["own_share"] < OWN_SHARE:
        lines.append(f"{who}: {run['own_share']:.0%} of the answers have their own secret, too few to show anything")
    return lines


def report(runs: list[dict]) -> str:
    def column(heading: str, cell, right: bool = True) -> tuple[str, list[str], bool]:
        return heading, [cell(run) for run in runs], right

    def number(value: float | None, form: str = ".1f") -> str:
        return "?" if value is None else format(value, form)

    return table.markdown([
        column("server", lambda r: r["server"], False), column("round", lambda r: str(r["round"])),
        column("requests", lambda r: str(r["requests"])), column("failed", lambda r: str(len(r["failures"]))),
        column("mixed", lambda r: str(len(r["mixed"]))), column("own secret", lambda r: f"{r['own_share']:.0%}"),
        column("seconds", lambda r: number(r["seconds"], ".0f")),
        column("requests/min", lambda r: number(r["requests_per_min"])),
        column("answer tokens/s", lambda r: number(r["answer_tokens_per_s"])),
        column("prompt tokens read", lambda r: f"{r['prompt_tokens_read']:,} of {r['prompt_tokens']:,}"),
        column("first token, median", lambda r: number(r["first_s"]["median"], ".2f") + " s"),
        column("p95", lambda r: number(r["first_s"]["p95"], ".2f") + " s"),
        column("peak RSS", lambda r: number(r["rss_mib"]["peak"], ".0f") + " MiB"),
        column("RSS after warm-up", lambda r: f"{number(r['rss_mib'].get('low'), '.0f')} to "
                                              f"{number(r['rss_mib'].get('high'), '.0f')} MiB"),
        column("slope", lambda r: number(r["rss_mib"].get("slope_per_100_requests"), "+.2f") + " MiB / 100 requests"),
    ])


def named(values: list[str], what: str) -> dict[str, str]:
    """NAME=VALUE of the command line."""
    found = {}
    for value in values:
        name, sign, rest = value.partition("=")
        if not (name and sign):
            raise EdgekvError(f"{what} {value}: write NAME=...")
        if name in found:
            raise EdgekvError(f"{what} {value}: {name} is there twice")
        found[name] = rest
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a path, a known name or hf:ORG/REPO/FILE.gguf")
    parser.add_argument("--server", action="append", required=True, metavar="NAME=PATH", help="give it twice or more")
    parser.add_argument("--flags", action="append", default=[], metavar="NAME=FLAGS", help="of one of the servers")
    parser.add_argument("-n", type=int, default=200, help="requests [default: 200]")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("-c", type=int, default=4096, help="tokens of context per slot [default: 4096]")
    parser.add_argument("-t", type=int, default=2, help="threads [default: 2]")
    parser.add_argument("-r", type=int, default=2, help="rounds [default: 2]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", type=Path, metavar="FILE", help="everything, as JSON")
    args = parser.parse_args()
    try:
        sys.exit(run(args))
    except EdgekvError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> int:
    servers, flags = named(args.server, "--server"), named(args.flags, "--flags")
    for name in flags.keys() - servers.keys():
        raise EdgekvError(f"--flags {name}=...: there is no --server {name}=PATH")
    for name, path in servers.items():
        if not Path(path).is_file():
            raise EdgekvError(f"--server {name}={path}: no such file")
    for name in ("n", "clients", "slots", "r"):
        if getattr(args, name) < 1:
            raise EdgekvError(f"{'-' if len(name) == 1 else '--'}{name}: must be at least 1")
    if args.o and not args.o.absolute().parent.is_dir():
        raise EdgekvError(f"-o {args.o}: there is no such folder")

    model = str(resolve_model(args.model))
    work = conversations(model, args.n, args.seed)
    common = ["-np", args.slots, "-c", args.c * args.slots, "-t", args.t, *FLAGS]
    runs: list[dict] = []
    for i in range(args.r):
        for name in list(servers)[:: -1 if i % 2 else 1]:
            print(f"round {i + 1}: {name}", file=sys.stderr, flush=True)
            try:
                with served(servers[name], model, *common, *shlex.split(flags.get(name, ""))) as server:
                    runs.append({"server": name, "round": i + 1, **Load(server, work, args.clients).figures()})
            except AssertionError as error:
                if runs:
                    print(report(runs), end="", flush=True)
                raise EdgekvError(f"--server {name}: {' '.join(str(error).split())[-400:]}") from None
    result = {"model": Path(model).name, "machine": bench.machine(), "common_flags": list(map(str, common)),
              "flags": flags, "clients": args.clients, "seed": args.seed, "conversations": len(work), "turns": N_TURNS,
              "text_tokens": TEXT_TOKENS, "answer_tokens": ANSWER_TOKENS, "runs": runs}
    print(report(runs), end="", flush=True)
    if args.o:
        atomic.write(args.o, [json.dumps(table.plain(result)).encode() + b"\n"])
    problems = [line for run in runs for line in wrong(run)]
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    main()
