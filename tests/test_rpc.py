"""Layers and caches on servers: the same results as in one process, what crosses the wire, and everything that can be
wrong with a server. Two `edgekv rpc-server` run on loopback; they have no memory that the client can reach into.
"""

import ctypes
import json
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

import edgekv as package
from edgekv import rpc
from edgekv.convert import convert
from edgekv.errors import EdgekvError
from edgekv.gguf_file import GGUF
from edgekv.llama import load_filters
from edgekv.session import Session
from edgekv.session_file import SavedSession
from edgekv.settings import EvictionSettings, SelectionSettings, needs_filters
from ggml import Graph
from process import EDGEKV, edgekv, fails, python
from test_filters import random_filters
from tinymodel import write_tiny_model

N_LAYER, N_HEAD_KV = 4, 2  # of the tiny model


# --- servers ---------------------------------------------------------------------------------------------------------


class Server:
    """`edgekv rpc-server` at a free port."""

    def __init__(self, *options):
        self.process = subprocess.Popen([*EDGEKV, "rpc-server", "-p", "0", "-t", "1", *options],
                                        stderr=subprocess.PIPE, text=True)
        self.said = ""
        while not (found := re.search(r" at (\S+):(\d+); Ctrl-C", self.said)):
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line
        self.port = int(found[2])
        self.endpoint = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # a full pipe would stop it
        deadline = time.monotonic() + 20
        while not rpc._listens(self.endpoint):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def servers():
    with Server() as one, Server() as two:
        yield [one, two]


def names(servers):
    return ",".join(server.endpoint for server in servers)


COMMANDS = {8: "get", 10: "compute", 16: "compute", 6: "set"}  # enum rpc_cmd


class Proxy:
    """Passes on what a client and a server say, and counts: bytes to the server (up) and back (down), and commands."""

    def __init__(self, server):
        self.target, self.up, self.down, self.commands = server.port, 0, 0, {}
        self.cut_after = None  # computations
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client, server):
        left, head = 0, b""  # of the request that is on its way
        with client, server, self._ending(client, server):
            while data := self._receive(client):
                self.up += len(data)
                rest = data
                while rest:
                    skipped = min(left, len(rest))
                    rest, left = rest[skipped:], left - skipped
                    if left or not rest:
                        continue
                    head, rest = head + rest[: 9 - len(head)], rest[9 - len(head) :]
                    if len(head) == 9:
                        command, left = struct.unpack("<BQ", head)
                        head = b""
                        name = COMMANDS.get(command, "other")
                        self.commands[name] = self.commands.get(name, 0) + 1
                if self.cut_after is not None and self.commands.get("compute", 0) > self.cut_after:
                    self.close()
                    return
                server.sendall(data)

    def _down(self, server, client):
        with server, client, self._ending(client, server):
            while data := self._receive(server):
                self.down += len(data)
                try:
                    client.sendall(data)
                except OSError:
                    return

    def close(self):
        with self.listener, self._ending(self.listener):  # a thread waits in it
            pass

    @staticmethod
    @contextmanager
    def _ending(*connections):
        try:
            yield
        finally:
            for connection in connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the other thread
                except OSError:
                    pass

    @staticmethod
    def _receive(connection):
        try:
            return connection.recv(1 << 20)
        except OSError:
            return b""

    def count(self):
        return {"up": self.up, "down": self.down, "get": 0, "compute": 0, **self.commands}


@contextmanager
def proxies(servers):
    made = [Proxy(server) for server in servers]
    try:
        yield made
    finally:
        for proxy in made:
            proxy.close()


def spent(proxy, before):
    return {name: n - before.get(name, 0) for name, n in proxy.count().items()}


# --- servers that cannot be used -------------------------------------------------------------------------------------


HELLO = struct.calcsize("<BQ24x")


