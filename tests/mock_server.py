"""A server that speaks what the web page asks for, with answers and bad days to order.

It has one slot and counts words as tokens. Eviction is arithmetic only: whenever more than ``budget + UBATCH`` tokens
would be held, all but ``budget`` of them are gone.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[1] / "ggml_ops/server/page/dist/index.html"
N_CTX, KEEP, WINDOW, UBATCH = 4096, 30, 128, 128
BYTES_PER_TOKEN = 11520


class MockServer:
    """A running server, until it is closed. Its attributes may be changed at any time.

    Attributes:
        answer: pieces of the answer, as they are streamed.
        gap: seconds before each piece, of the prompt and of the answer.
        refuse: (status, message) answered to the next question, once.
        breaks: pieces of the answer after which the stream says that something went wrong.
        waits: (tokens of the prompt, pieces of the answer) after each of which it goes on only once ``go`` is released.
        loading: everything but the page is answered with 503.
        key: asked for, for everything but the page.
        evicts: /edgekv has figures.
        alias: the model's name.
        template: the chat template that /props tells of.
        asked: the bodies of the questions.
        hung_up: set when a client left in the middle of an answer.
    """

    def __init__(self, answer: list[str], gap: float = 0.02):
        self.answer, self.gap = answer, gap
        self.refuse: tuple[int, str] | None = None
        self.breaks: int | None = None
        self.waits: tuple[int, int] | None = None
        self.go = threading.Semaphore(0)
        self.loading = False
        self.key: str | None = None
        self.evicts = True
        self.alias = "mock"
        self.template = ""
        self.budget = 512
        self.asked: list[dict] = []
        self.hung_up = threading.Event()
        self.closed = False
        self.words: list[str] = []  # in the slot
        self.seen = self.used = self.floor = self.evictions = self.evictions_total = 0
        handler = type("Handler", (_Handler,), {"state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> MockServer:
        return self

    def __exit__(self, *_) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def hold(self, n: int) -> None:
        """n more tokens come into the slot."""
        if self.evicts and self.used + n > self.budget + UBATCH:
            self.evictions += 1
            self.evictions_total += 1
            self.used, self.floor = self.budget, self.seen - WINDOW
        self.used += n
        self.seen += n

    def clear(self) -> None:
        self.seen = self.used = self.floor = self.evictions = 0

    def edgekv(self) -> dict:
        if not self.evicts:
            return {"enabled": False}
        slot = {"id": 0, "n_ctx": N_CTX, "tokens_seen": self.seen, "cells_used": self.used, "cells_allocated": 768,
                "floor": self.floor, "keep": KEEP, "evictions": self.evictions, "checkpoints": 1,
                "checkpoint_bytes": 8_000_000}
        totals = {"tokens_seen": self.seen, "cells_used": self.used, "cells_allocated": 768,
                  "kv_bytes": 768 * BYTES_PER_TOKEN, "scratch_bytes": 123_456, "evictions_total": self.evictions_total,
                  "evict_seconds_total": 0.0021 * self.evictions_total, "select_steps_total": 40,
                  "pages_read_total": 600, "pages_total": 1800, "bytes_read_total": 9_000_000, "checkpoints": 1,
                  "checkpoint_bytes": 8_000_000, "checkpoint_restores_total": 0, "prompt_reread_tokens_total": 0}
        return {"enabled": True, "eviction": {"policy": "kvdiff", "budget": self.budget, "window": WINDOW},
                "selection": {"method": "quest", "budget": 256, "page_size": 16, "dense_layers": 2},
                "slots": [slot], "totals": totals}

    def metrics(self) -> str:
        totals = self.edgekv().get("totals", {})
        return "".join(f"# HELP edgekv:{name} A figure.\n# TYPE edgekv:{name} gauge\nedgekv:{name} {value}\n"
                       for name, value in totals.items())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: MockServer

    def log_message(self, *_) -> None:
        pass

    def parse_request(self) -> bool:
        if self.state.closed:  # and a connection is still open
            self.close_connection = True
            return False
        return super().parse_request()

    def _send(self, status: int, body: object, kind: str = "application/json; charset=utf-8") -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"code": status, "message": message, "type": "some_error"}})

    def _lets_in(self) -> bool:
        if self.state.loading:
            self._refuse(503, "Loading model")
        elif self.state.key is not None and self.headers.get("Authorization") != f"Bearer {self.state.key}":
            self._refuse(401, "Invalid API Key")
        else:
            return True
        return False

    def do_GET(self) -> None:
        if self.path == "/":
            return self._send(200, PAGE.read_text(encoding="utf-8"), "text/html; charset=utf-8")
        if not self._lets_in():
            return None
        if self.path == "/props":
            return self._send(200, {"default_generation_settings": {"params": {"temperature": 0.8, "top_p": 0.95},
                                                                    "n_ctx": N_CTX},
                                    "model_alias": self.state.alias, "chat_template": self.state.template})
        if self.path == "/edgekv":
            return self._send(200, self.state.edgekv())
        if self.path == "/metrics":
            return self._send(200, self.state.metrics(), "text/plain; version=0.0.4")
        return self._refuse(404, "File Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._lets_in():
            return None
        if self.path == "/tokenize":
            return self._send(200, {"tokens": list(range(len(body["content"].split())))})
        if self.path != "/v1/chat/completions":
            return self._refuse(404, "File Not Found")
        self.state.asked.append(body)
        if self.state.refuse is not None:
            refusal, self.state.refuse = self.state.refuse, None
            return self._refuse(*refusal)
        prompt = [word for message in body["messages"] for word in message["content"].split()]
        if len(prompt) >= N_CTX:
            return self._refuse(400, f"request ({len(prompt)} tokens) exceeds the available context size")
        try:
            self._stream(body, prompt)
        except OSError:
            self.state.hung_up.set()
            self.close_connection = True
        return None

    def _event(self, event: dict | str) -> None:
        data = event if isinstance(event, str) else json.dumps(event)
        chunk = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.flush()

    def _stream(self, body: dict, prompt: list[str]) -> None:
        state, pause = self.state, threading.Event().wait
        cached = 0
        for old, new in zip(state.words, prompt[:-1]):
            if old != new:
                break
            cached += 1
        cached = min(cached, state.seen)
        if cached < state.seen and cached < state.floor:  # no checkpoint here: all of it is read again
            cached = 0
        if cached == 0:
            state.clear()
        else:
            state.used -= state.seen - cached
            state.seen = cached
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        state.words = prompt
        total, done, evictions = len(prompt), cached, state.evictions_total
        timings = {"cache_n": cached, "prompt_n": total - cached, "prompt_ms": 1.0}

        def delta(content: str | None, **more) -> None:
            self._event({"choices": [{"index": 0, "finish_reason": None, "delta": {"content": content}}], **more})

        while True:
            if body.get("return_progress"):
                delta(None, prompt_progress={"total": total, "cache": cached, "processed": done,
                                             "time_ms": int(1000 * state.gap * (done - cached) / UBATCH)})
            if state.waits and done == state.waits[0]:
                state.go.acquire(timeout=60)
            if done == total:
                break
            pause(state.gap)
            state.hold(min(UBATCH, total - done))
            done += min(UBATCH, total - done)
            timings["prompt_ms"] += 1000 * state.gap
        n = 0
        for piece in state.answer[: body.get("max_tokens")]:
            pause(state.gap)
            if n == state.breaks:
                self._event({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}})
                break
            n += 1
            state.hold(1)
            state.words = prompt + "".join(state.answer[:n]).split()
            timings |= {"predicted_n": n, "predicted_ms": 1000 * state.gap * n, "predicted_per_second": 1 / state.gap if state.gap else 0}
            delta(piece, **({"timings": timings} if body.get("timings_per_token") else {}))
            if state.waits and n == state.waits[1]:
                state.go.acquire(timeout=60)
        else:
            if state.evicts:
                timings |= {"kv_tokens_seen": state.seen, "kv_cells_used": state.used, "kv_evict_ms": 2.5,
                            "kv_evictions": state.evictions_total - evictions, "kv_read_per_step": 256.0,
                            "kv_bytes": 768 * BYTES_PER_TOKEN, "kv_checkpoint_used": 0}
            reason = "stop" if n == len(state.answer) else "length"
            self._event({"choices": [{"index": 0, "finish_reason": reason, "delta": {}}]})
            self._event({"choices": [], "usage": {"prompt_tokens": total, "completion_tokens": n}, "timings": timings})
            self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
