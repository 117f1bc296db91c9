"""A Hugging Face hub on the loopback interface: what huggingface_hub asks of the real one, and its bad days.

It serves a folder: ``root/ORG/NAME/...`` is a repository, ``root/ORG/NAME@REV/...`` the same at another revision. As on
the hub, large files (by their suffix) are found through a redirect to a second server that must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    range: str | None


class Hub:
    """A running hub, until it is closed. Its attributes may be changed at any time.

    Attributes:
        token: asked for, for everything.
        gated: files are kept from everybody, as from those who did not accept the terms.
        status: answered to everything.
        page: answered to everything, as a hotel's network does.
        stalls: no request of the API is answered.
        drop: file name -> bytes after which the connection is cut, once.
        hold: file name -> bytes after which nothing comes any more.
        announced: file name -> the size that listings and headers tell instead of the true one.
        then: file name -> what to do once it is sent.
        log: what was asked.
    """

    def __init__(self, root: Path):
        self.root = root
        self._end = threading.Event()
        self.reset()
        self._hub, self._store = (self._serve(answer) for answer in (_Handler.hub, _Handler.store))

    def reset(self) -> None:
        """A good day, and nothing asked yet."""
        self.token: str | None = None
        self.gated = False
        self.status: int | None = None
        self.page: str | None = None
        self.stalls = False
        self.drop: dict[str, int] = {}
        self.hold: dict[str, int] = {}
        self.announced: dict[str, int] = {}
        self.then: dict[str, Callable[[], object]] = {}
        self.log: list[Request] = []
        self.holding = threading.Event()  # set when ``hold`` or ``stalls`` has struck

    def _serve(self, answer) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub_state": self, "do_GET": answer, "do_HEAD": answer})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def store_url(self) -> str:
        return f"http://127.0.0.1:{self._store.server_port}"

    def close(self) -> None:
        self._end.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def sent(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [unquote(r.path.rsplit("/", 1)[-1]) for r in self.log
                if r.method == "GET" and not r.path.startswith("/api/")]

    def find(self, repo: str, revision: str) -> Path | None:
        """The folder of a repository at a branch, tag or commit."""
        if revision == "main":
            return self.root / repo
        if (self.root / f"{repo}@{revision}").is_dir():
            return self.root / f"{repo}@{revision}"
        org, name = repo.split("/")
        folders = [self.root / repo, *(self.root / org).glob(f"{name}@*")]
        return next((folder for folder in folders if commit(folder) == revision), None)


def files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def etag(path: Path) -> str:
    """What the hub calls contents: a large file's SHA-256, git's SHA-1 of the others."""
    data = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit(folder: Path) -> str:
    return hashlib.sha1("\n".join(f"{name} {etag(path)}" for name, path in files(folder).items()).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub_state: Hub

    def log_message(self, *_) -> None:
        pass

    def _note(self) -> str:
        """Writes the request down; its path, decoded."""
        token = self.headers.get("Authorization")
        self.hub_state.log.append(Request(self.command, self.path, token and token.removeprefix("Bearer "),
                                          self.headers.get("Range")))
        return unquote(urlsplit(self.path).path)

    def hub(self) -> None:
        path, state = self._note(), self.hub_state
        if state.status is not None:
            return self._refuse(state.status)
        if state.page is not None:
            return self._answer(200, {"Content-Type": "text/html"}, state.page.encode())
        token = state.log[-1].token
        if state.token is not None and token is not None and token != state.token:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not resolve:
            return self._refuse(404)
        repo, revision = (api or resolve)[1], (api or resolve)[2] or "main"
        if state.token is not None and token is None:
            return self._refuse(401, "RepoNotFound", "Repository not found")
        if not (state.root / repo).is_dir():
            return self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        folder = state.find(repo, revision)
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._describe(repo, folder)
        if state.gated:
            return self._refuse(401 if token is None else 403, "GatedRepo", "Access to this model is restricted.")
        self._resolve(folder, resolve[3])

    def _describe(self, repo: str, folder: Path) -> None:
        if self.hub_state.stalls:
            self._wait()
            return
        siblings = []
        for name, path in files(folder).items():
            size = self.hub_state.announced.get(name, path.stat().st_size)
            sibling = {"rfilename": name, "size": size, "blobId": etag(path)}
            if name.endswith(LARGE):
                sibling |= {"blobId": "0" * 40, "lfs": {"sha256": etag(path), "size": size, "pointerSize": 134}}
            siblings.append(sibling)
        about = {"id": repo, "sha": commit(folder), "siblings": siblings, "private": False, "downloads": 0, "likes": 0,
                 "tags": []}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

    def _resolve(self, folder: Path, name: str) -> None:
        path = files(folder).get(name)
        headers = {"X-Repo-Commit": commit(folder)}
        if path is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if not name.endswith(LARGE):
            return self._send(path, headers | {"ETag": f'"{etag(path)}"'})
        where = quote(path.relative_to(self.hub_state.root).as_posix())
        size = self.hub_state.announced.get(name, path.stat().st_size)
        self._answer(302, headers | {"X-Linked-Etag": f'"{etag(path)}"', "X-Linked-Size": str(size),
                                     "Location": f"{self.hub_state.store_url}/{where}"})

    def store(self) -> None:
        self._send(self.hub_state.root / self._note()[1:], {"ETag": '"of the store"'})

    def _send(self, path: Path, headers: dict[str, str]) -> None:
        data, state = path.read_bytes(), self.hub_state
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = None
        if self.command == "GET":
            stop = state.hold.get(path.name, state.drop.pop(path.name, None))
        self._answer(206 if wanted else 200, headers, data[start:], stop)
        if stop is not None and path.name in state.hold:
            self._wait()
        if self.command == "GET":
            state.then.pop(path.name, lambda: None)()

    def _refuse(self, status: int, code: str | None = None, message: str = "",
                headers: dict[str, str] | None = None) -> None:
        headers = dict(headers or {})
        if code:
            headers["X-Error-Code"] = code
        if message:
            headers["X-Error-Message"] = message
        self._answer(status, headers, json.dumps({"error": message}).encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", stop: int | None = None) -> None:
        """All of it, or the first ``stop`` bytes of the body and then the end of the connection."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True

    def _wait(self) -> None:
        self.hub_state.holding.set()
        self.hub_state._end.wait(60)
        self.close_connection = True