@contextmanager
def fake(answer):
    """A server that reads the hello and does ``answer(connection)``."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(HELLO, socket.MSG_WAITALL)
                    answer(connection)
                except OSError:
                    pass

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def says(major, minor, patch):
    hello = struct.pack("<QBBBx24x", 28, major, minor, patch)
    return lambda connection: (connection.sendall(hello), connection.recv(1))


def silent(connection):
    connection.recv(1)


def drips(connection):
    for byte in struct.pack("<QBBBx24x", 28, 7, 0, 0):
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


OURS = rpc.library().version
FAKES = {
    "closes": (lambda connection: None, "is no RPC server (it closed the connection)"),
    "rubbish": (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "is no RPC server"),
    "huge": (lambda connection: connection.sendall(b"\xff" * 64), "is no RPC server"),
    "silent": (silent, "does not answer within"),
    "drips": (drips, "does not answer within"),
    "stock": (says(7, 0, 0), "is llama.cpp's own (protocol 7.0.0)"),
    "as our patches once counted": (says(7, 0, 2), "is llama.cpp's own"),
    "stock to come": (says(8, 3, 1), "is llama.cpp's own (protocol 8.3.1)"),
    "another build": (says(OURS[0], OURS[1], OURS[2] ^ 1), "is of another build of edgekv"),
    "another base": (says(OURS[0] + 1, *OURS[1:]), "is of another build of edgekv"),
}


@pytest.mark.parametrize("name", FAKES)
def test_a_server_that_cannot_be_used_is_refused_with_one_line(name, model, monkeypatch):
    monkeypatch.setattr(rpc, "TIMEOUT_S", 0.5)
    answer, why = FAKES[name]
    with fake(answer) as endpoint:
        for command in (("run", "-p", "x"), ("chat",)):
            fails(f"RPC server {endpoint}: {why}", *command, model, "--rpc", endpoint)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_nobody_there(model, monkeypatch):
    monkeypatch.setattr(rpc, "TIMEOUT_S", 0.5)
    endpoint = f"127.0.0.1:{free_port()}"
    fails(f"RPC server {endpoint}: nobody listens there", "run", model, "-p", "x", "--rpc", endpoint)
    fails(f"RPC server {endpoint}: nobody listens there", "bench", model, "--rpc", endpoint)
    fails("RPC server no.such.host.invalid:1: the host is not known", "run", model, "-p", "x", "--rpc",
          "no.such.host.invalid:1")
    with socket.socket() as deaf:  # its queue is full: connections wait
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        with ExitStack() as stack:
            for _ in range(4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            fails("cannot be reached within", "run", model, "-p", "x", "--rpc", f"127.0.0.1:{address[1]}")
    with pytest.raises(EdgekvError, match="nobody listens"):
        package.Llama(str(model), rpc_servers=[endpoint])


@pytest.mark.parametrize("text, why", [
    ("", "give HOST:PORT"), ("host", "give HOST:PORT"), ("host:", "give HOST:PORT"), (":1", "give HOST:PORT"),
    ("host:0", "give HOST:PORT"), ("host:65536", "give HOST:PORT"), ("host:1,,host:2", "give HOST:PORT"),
    ("host:x", "give HOST:PORT"), ("[::1]:1", "only IPv4"), (",".join(f"h:{i}" for i in range(1, 18)), "at most 16"),
])
def test_malformed_addresses(text, why):
    with pytest.raises(EdgekvError, match=why):
        rpc.parse_servers(text)


def test_flags_that_contradict_each_other(model, servers):
    endpoint, port = servers[0].endpoint, servers[0].port
    fails("is named twice", "run", model, "-p", "x", "--rpc", f"{endpoint},{endpoint}")
    fails("it is 127.0.0.1", "run", model, "-p", "x", "--rpc", f"{endpoint},localhost:{port}")
    fails("-ngl 0 leaves no layer", "run", model, "-p", "x", "--rpc", endpoint, "-ngl", 0)


def test_a_build_without_rpc(model, monkeypatch):
    def none(*_args):
        raise LookupError

    monkeypatch.setattr(rpc._Library, "__init__", none)
    fails("this build of edgekv has no RPC", "run", model, "-p", "x", "--rpc", "127.0.0.1:1")
    fails("this build of edgekv has no RPC", "rpc-server")


@pytest.mark.parametrize("name", ["closes", "rubbish", "stock", "another build"])
def test_the_library_by_itself_does_not_abort(name):
    """Whoever calls it without looking first gets NULL."""
    with fake(FAKES[name][0]) as endpoint:
        code = ("from edgekv import rpc\nimport sys\nlib = rpc.library()\n"
                f"for endpoint in ({endpoint!r}, '127.0.0.1:{free_port()}', 'no port'):\n"
                "    assert not lib.add_server(endpoint.encode())\nprint('fine')")
        r = subprocess.run(python(code), capture_output=True, text=True, timeout=60)
        assert r.stdout == "fine\n", r.stderr


def test_a_server_is_asked_for_its_operators(servers):
    """An upstream client says yes to everything; a context would be created, and the server die of an eviction."""
    lib = rpc.library()
    pointer = ctypes.c_void_p
    address_of = lib.ggml.bind("ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p)
    device = rpc.devices(servers[0].endpoint)[0]
    ask = ctypes.CFUNCTYPE(ctypes.c_bool, pointer, pointer)(
        address_of(lib.ggml.registry_of(device), b"ggml_backend_rpc_supports_op"))
    says_yes = lib.ggml.bind("ggml_backend_dev_supports_op", ctypes.c_bool, pointer, pointer)
    with Graph() as graph:
        norms = {kind: graph.op("score", graph.tensor(kind, (4, 2, 8), np.zeros(64 * size, np.uint8)), None, 1, 1.0)
                 for kind, size in (("f16", 2), ("i32", 4))}
        assert {kind: ask(device, op) for kind, op in norms.items()} == {"f16": True, "i32": False}
        assert all(says_yes(device, op) for op in norms.values())


def test_a_stock_client_turns_away():
    """It takes a server with its own major version, 7 or what upstream will count up to."""
    assert OURS[0] == 107 and OURS[1:] != (0, 0)


# --- the server as a command -----------------------------------------------------------------------------------------


def test_server_says_what_is_wrong(servers):
    fails("address already in use; is a server running there", "rpc-server", "-p", servers[0].port)
    fails("--device GPU7: there is no such device, choose among CPU", "rpc-server", "-d", "GPU7")
    fails("is not known", "rpc-server", "-H", "no.such.host.invalid")


def test_server_warns_and_ends_at_once(model):
    with Server("-H", "0.0.0.0", "-d", "CPU") as server:
        assert "warning: 0.0.0.0 can be reached by others" in server.said
        with Session(model, n_ctx=256, rpc_servers=server.endpoint) as session:  # in the midst of serving
            session.decode([5], 0)
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=20) == 0 and time.monotonic() - began < 10
            # what is left of the session cannot be freed any more: the library would abort
            session.ctx = session.model = session._batch = None


def test_one_client_at_a_time(model, servers, monkeypatch):
    monkeypatch.setattr(rpc, "TIMEOUT_S", 0.5)
    with Session(model, n_ctx=256, rpc_servers=servers[0].endpoint):
        # this process has a connection already
        assert rpc.look(servers[0].endpoint)[0].endpoint == servers[0].endpoint
        code = ("from edgekv import rpc\nfrom edgekv.errors import EdgekvError\nrpc.TIMEOUT_S = 0.5\n"
                f"try: rpc.look({servers[0].endpoint!r})\nexcept EdgekvError as e: print(e)")
        r = subprocess.run(python(code), capture_output=True, text=True, timeout=60)
        assert "it has another client" in r.stdout, r


# --- the same as in one process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models with filters, by architecture."""
    folder = tmp_path_factory.mktemp("rpc")
    result = {}
    for arch in ("llama", "gemma3"):
        plain = write_tiny_model(folder / f"{arch}-plain.gguf", arch=arch, n_layer=N_LAYER, n_head_kv=N_HEAD_KV)
        result[arch] = folder / f"{arch}.gguf"
        convert(plain, result[arch], random_filters(GGUF(plain)))
    return result


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


