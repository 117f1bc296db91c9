"""``edgekv rpc-server``"""

from __future__ import annotations

import ipaddress
import os
import signal
import sys
import threading

import click

from edgekv.cli.talk import say
from edgekv.errors import EdgekvError


@click.command("rpc-server")
@click.option("-H", "--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Address to listen at.")
@click.option("-p", "--port", type=click.IntRange(0, 65535), default=50052, show_default=True,
              help="Port to listen at, 0: a free one.")
@click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1),
              help="Threads of the CPU [default: all cores].")
@click.option("-d", "--device", "device", metavar="NAME,...",
              help="Devices to offer [default: the GPUs, else the CPU].")
def rpc_server(host: str, port: int, n_threads: int | None, device: str | None) -> None:
    """Compute layers, and hold their caches, for an edgekv of the same build on another machine.

    There: edgekv run MODEL --rpc HOST:PORT. One client at a time; what it sends is trusted, so listen only where
    nobody else can connect. Ctrl-C ends it.
    """
    from edgekv import rpc
    from edgekv.session import default_threads

    chosen = rpc.offered([name.strip() for name in device.split(",")] if device else ())
    address = rpc.bind_address(host, port)
    if not ipaddress.ip_address(address[0]).is_loopback:
        say(f"warning: {address[0]} can be reached by others, and whoever connects can read and write this process' "
            "memory")
    devices = ", ".join(f"{d.name} ({d.description})" for d in chosen)
    say(f"serves {devices} at {address[0]}:{address[1]}; Ctrl-C ends it")
    # what the library prints about clients goes with it
    os.dup2(2, 1)

    for number in (signal.SIGINT, signal.SIGTERM):
        # the library would go on waiting for clients
        signal.signal(number, lambda *_: os._exit(0))
    thread = threading.Thread(target=rpc.serve, args=(address, chosen, n_threads or default_threads()), daemon=True)
    thread.start()
    thread.join()
    sys.stderr.flush()
    raise EdgekvError(f"--host {host} --port {port}: the server ended")
