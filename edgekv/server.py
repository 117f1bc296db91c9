"""llama-server, of the patched build, as a child of this process: started, watched, stopped, and understood when it
fails."""

from __future__ import annotations

import ctypes
import errno
import http.client
import ipaddress
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgekv import _runtime
from edgekv.errors import EdgekvError
from edgekv.media import why_not

N_LINES = 400  # of the log, kept to say why the server ended
POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def program() -> Path:
    """llama-server's file. EdgekvError if this installation has none."""
    path = _runtime.lib_dir() / "llama-server"
    if not path.is_file():
        raise EdgekvError(f"{path}: no such file, this edgekv has no server: install it again with `pip install .`")
    return path


# --- where it listens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        hosts: as ``--host`` has them: addresses, names, or paths of sockets, which end in ``.sock``.
        port: 0 where there are only sockets.
        prefix: of all paths.
        tls: whether it speaks HTTPS.
    """

    hosts: tuple[str, ...]
    port: int
    prefix: str = ""
    tls: bool = False

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach it."""
        return not all(host.endswith(".sock") or _is_loopback(host) for host in self.hosts)

    @property
    def url(self) -> str:
        """What a client on this machine connects to."""
        host = self._host
        if host.endswith(".sock"):
            return f"unix://{host}"
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}{self.prefix}"

    @property
    def _host(self) -> str:
        """The first one, as a client on this machine names it."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.hosts[0], self.hosts[0])

    def answers(self) -> bool:
        """Whether ``/health`` says that the model is loaded."""
        connection = self._connection()
        try:
            connection.request("GET", f"{self.prefix}/health")
            # behind a prefix it wants a key, after it has looked whether the model is loaded
            return connection.getresponse().status in (200, 401)
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host = self._host
        if host.endswith(".sock"):
            return _SocketConnection(host)
        if self.tls:  # its certificate is for those who come from elsewhere
            return http.client.HTTPSConnection(host, self.port, timeout=1, context=ssl._create_unverified_context())
        return http.client.HTTPConnection(host, self.port, timeout=1)


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str):
        super().__init__("localhost", timeout=1)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)


def free_port(hosts: Sequence[str], port: int) -> int:
    """The port to listen at; of 0, a free one where there is an address. EdgekvError, naming the flag, if the server could
    not listen at all of them."""
    for host in hosts:
        if host.endswith(".sock"):
            _remove_stale(host)
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError):
            raise EdgekvError(f"--host {host}: is not known; give an address or name of this machine") from None
        try:
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                if family == socket.AF_INET6 and len(hosts) > 1:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                probe.listen(1)
                port = probe.getsockname()[1]
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            if error.errno == errno.EADDRNOTAVAIL:
                raise EdgekvError(f"--host {host}: {why}; give an address of this machine") from None
            raise EdgekvError(f"--host {host} --port {port}: {why}; give another port, or 0 for a free one") from None
    return port


def _remove_stale(path: str) -> None:
    """Make way where the socket of a server lies that has gone: it leaves it behind. EdgekvError if one listens there."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise EdgekvError(f"--host {path}: is a file, and no socket; give another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
    except FileNotFoundError:
        return
    except OSError as error:
        raise EdgekvError(f"--host {path}: {(error.strerror or str(error)).lower()}; give another path") from None
    raise EdgekvError(f"--host {path}: a server listens there already; give another path")


# --- its life --------------------------------------------------------------------------------------------------------


class End(NamedTuple):
    """How a server ended.

    Attributes:
        status: as a shell has it, 128 + n after signal n.
        was_up: whether it had answered.
        signal: the one that this process passed on, 0 if none.
        lines: the last of its log.
    """

    status: int
    was_up: bool
    signal: int
    lines: list[str]


def run(argv: Sequence[str | os.PathLike[str]], address: Address, *, each: Callable[[str], None],
        up: Callable[[], None], env: Mapping[str, str] | None = None) -> End:
    """Start a server and wait for its end. In the main thread only.

    It is in a session of its own, so a terminal's Ctrl-C comes to this process alone. The first SIGINT, SIGTERM or
    SIGHUP is passed on and the server stops in good order; a second one kills it. Whatever ends this process, SIGKILL
    too on Linux, ends the server.

    Args:
        each: gets every line of its log, from another thread.
        up: called once it answers.
    """
    lines: deque[str] = deque(maxlen=N_LINES)

    def pump() -> None:
        for data in process.stdout:
            line = data.decode(errors="replace").rstrip("\r\n")
            lines.append(line)
            each(line)

    reader = threading.Thread(target=pump, daemon=True)
    with _Signals() as passed:  # before there is a process that a signal could leave behind
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       env=env, start_new_session=True, preexec_fn=_die_with_parent())
        except OSError as error:
            raise EdgekvError(f"{argv[0]}: cannot be started: {error.strerror or error}") from None
        try:
            passed.to(process)
            reader.start()
            was_up = False
            while process.poll() is None and not was_up:
                if was_up := address.answers() and process.poll() is None and not passed.first:
                    up()
                else:
                    time.sleep(POLL_S)
            status = process.wait()
        finally:
            if process.returncode is None:
                _kill_group(process)
                process.wait()
    reader.join(timeout=1)  # what it started may still hold the other end
    return End(128 - status if status < 0 else status, was_up, passed.first, list(lines))