TOKENS = np.random.default_rng(0).integers(3, 300, 400)
QUEST = SelectionSettings("quest", 64, 16, 1)


def follow(model, n=8, servers="", settings=None, evict=0, **options):
    """Read, perhaps evict, and answer greedily: logits of every step, positions and rows of the cache, state."""
    filters = load_filters(GGUF(model)) if settings is not None and needs_filters(settings.policy) else None
    with Session(model, n_ctx=512, n_ubatch=64, n_threads=1, settings=settings, filters=filters, rpc_servers=servers,
                 **options) as session:
        logits, token, pos = [], 5, len(TOKENS)
        session.read(TOKENS)
        if evict:
            session.evict(0, evict)
        for _ in range(n):
            logits.append(session.decode([token], pos, logits="last")[0])
            token, pos = int(logits[-1].argmax()), pos + 1
        layers = range(len(session.layers()))
        stats = session.stats()
        return {
            "logits": np.stack(logits),
            "positions": [session.positions(i, h) for i in layers for h in range(N_HEAD_KV)],
            "rows": [session.rows(i, h, values=v) for i in layers for h in range(N_HEAD_KV) for v in (False, True)],
            "counts": [stats.cells_used, stats.n_evictions, stats.floor, stats.n_selections, stats.pages_read],
            "state": session.save(),
        }


