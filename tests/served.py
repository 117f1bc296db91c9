"""A llama-server in a process of its own, and plain HTTP to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgekv import _runtime

SERVER = _runtime.lib_dir() / "llama-server"


@pytest.fixture(scope="session")
def llama_server() -> Path:
    """The server that the package ships."""
    if not SERVER.exists():
        pytest.skip(f"{SERVER} has not been built")
    return SERVER


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one message of a refusal."""
        body = self.json
        assert set(body) == {"error"}, body
        message = body["error"]["message"]
        assert isinstance(message, str) and message.strip() == message != "" and "\n" not in message, body
        return message


class Served:
    """A server that is up. ``log``: what it has written so far; ``trace``: the events of EDGEKV_TRACE until now."""

    def __init__(self, process: subprocess.Popen, folder: Path, timeout: float):
        self.process, self.folder = process, folder
        self.host, self.port = "127.0.0.1", 0
        end = time.monotonic() + timeout
        while not self.port:
            if found := re.search(r"listening on http://[\d.]+:(\d+)", self.log):
                self.port = int(found[1])
            self._waits(end)
        while self.get("/health").status != 200:
            self._waits(end)

    def _waits(self, end: float) -> None:
        assert self.alive(), f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}"
        assert time.monotonic() < end, f"the server does not come up:\n{self.log[-4000:]}"
        time.sleep(0.02)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    @property
    def trace(self) -> list[dict]:
        path = self.folder / "trace"
        whole, _, _ = (path.read_text() if path.exists() else "").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """As a terminal would. AssertionError if it does not end cleanly, which an abort during a test is too."""
        if self.alive():
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.returncode == 0, f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}"

    # --- requests ----------------------------------------------------------------------------------------------------

    def connect(self, timeout: float = 600) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def request(self, method: str, path: str, body=None, headers: dict[str, str] | None = None) -> Reply:
        """``body``: bytes as they are, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body, **headers: str) -> Reply:
        return self.request("POST", path, body, headers)

    def raw(self, data: bytes, *, end: bool = False, timeout: float = 20) -> bytes:
        """What the server answers to these bytes until it closes the connection; ``end``: nothing will follow them."""
        with socket.create_connection((self.host, self.port), timeout) as connection:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            parts = []
            try:
                while part := connection.recv(1 << 16):
                    parts.append(part)
            except ConnectionResetError:
                pass
            return b"".join(parts)

    def open_stream(self, path: str, body) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A request whose answer is being read. Who closes the connection early disconnects."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def stream(self, path: str, body) -> Iterator[dict]:
        """The events of a streamed answer, up to [DONE]."""
        connection, answer = self.open_stream(path, body)
        try:
            assert answer.status == 200, answer.read()
            for event in events(answer):
                yield event
        finally:
            connection.close()

    def complete(self, prompt, n: int = 12, **fields) -> dict:
        """A greedy answer of ``n`` tokens to text or token ids, whatever ends an answer."""
        reply = self.post("/completion", {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True,
                                          "return_tokens": True, **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def idle(self, within: float = 5) -> None:
        """Wait until no slot works."""
        end = time.monotonic() + within
        while any(slot["is_processing"] for slot in self.get("/slots").json):
            assert time.monotonic() < end, f"a slot still works:\n{self.log[-4000:]}"
            time.sleep(0.05)

    def cache(self) -> dict:
        """GET /edgekv."""
        return self.get("/edgekv").json


def events(answer: http.client.HTTPResponse) -> Iterator[dict]:
    """The events of a stream of server-sent events, up to [DONE]; its comments are skipped."""
    for line in answer:
        line = line.decode().rstrip("\r\n")
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])
        else:
            assert line == "" or line.startswith(":"), line


@contextmanager
def served(binary: str | os.PathLike[str], model: str | os.PathLike[str], *flags, env: dict[str, str] | None = None,
           timeout: float = 120) -> Iterator[Served]:
    """A server on a free port of this machine; it has to end cleanly, too.

    Threads wait for each other by spinning, so it has one unless the flags say ``-t``. LLAMA_ARG_* of this process do
    not reach it.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        threads = [] if "-t" in flags else ["-t", "1"]
        command = [os.fspath(binary), "-m", os.fspath(model), "--host", "127.0.0.1", "--port", "0", *threads,
                   *map(str, flags)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_ARG_")}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                       env={**environment, "EDGEKV_TRACE": str(folder / "trace"), **(env or {})},
                                       start_new_session=True)
        try:
            server = Served(process, folder, timeout)
            yield server
            server.stop()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
