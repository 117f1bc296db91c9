"""Layers and their caches on other machines: the two ends of llama.cpp's RPC, of the same patched build.

The client in the library waits for ever for a server that does not answer, and aborts the process if one dies. So
:func:`devices` looks at each server first, in the library's own protocol: ``ggml/src/ggml-rpc/ggml-rpc.cpp``.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

from edgekv import _runtime
from edgekv.errors import EdgekvError

PORT = 50052
TIMEOUT_S = 5.0  # for everything that a server is asked before the model loads
MAX_SERVERS = 16

_GET_DEVICE_MEMORY, _HELLO, _DEVICE_COUNT = 11, 14, 15  # enum rpc_cmd
_N_CAPS = 24  # bytes in a hello for other transports; none here
_OURS = 100  # our major versions are above, upstream's below


class Server(NamedTuple):
    """A server that can be used.

    Attributes:
        free_bytes: per device; a CPU says how much memory the machine has, not how much is free.
    """

    endpoint: str
    free_bytes: list[int]


def library() -> _Library:
    """EdgekvError if this build has no RPC."""
    try:
        return _Library()
    except (OSError, LookupError):
        raise EdgekvError("this build of edgekv has no RPC: build it with CMAKE_ARGS=-DGGML_RPC=ON") from None


class _Library:
    """The functions of libggml-rpc, which ggml has loaded."""

    def __init__(self):
        self.ggml = _runtime.Ggml()
        registry = self.ggml.bind("ggml_backend_reg_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"RPC")
        if not registry:
            raise LookupError("RPC")
        address_of = self.ggml.bind("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p,
                                    ctypes.c_char_p)

        def function(name: str, restype, *argtypes):
            address = address_of(registry, f"ggml_backend_rpc_{name}".encode())
            if not address:
                raise LookupError(name)
            return ctypes.CFUNCTYPE(restype, *argtypes)(address)

        text, size, pointer = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p
        self.add_server = function("add_server", pointer, text)
        self.start_server = function("start_server", None, text, text, size, size, ctypes.POINTER(pointer))
        self.is_connected = function("is_connected", ctypes.c_bool, text)
        number = function("version", ctypes.c_uint32)()
        self.version = number >> 16, number >> 8 & 255, number & 255
        self.n_devices = self.ggml.n_devices
        self.device = self.ggml.bind("ggml_backend_reg_dev_get", pointer, pointer, size)


# --- the client ------------------------------------------------------------------------------------------------------


def parse_servers(servers: str | Sequence[str]) -> list[str]:
    """``HOST:PORT,...``, or a sequence of such, as a list. EdgekvError, naming the one that is wrong."""
    words = servers.split(",") if isinstance(servers, str) else list(servers)
    endpoints = []
    for word in map(str.strip, words):
        host, colon, port = word.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise EdgekvError(f"RPC server {word!r}: give HOST:PORT, or several with commas between them")
        if ":" in host:
            raise EdgekvError(f"RPC server {word}: only IPv4 addresses and host names work")
        endpoints.append(f"{host}:{int(port)}")
    if len(endpoints) > MAX_SERVERS:
        raise EdgekvError(f"{len(endpoints)} RPC servers: at most {MAX_SERVERS} work")
    return endpoints


def devices(servers: str | Sequence[str]) -> ctypes.Array:
    """The devices for ``llama_model_params.devices``: those of the servers, then this machine's GPUs. Keep the array
    while a model loads.

    Raises:
        EdgekvError: this build has no RPC, or a server cannot be used; names the server.
    """
    lib = library()
    found = []
    for server in look(servers):
        registry = lib.add_server(server.endpoint.encode())
        if not registry:  # it went since, or somebody else took it
            raise EdgekvError(f"RPC server {server.endpoint}: could not be used; try again")
        found += [lib.device(registry, i) for i in range(lib.n_devices(registry))]
    return (ctypes.c_void_p * (len(found) + 17))(*found, *lib.ggml.gpus()[:16])


def gpu_layers(n_gpu_layers: int | None, servers: str | Sequence[str] | None) -> int:
    """``-ngl``; where none is given, all layers if there are servers, else none."""
    return (-1 if servers else 0) if n_gpu_layers is None else n_gpu_layers


def look(servers: str | Sequence[str]) -> list[Server]:
    """Ask each server whether it can be used; nothing is loaded yet.

    Raises:
        EdgekvError: one cannot be reached, does not answer, is no RPC server or is of another build; names it.
    """
    lib = library()
    result, addresses = [], {}
    for endpoint in parse_servers(servers):
        address = _resolve(endpoint)
        if address in addresses:
            raise EdgekvError(f"RPC server {endpoint}: is named twice"
                              + ("" if endpoint == addresses[address] else f", it is {addresses[address]} too"))
        addresses[address] = endpoint
        if lib.is_connected(endpoint.encode()):
            # it has answered before, and would not answer a second connection
            result.append(Server(endpoint, []))
        else:
            result.append(_look(endpoint, address, lib.version))
    return result


def _resolve(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    try:
        return socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError):
        raise EdgekvError(f"RPC server {endpoint}: the host is not known; check the name") from None


class _NotRpc(Exception):
    pass


def _look(endpoint: str, address: tuple[str, int], ours: tuple[int, int, int]) -> Server:
    deadline = time.monotonic() + TIMEOUT_S
    try:
        connection = socket.create_connection(address, timeout=TIMEOUT_S)
    except ConnectionRefusedError:
        raise EdgekvError(f"RPC server {endpoint}: nobody listens there; start `edgekv rpc-server` on that machine"
                          ) from None
    except TimeoutError:
        raise EdgekvError(f"RPC server {endpoint}: cannot be reached within {TIMEOUT_S:.0f} s; check address and "
                          "firewall") from None
    except OSError as error:
        raise EdgekvError(f"RPC server {endpoint}: cannot be reached ({error.strerror or error})") from None

    def receive(n: int) -> bytes:
        data = b""
        while len(data) < n:
            connection.settimeout(max(1e-3, deadline - time.monotonic()))
            part = connection.recv(n - len(data))
            if not part:
                raise _NotRpc("it closed the connection")
            data += part
        return data

    def ask(command: int, request: bytes, n_answer: int) -> bytes:
        connection.sendall(struct.pack("<BQ", command, len(request)) + request)
        if struct.unpack("<Q", receive(8)) != (n_answer,):
            raise _NotRpc("its answer is not one")
        return receive(n_answer)

    with connection:
        try:
            version = tuple(ask(_HELLO, bytes(_N_CAPS), 4 + _N_CAPS)[:3])
            if version != ours:
                raise EdgekvError(f"RPC server {endpoint}: {_other(version, ours)}")
            (n_devices,) = struct.unpack("<I", ask(_DEVICE_COUNT, b"", 4))
            free = [struct.unpack("<QQ", ask(_GET_DEVICE_MEMORY, struct.pack("<I", i), 16))[0]
                    for i in range(n_devices)]
        except TimeoutError:
            raise EdgekvError(f"RPC server {endpoint}: does not answer within {TIMEOUT_S:.0f} s; it has another "
                              "client, or is no RPC server") from None
        except (_NotRpc, OSError) as error:
            why = error if isinstance(error, _NotRpc) else error.strerror or error
            raise EdgekvError(f"RPC server {endpoint}: is no RPC server ({why}); is the port right?") from None
    if not n_devices:
        raise EdgekvError(f"RPC server {endpoint}: has no devices")
    return Server(endpoint, free)


def _other(version: tuple[int, ...], ours: tuple[int, int, int]) -> str:
    theirs, here = (".".join(map(str, v)) for v in (version, ours))
    if version[0] < _OURS:
        return (f"is llama.cpp's own (protocol {theirs}), which lacks the operators of edgekv; start `edgekv "
                "rpc-server` there instead")
    return f"is of another build of edgekv (protocol {theirs}, here {here}); install the same version on both machines"


# --- when a server dies ----------------------------------------------------------------------------------------------

_abort_callback = None  # must outlive the library's use of it


def exit_on_loss(servers: str | Sequence[str]) -> None:
    """For programs: where the library would abort because a server is gone, leave with one line and status 1 instead.
    Nothing of this process runs any more then, and files are written in a way that this does not damage."""
    global _abort_callback
    endpoints = parse_servers(servers)

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
    def leave(message: bytes) -> None:
        if b"RPC" not in message:
            os.write(2, message + b"\n")
            return
        gone = [endpoint for endpoint in endpoints if not _listens(endpoint)] or endpoints
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}edgekv: error: RPC server {', '.join(gone)}: the connection was lost, and with it the "
                    "cache; start it again and repeat\n".encode())
        os._exit(1)

    _abort_callback = leave
    _runtime.Ggml().bind("ggml_set_abort_callback", ctypes.c_void_p, type(leave))(leave)


def _listens(endpoint: str) -> bool:
    try:
        socket.create_connection(_resolve(endpoint), timeout=1).close()
    except (OSError, EdgekvError):
        return False
    return True


# --- the server ------------------------------------------------------------------------------------------------------


class Device(NamedTuple):
    """A device that a server can offer."""

    name: str
    description: str
    handle: int


def offered(names: Sequence[str] = ()) -> list[Device]:
    """The devices of these names, else this machine's GPUs, else its CPU. EdgekvError, naming one that is not there."""
    ggml = library().ggml
    name_of = ggml.bind("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description_of = ggml.bind("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    there = [Device(name_of(dev).decode(), description_of(dev).decode(errors="replace"), dev) for dev in ggml.devices()]
    chosen = []
    for name in names:
        found = [device for device in there if device.name == name]
        if not found:
            raise EdgekvError(f"--device {name}: there is no such device, choose among "
                              f"{', '.join(d.name for d in there)}")
        chosen += found[:1]
    if not chosen:
        own = ggml.gpus()
        chosen = [d for d in there if d.handle in own] or [d for d in there if ggml.device_type(d.handle) == 0][:1]
    return chosen


def bind_address(host: str, port: int) -> tuple[str, int]:
    """The numeric address to listen at; port 0: a free one. EdgekvError, naming the flags, if it cannot be used."""
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError):
        raise EdgekvError(f"--host {host}: is not known; give an IPv4 address of this machine") from None
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            return probe.getsockname()
    except OSError as error:
        raise EdgekvError(f"--host {host} --port {port}: {(error.strerror or str(error)).lower()}; is a server running "
                          "there already?") from None


def serve(address: tuple[str, int], chosen: Sequence[Device], n_threads: int) -> None:
    """Serve one client after another; returns only if that fails."""
    handles = (ctypes.c_void_p * len(chosen))(*(device.handle for device in chosen))
    library().start_server(f"{address[0]}:{address[1]}".encode(), None, n_threads, len(handles), handles)