def equal(here, there):
    """Bit for bit: the same kernels ran, in the other processes."""
    assert here["counts"] == there["counts"]
    for name in ("positions", "rows"):
        assert len(here[name]) == len(there[name]) and all(map(np.array_equal, here[name], there[name])), name
    assert np.array_equal(here["logits"], there["logits"])
    assert here["state"] == there["state"]


POLICIES = ["none", "qfilters", "streaming", "knorm", "kvdiff", "qfilters+keydiff", "kvdiff+qfilters+recency"]


@pytest.mark.parametrize("mode", ["bounded", "prompt"])
@pytest.mark.parametrize("policy", POLICIES)
def test_evicted(policy, mode, model, servers):
    settings = None if policy == "none" else EvictionSettings(policy, 128, 16, 4, mode)
    options = {"settings": settings, "evict": 100 if settings and mode == "prompt" else 0}
    here = follow(model, **options)
    assert policy == "none" or here["counts"][1] > 0
    equal(here, follow(model, servers=names(servers), **options))


@pytest.mark.parametrize("policy", ["none", "qfilters"])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_selected(policy, cache, model, servers):
    """With a quantised cache K and filters are rotated."""
    options = {"settings": None if policy == "none" else EvictionSettings(policy, 128, 16, 4), "selection": QUEST,
               "flash_attn": True, "type_k": cache, "type_v": cache}
    here = follow(model, **options)
    assert here["counts"][3] > 0
    equal(here, follow(model, servers=names(servers), **options))


@pytest.mark.parametrize("n_gpu_layers", [1, 2, 3, 4, 5])
def test_some_layers_here(n_gpu_layers, model, servers):
    """The last ones are there, counting the output."""
    options = {"settings": EvictionSettings("qfilters", 128, 16, 4), "selection": QUEST, "flash_attn": True}
    equal(follow(model, **options), follow(model, servers=names(servers), n_gpu_layers=n_gpu_layers, **options))


def test_the_cache_stays_here(model, servers):
    """Layers there, their cache here: so is the selection, and a step's keys do not travel."""
    options = {"settings": EvictionSettings("qfilters", 128, 16, 4), "selection": QUEST, "flash_attn": True}
    equal(follow(model, **options), follow(model, servers=names(servers), offload_kqv=False, **options))
    rows = wire(model, servers, (300, 1100, 2100), n_ubatch=128, n_threads=1, flash_attn=True, selection=QUEST,
                offload_kqv=False)
    check_wire(rows, 0)


