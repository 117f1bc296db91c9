"""Requests that no client should send, to a llama-server whose cache is evicted: server.py MODEL SECONDS SEED.
tools/fuzz and tests/test_fuzz.py run it. Afterwards the server has to answer as before, with figures that make sense."""

from __future__ import annotations

import http.client
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from served import SERVER, Served, served
from targets import mutated

BUDGET, N_CTX, N_SLOTS = 64, 256, 2
FLAGS = ["-np", N_SLOTS, "-c", N_CTX * N_SLOTS, "-ub", 32, "-b", 32, "-fit", "off", "--no-kv-unified", "--cache-ram", 8,
         "--slots", "--metrics", "--props", "--kv-evict", "knorm", "--kv-budget", BUDGET, "--kv-window", 16]
MEMORY = 256 << 20  # bytes that it may have more at the end: checkpoints, prompt cache, and what malloc keeps

TEXT = "The quick brown fox. " * 6
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": TEXT}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "and then?"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"x": {"type": "string"}}}}}
COMMON = {"temperature": 0, "n_predict": 4, "seed": 1, "stream": False}

BODIES = {
    "/completion": {**COMMON, "prompt": TEXT, "n_probs": 2, "stop": ["x"], "id_slot": 0, "cache_prompt": True,
                    "n_keep": 2, "ignore_eos": True, "logit_bias": [[3, -1.0]], "samplers": ["top_k"],
                    "return_tokens": True, "n_cmpl": 1},
    "/completions": {**COMMON, "prompt": [1, 70, 71, 72], "json_schema": {"type": "integer"}},
    "/v1/completions": {**COMMON, "prompt": [TEXT, "b"], "max_tokens": 4, "logprobs": 2, "echo": False, "n": 1},
    "/v1/chat/completions": {**COMMON, "messages": CHAT, "max_tokens": 4, "tools": [TOOL], "tool_choice": "auto",
                             "response_format": {"type": "text"}, "timings_per_token": True},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 4, "model": "m"},
    "/v1/messages": {"messages": CHAT[1:], "max_tokens": 4, "system": "s", "model": "m"},
    "/v1/messages/count_tokens": {"messages": CHAT[1:], "model": "m"},
    "/v1/chat/completions/input_tokens": {"messages": CHAT},
    "/v1/chat/completions/control": {"id": "x", "action": "stop"},
    "/infill": {**COMMON, "input_prefix": "a", "input_suffix": "b", "prompt": "c",
                "input_extra": [{"filename": "f", "text": "t"}]},
    "/embedding": {"content": TEXT}, "/v1/embeddings": {"input": [TEXT, [1, 70]], "encoding_format": "float"},
    "/rerank": {"query": "q", "documents": ["a", "b"], "top_n": 1},
    "/tokenize": {"content": TEXT, "add_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 70, 71]},
    "/apply-template": {"messages": CHAT},
    "/props": {"n": 1}, "/lora-adapters": [{"id": 0, "scale": 1.0}],
    "/slots/0?action=erase": {}, "/slots/1?action=save": {"filename": "x"},
    "/slots/-1?action=restore": {"filename": "../x"},
    "/v1/streams/lookup": {"ids": ["x"]}, "/edgekv": {}, "/nothing": {"a": 1},
}
GETS = ["/health", "/metrics", "/props", "/models", "/slots", "/slots?fail_on_no_slot=1", "/edgekv", "/lora-adapters",
        "/v1/stream?id=x", "/v1/stream", "/", "/x" * 500, "/slots/99999999999999999999?action=save", "/%ff%00%zz"]
VALUES = [None, True, False, 0, -1, 1, 3, 2**31, -2**31, 2**63, 2**64, 10**40, 1e308, -1e308, 1e-320, float("nan"),
          float("inf"), "", "x", "x" * 20_000, "\0", "\ud800", "\U0001f600" * 100, "%s%n", [], {}, [[]], [None], [-1],
          [10**9], [1.5], ["x", 1, None], {"": ""}, {"type": "x"}, [[1, 2, 3]] * 50, CHAT, TEXT]
