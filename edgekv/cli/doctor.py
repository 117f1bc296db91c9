"""``edgekv doctor``"""

from __future__ import annotations

import json
from typing import Any

import click

from edgekv.cli.common import format_bytes
from edgekv.cli.options import look_at_servers
from edgekv.errors import EdgekvError

_STATES = {
    "loaded": "loaded",
    "library": "",
    "spare": "not needed, a better variant is loaded",
    "unfit": "for other processors than this one, which is normal",
    "idle": "loaded: ",
    "failed": "NOT LOADED: ",
}


@click.command()
@click.option("-m", "--model", metavar="MODEL",
              help="Say what works with this model: a path, a known name or hf:ORG/REPO:QUANT.")
@click.option("--rpc", metavar="HOST:PORT,...", help="Look at the devices of these rpc-server processes too.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Format on standard output.")
def doctor(model: str | None, rpc: str | None, output: str) -> None:
    """Show which devices there are, what runs where, and why something is not used.

    The status is 0 if the CPU works and every library that should load here does.
    """
    from edgekv.doctor import diagnose, failures

    if model is not None:
        from edgekv.pull import resolve_model

        model = str(resolve_model(model))
    look_at_servers(rpc, None)
    facts = diagnose(model, rpc)
    if output == "json":
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if failed := failures(facts):
        raise EdgekvError("; ".join(failed))


def _row(label: str, text: object) -> None:
    click.echo(f"{label:<16}{text}")


def _print(facts: dict[str, Any]) -> None:
    source, system, cpu = facts["llama_cpp"], facts["platform"], facts["cpu"]
    patches = (f"{source['n_patches']} patches, sha256 {source['patches_sha256'][:16]}" if source["patches_sha256"]
               else "its patches are not recorded")
    _row("edgekv", f"{facts['edgekv']} on llama.cpp of {source['package']} {source['version']}, ggml {source['ggml']}; "
                   f"{patches}")
    name = f"macOS {system['macos']}" if system["macos"] else f"{system['system']} {system['release']}"
    _row("system", f"{name}, {system['machine']}, Python {facts['python']}")
    _row("processor", f"{cpu['threads']} threads, {cpu['variant'] or 'built in'}: {' '.join(cpu['features'])}")
    available = cpu["memory_available"]
    _row("free memory", format_bytes(available) if available is not None else "the system does not say")
    nvidia = facts["nvidia"]
    if nvidia["driver"] or nvidia["gpus"]:
        _row("NVIDIA driver", nvidia["driver"] or "of unknown version")

    click.echo()
    _row("libraries", facts["libraries"]["folder"])
    width = max(len(file["file"]) for file in facts["libraries"]["files"])
    for file in facts["libraries"]["files"]:
        said = _STATES[file["state"]] + (file["reason"] or "")
        click.echo(f"  {file['file']:<{width}}  {said}".rstrip())

    click.echo()
    click.echo("devices")
    for device in facts["devices"]:
        _print_device(device)
    click.echo()
    _print_operators(facts["devices"])
    if facts["model"]:
        click.echo()
        _print_model(facts["model"])
    click.echo()
    for line in facts["advice"]:
        click.echo(f"- {line}")


def _print_device(device: dict[str, Any]) -> None:
    parts = [device["description"], device["type"]]
    if device["memory_total"]:
        parts.append(f"{format_bytes(device['memory_free'] or 0)} of {format_bytes(device['memory_total'])} free")
    if device["compute_capability"]:
        parts.append(f"compute capability {device['compute_capability']}")
    if "ARCHS" in device["features"]:
        parts.append(f"compiled for {device['features']['ARCHS']}")
    parts.append(f"backend {device['backend']}")
    click.echo(f"  {device['name']:<14}{', '.join(parts)}")


def _print_operators(devices: list[dict[str, Any]]) -> None:
    """Operators down, devices across."""
    from edgekv.doctor import CACHE_TYPES, EVICTION, HEAD_SIZES, SELECTION, cell

    sizes = ", ".join(map(str, HEAD_SIZES))
    click.echo(f"what runs where, for caches of {', '.join(CACHE_TYPES)} and heads of {sizes}")
    names = (*EVICTION, *SELECTION)
    uses = ["", *("eviction" if name in EVICTION else "selection" for name in names)]
    columns = [[device["name"], *(cell(device["operators"][name]) for name in names)] for device in devices
               if device["type"] != "accelerator"]  # multiplies matrices for the CPU and holds no cache
    for row in zip(uses, ["", *names], *columns):
        widths = (10, 22, *(max(map(len, column)) + 2 for column in columns))
        click.echo(("  " + "".join(f"{text:<{width}}" for text, width in zip(row, widths))).rstrip())


def _print_model(model: dict[str, Any]) -> None:
    _row("model", f"{model['model']}, {model['n_layer']} layers")
    _row("  Q-Filters", "in the file" if model["qfilters"] else "none; edgekv convert --with-qfilters adds them")
    for what in ("eviction", "selection"):
        facts = model[what]
        where = ", ".join(f"{device}: {'yes' if able else 'no'}" for device, able in facts["devices"].items())
        n_layers = len(facts["layers"])
        _row(f"  {what}", facts["refused"] or f"possible in {n_layers} layers; with an f16 cache on {where}")