class _Signals:
    """Passes the first signal on to a process; a second one kills it."""

    def __init__(self):
        self.first = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> _Signals:
        # one that is ignored, as by nohup, stays so
        self._before = {number: signal.signal(number, self._pass_on)
                        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                        if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, *_exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def to(self, process: subprocess.Popen) -> None:
        """From here on; one that came before is passed on now."""
        self._process = process
        if self.first:
            self._send()

    def _pass_on(self, number: int, _frame) -> None:
        again, self.first = self.first, self.first or number
        if self._process is None:
            return
        if again:
            _kill_group(self._process)
        else:
            self._send()

    def _send(self) -> None:
        # SIGHUP would end it on the spot, it handles the other two
        self._process.send_signal(signal.SIGTERM if self.first == signal.SIGHUP else self.first)


def _kill_group(process: subprocess.Popen) -> None:
    """It and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it has ended


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes another program, so that the kernel ends it with this process."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return prepare


# --- what it says ----------------------------------------------------------------------------------------------------

_COLOUR = re.compile(r"\033\[[0-9;]*[mK]")
_LOG_LINE = re.compile(r"(?:\d+\.\d\d\.\d{3}\.\d{3} )?([DIWE]) (.*)", re.DOTALL)
# what it says about where in its source it is
_PLACE = re.compile(r"(?:(?:srv|slot|que|cmn|res)\s+\S+|\w*_\w*): (.*)", re.DOTALL)
# follow a reason and are none
_GENERAL = re.compile(r"exiting due to|failed to load model|failed to create context|failed to initialize HTTP|"
                      r"trying to fit params")
_ABORT = re.compile(r"\S+\.(?:c|cpp|h|cu|cuh|m|mm):\d+: (.+)")
_NOT_A_NUMBER = re.compile(r"(?:invalid )?(?:sto[a-z]+)(?: argument)?")


def level_and_text(line: str) -> tuple[str, str]:
    """A line of its log: the level, one of D I W E or "", and the text."""
    line = _COLOUR.sub("", line)
    match = _LOG_LINE.fullmatch(line)
    return (match[1], _without_place(match[2].strip())) if match else ("", line.strip())


def _without_place(text: str) -> str:
    match = _PLACE.fullmatch(text)
    return match[1] if match else text


def reason(end: End, model: str) -> str:
    """Why a server ended, in one line, from its log."""
    parsed = [level_and_text(line) for line in end.lines]
    texts = [text for _, text in parsed if text]
    for text in texts:
        if match := re.match(r'error while handling (?:argument|environment variable) "(.+?)": (.*)', text):
            return f"{match[1]}: {_argument_fault(match[2])}"
        if match := re.match(r"error: invalid argument: (.*)", text):
            return f"{match[1]}: llama-server has no such flag; see edgekv serve --help-server"
        if match := re.search(r"couldn't bind HTTP server socket, hostname: (.*), port: (\d+)", text):
            return f"--host {match[1]} --port {match[2]}: cannot listen there; is a server running there already?"
    for text in texts:
        if match := re.search(r"failed to load multimodal model, '(.*)'", text):
            return f"--mmproj {match[1]}: cannot be used with {model}: {why_not(texts)}"
    for pattern in (r"failed to initialize the context: (.*)", r"error loading model: (.*)"):
        for text in texts:
            if match := re.search(pattern, text):
                return f"{model}: {_without_place(match[1])}"

    aborted = [match[1] for _, text in parsed if (match := _ABORT.match(text))]
    errors = [text for level, text in parsed if level == "E" and not _GENERAL.search(text)]
    plain = [text for level, text in parsed if text and not level]
    said = aborted[-1:] or errors[-1:] or plain[:1] or texts[-1:]
    if end.status > 128:
        name = _signal_name(end.status - 128)
        if end.status == 128 + signal.SIGKILL and not aborted:
            return f"llama-server was killed ({name}); is there memory enough?"
        return f"llama-server died ({name})" + (f": {said[0]}" if aborted or errors else "")
    return said[0] if said else f"llama-server ended with status {end.status} and did not say why; -v shows its log"


def _argument_fault(why: str) -> str:
    why = why.removeprefix("error: ").strip()
    if _NOT_A_NUMBER.fullmatch(why):
        return "the value is not a number"
    if why == "expected value for argument":
        return "needs a value"
    return why


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