def test_sliding_windows(models, servers):
    options = {"settings": EvictionSettings("keydiff", 128, 16, 4), "selection": SelectionSettings("quest", 64, 16, 0),
               "flash_attn": True}
    here = follow(models["gemma3"], **options)
    assert here["counts"][1] > 0 and here["counts"][3] > 0
    equal(here, follow(models["gemma3"], servers=names(servers), **options))


def test_states_sequences_and_tails(model, servers):
    """What one process saves the other reads on with; a copied sequence goes on as its source; a tail comes off."""
    options = {"n_ctx": 512, "n_ubatch": 64, "n_threads": 1, "n_seq_max": 2,
               "settings": EvictionSettings("knorm", 128, 32, 4)}
    step = {"logits": "last"}
    with Session(model, **options) as here, Session(model, rpc_servers=names(servers), **options) as there:
        for session in (here, there):
            session.read(TOKENS)
        state = here.save()
        assert there.save() == state
        want = here.decode([7], len(TOKENS), **step)
        here.clear(), there.clear()
        there.load(state), here.load(state)
        assert np.array_equal(there.decode([7], len(TOKENS), **step), want)
        there.copy(0, 1)
        here.copy(0, 1)
        copied, source = (there.decode([9], len(TOKENS) + 1, seq_id, **step) for seq_id in (1, 0))
        assert np.array_equal(copied, source)
        n = len(TOKENS) - 8
        for session in (here, there):
            assert session.remove(n) and not session.remove(10)
        assert np.array_equal(here.decode([11], n, **step), there.decode([11], n, **step))