DEPTHS = (10, 200, 3000, 50_000)
FIELDS = sorted({key for body in BODIES.values() if isinstance(body, dict) for key in body} | {
    "grammar", "top_k", "top_p", "min_p", "typical_p", "mirostat", "repeat_last_n", "repeat_penalty", "dry_multiplier",
    "dry_sequence_breakers", "xtc_probability", "dynatemp_range", "n_discard", "t_max_predict_ms", "min_keep", "lora",
    "response_fields", "post_sampling_probs", "stream_options", "parallel_tool_calls", "chat_template_kwargs",
    "add_generation_prompt", "reasoning_format", "n_indent", "speculative.n_max", "messages"})


def places(value, path=()):
    """Where something can be put, in nested objects and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def body(rng: random.Random, path: str) -> bytes:
    value = BODIES[path]
    for _ in range(rng.randint(0, 3)):
        new = rng.choice(VALUES)
        if isinstance(value, dict) and rng.random() < 0.4:
            value = {**value, rng.choice(FIELDS): new}
        else:
            value = replaced(value, rng.choice(list(places(value))), new)
    data = json.dumps(value).encode()
    chance = rng.random()
    if chance < 0.3:
        data = mutated(rng, [data])
    elif chance < 0.35:
        depth, kind = rng.choice(DEPTHS), rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        nested = kind[0] * depth + b"1" + kind[1] * (depth if rng.random() < 0.7 else 0)
        data = data.replace(b"4", nested, 1) if b"4" in data and rng.random() < 0.7 else nested
    return data


def request(rng: random.Random, server: Served) -> str:
    """Send one; what came back, in a word."""
    chance = rng.random()
    if chance < 0.06:
        method = rng.choice(["GET", "GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"])
        path, data = rng.choice(GETS), None
    elif chance < 0.08:  # no HTTP
        whole = b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n" + b'{"prompt": "abcd"}'
        try:
            server.raw(mutated(rng, [whole]), end=True, timeout=30)
        except OSError:
            return "closed"
        return "raw"
    else:
        path = rng.choice(list(BODIES))
        method, data = "POST", body(rng, path)
    headers = {"Content-Type": rng.choice(["application/json"] * 8 + ["text/plain", "multipart/form-data", ""])}
    leaves = rng.random() < 0.03  # in the midst
    connection = server.connect(timeout=0.02 if leaves else 120)
    try:
        connection.request(method, path, data, headers)
        answer = connection.getresponse()
        content = answer.read()
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        if leaves:
            return "left"
        if isinstance(error, TimeoutError):
            raise
        if server.alive():
            return "closed"
        raise
    finally:
        connection.close()
    if "json" in (answer.getheader("Content-Type") or "") and method != "HEAD":
        json.loads(content)
    return str(answer.status)


def resident(server: Served) -> int:
    """Bytes."""
    path = Path(f"/proc/{server.process.pid}/status")
    if not path.exists():  # only Linux says so
        return 0
    status = path.read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def fuzz(server: Served, seed: int, seconds: float | None = None, n: int | None = None) -> Counter:
    """Requests until one of both is reached; what came back, and how often. AssertionError if the server suffered."""
    def answer():
        return [server.complete(TEXT, id_slot=slot, cache_prompt=False)["tokens"] for slot in range(N_SLOTS)]

    before, memory = answer(), resident(server)
    outcomes: Counter = Counter()
    end = time.monotonic() + (seconds or 1e9)
    number = 0
    while time.monotonic() < end and number < (n or 1e12):
        rng = random.Random(f"{seed} {number}")
        try:
            outcomes[request(rng, server)] += 1
        except Exception as error:
            raise AssertionError(f"request {number} of seed {seed}: {error!r}; the server's last words:\n"
                                 f"{server.log[-3000:]}") from error
        number += 1
        assert server.alive(), f"request {number - 1} of seed {seed} ended the server:\n{server.log[-3000:]}"

    server.idle(60)
    assert server.get("/health").status == 200
    assert answer() == before, "it answers otherwise than before"
    for slot in server.cache()["slots"]:
        assert 0 < slot["cells_used"] <= min(BUDGET + 32, slot["cells_allocated"]), slot
        assert slot["cells_used"] <= slot["tokens_seen"] <= N_CTX, slot
    grown = resident(server) - memory
    assert grown < MEMORY, f"{grown >> 20} MiB more than before"
    return outcomes


def main() -> None:
    model, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    with served(SERVER, model, *FLAGS) as server:
        outcomes = fuzz(server, seed, seconds=seconds)
    print(json.dumps(dict(outcomes.most_common())))
    print(f"Done {sum(outcomes.values())} runs")


if __name__ == "__main__":
    main()