def test_run_and_llama(model, servers, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    command = ["run", model, "-f", text, "-p", "question", "-n", 8, "--temp", 0, "-t", 1, "-ub", 64, "-b", 64,
               "--kv-budget", 64, "-fa", "off"]
    r = subprocess.run([*map(str, [*EDGEKV, *command, "--rpc", names(servers)])], capture_output=True, text=True,
                       timeout=60)
    assert r.returncode == 0 and "evictions" in r.stderr, r.stderr
    assert r.stdout == edgekv(*command).stdout
    # whoever loads a model without servers afterwards has none
    llama = package.Llama(str(model), rpc_servers=names(servers), n_threads=1, n_threads_batch=1)
    there = llama.create_completion("word " * 9, max_tokens=8, temperature=0)["choices"][0]["text"]
    assert llama.model_params.n_gpu_layers == 0x7FFFFFFF
    del llama
    here = package.Llama(str(model), n_threads=1, n_threads_batch=1)
    assert not here.model_params.devices
    assert here.create_completion("word " * 9, max_tokens=8, temperature=0)["choices"][0]["text"] == there


def test_auto_budget_asks_the_servers(model, monkeypatch):
    """Memory there and on GPUs counts, not here; with some of the layers here, both."""
    from edgekv.cli.options import _free_bytes

    monkeypatch.setattr("edgekv.memory.available_bytes", lambda: 1000)
    there = [rpc.Server("a:1", [10, 20]), rpc.Server("b:1", [30])]
    cases = ((there, -1), (there, 99), (there, 2), ([], 0), ([], -1), ([], 2))
    for gpu, want in (0, [60, 60, 1060, 1000, 1000, 1000]), (200, [260, 260, 1260, 1000, 200, 1200]):
        monkeypatch.setattr("edgekv.memory.gpu_bytes", lambda gpu=gpu: gpu)
        assert [_free_bytes(s, n, GGUF(model)) for s, n in cases] == want


def test_bench(model, servers):
    r = edgekv("bench", model, "--rpc", names(servers), "-d", 64, "-n", 4, "-p", 8, "-r", 1, "-t", 1, "-ub", 64, "-o",
               "json", "--kv-evict", "none,streaming", "--kv-budget", 32)
    assert r.exit_code == 0, r.stderr
    rows = json.loads(r.stdout)
    assert {(row["backend"], row["rpc"], row["n_gpu_layers"]) for row in rows} == {("RPC", names(servers), -1)}
    assert any(row["n_evictions"] for row in rows)


# --- what crosses the wire -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_an_eviction_reads_once_per_device(policy, model, servers):
    """One graph there and one read: the choices, four bytes per KV head and token that stays, and nothing else. Ages go
    there as well, four bytes per KV head and token."""
    n, budget = 300, 128
    settings = EvictionSettings(policy, budget, 16, 4, "prompt")
    filters = load_filters(GGUF(model)) if needs_filters(policy) else None
    options = {"n_ctx": 512, "n_ubatch": 64, "n_threads": 1, "settings": settings, "filters": filters}
    # with how many cache layers at the servers: the output counts as one
    for ngl, n_there in ((None, N_LAYER), (4, 3), (1, 0)):
        with proxies(servers) as both, Session(model, rpc_servers=names(both), n_gpu_layers=ngl, **options) as session:
            session.read(TOKENS[:n])
            session.evict(0, budget)
            session.clear()
            session.read(TOKENS[: n - 1])
            session.decode(TOKENS[n - 1 : n], n - 1, logits="last")  # the servers have done all when it is here
            before = [proxy.count() for proxy in both]
            assert session.evict(0, budget) == n - budget
            layers = 0
            for got in map(spent, both, before):
                if got["up"] or got["down"]:
                    assert got["get"] == 1 and got["compute"] == 1
                    here, rest = divmod(got["down"] - 8, N_HEAD_KV * budget * 4)
                    # the graph; the policy that looks at ages has the largest, and sends them along
                    least, most = (4 * N_HEAD_KV * n, 4 * N_HEAD_KV * n + 12000) if "recency" in policy else (0, 8000)
                    assert here > 0 and rest == 0 and here * least < got["up"] < here * most
                    layers += here
            assert layers == n_there


def wire(model, servers, depths, n_steps=4, print_as="", **options):
    """At each depth the cells in the mask and, per server, bytes per token up and down."""
    rows = []
    options |= {"n_ctx": max(depths) + 256}
    with proxies(servers) as both, Session(model, rpc_servers=names(both), **options) as session:
        pos, rng = 0, np.random.default_rng(0)
        for depth in depths:
            session.read(rng.integers(3, 300, depth - pos), pos)
            pos = depth
            for _ in range(2):  # the first step sends a new graph, the next ones use it again
                session.decode([5], pos, logits="last")
                pos += 1
            before = [proxy.count() for proxy in both]
            for _ in range(n_steps):
                session.decode([5], pos, logits="last")
                pos += 1
            got = [spent(proxy, start) for proxy, start in zip(both, before)]
            cells = -(-session.stats().cells_used // 256) * 256
            rows.append((cells, *((g["up"] / n_steps, g["down"] / n_steps) for g in got)))
            if print_as:
                print(f"{print_as:>24} depth {depth:>6}: {cells:>6} cells, bytes per token to and from servers: "
                      + ", ".join(f"{up:.0f} and {down:.0f}" for up, down in rows[-1][1:]))
    return rows


def check_wire(rows, bytes_per_cell):
    """To each server a mask and what does not depend on the context; back nothing that does."""
    (cells, *first), *more = rows
    for n, *servers in more:
        for (up, down), (first_up, first_down) in zip(servers, first):
            assert up - first_up == bytes_per_cell * (n - cells) and down == first_down


WIRE = {
    "full, -fa off": ({}, 4),
    "full": ({"flash_attn": True}, 2),
    "quest": ({"flash_attn": True, "selection": QUEST}, 2),
    "evicted": ({"flash_attn": True, "settings": EvictionSettings("knorm", 128, 16, 4)}, 2),
    "evicted, quest": ({"flash_attn": True, "settings": EvictionSettings("knorm", 128, 16, 4), "selection": QUEST}, 2),
}


@pytest.mark.parametrize("name", WIRE)
def test_bytes_per_token_grow_by_the_mask_alone(name, model, servers):
    options, bytes_per_cell = WIRE[name]
    rows = wire(model, servers, (300, 1100, 2100), n_ubatch=128, n_threads=1, print_as=name, **options)
    check_wire(rows, bytes_per_cell)
    assert ("evicted" in name) == (rows[-1][0] == rows[0][0])
    # in all, with room to spare: the mask, positions and cells, the token's activation in and out, its logits
    for cells, *both in rows:
        assert all(up < bytes_per_cell * cells + 8192 and down < 8192 for up, down in both)


# --- a server that dies ----------------------------------------------------------------------------------------------


def test_a_server_that_dies_ends_the_program_with_one_line(model, servers, tmp_path):
    """In mid-answer."""
    with proxies(servers) as both:
        both[1].cut_after = 12
        command = [*EDGEKV, "run", model, "-p", "word " * 50, "-n", 400, "--temp", 0, "-t", 1, "--rpc", names(both),
                   "--kv-evict", "keydiff", "--kv-budget", 32, "-ub", 16, "-b", 16]
        r = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    lines = [line for line in r.stderr.splitlines() if "error" in line]
    assert r.returncode == 1 and len(lines) == 1, r.stderr
    assert lines[0].startswith(f"edgekv: error: RPC server {both[1].endpoint}: the connection was lost")
    assert "ggml" not in r.stderr and "Traceback" not in r.stderr


def test_a_saved_session_survives_a_server_that_dies(smollm2, tmp_path):
    """The server is killed while the chat goes on: neither what was saved before nor the folder around it suffers."""
    path = tmp_path / "chat.session"
    with Server() as server:
        command = [*EDGEKV, "chat", smollm2, "--rpc", server.endpoint, "-ngl", 3, "-n", 4, "--temp", 0, "-c", 512,
                   "--kv-evict", "keydiff", "--kv-budget", 64, "-ub", 32]
        chat = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
        chat.stdin.write("word word word\n" + f"/save {path}\n")
        chat.stdin.flush()
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline and chat.poll() is None, chat.communicate()
            time.sleep(0.05)
        saved = path.read_bytes()
        server.process.kill()
        server.process.wait()
        _, said = chat.communicate(f"another word\n/save {path}\n", timeout=60)
    assert chat.returncode == 1 and "the connection was lost" in said, said
    assert path.read_bytes() == saved and [p.name for p in tmp_path.iterdir()] == [path.name]
    session = SavedSession.read(path)
    assert len(session.messages) == 2


# --- the real model --------------------------------------------------------------------------------------------------


TEXT = "The harbour master wrote down every ship that came in, its cargo and its captain. "


@pytest.mark.slow
@pytest.mark.parametrize("policy, select, budget", [
    ("none", "none", None), ("qfilters", "none", 256), ("none", "quest", None), ("qfilters", "quest", 512)])
def test_smollm2_gives_the_same_text(policy, select, budget, smollm2_qfilters, servers):
    prompt = TEXT * 60 + "\n\nIn one sentence, the harbour master"
    answers, selection = [], SelectionSettings.resolve(select, 256 if select == "quest" else None)
    for rpc_servers in ("", names(servers)):
        llama = package.Llama(str(smollm2_qfilters), n_ctx=2048, n_batch=256, n_ubatch=256, kv_evict=policy,
                              kv_budget=budget, selection=selection, flash_attn=True, rpc_servers=rpc_servers)
        answers.append(llama.create_completion(prompt, max_tokens=64, temperature=0)["choices"][0]["text"])
        stats = llama.stats()
        assert (stats.n_evictions > 0) == (policy != "none") and (stats.n_selections > 0) == (select != "none")
        del llama
    assert answers[0] == answers[1] and answers[0].strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "quest", "evicted"])
def test_smollm2_on_the_wire(name, smollm2, servers):
    options = dict(WIRE[name][0])
    if name == "quest":
        options["selection"] = SelectionSettings.resolve("quest", 256)
    check_wire(wire(smollm2, servers, (300, 1100, 2100, 4100), n_ubatch=512, print_as=f"SmolLM2, {name}", **options), 2)
