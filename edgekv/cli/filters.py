"""``edgekv filters``"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import checked_output, model_option
from edgekv.errors import EdgekvError


@click.group()
def filters() -> None:
    """Export Q-Filters and compare them."""


@filters.command()
@model_option
@click.option("-o", "--output", metavar="OUT", type=click.Path(), required=True, help="The new .safetensors file.")
def export(model: str, output: str) -> None:
    """Write the Q-Filters of MODEL, a GGUF file, in the form in which filters are published.

    That is a safetensors file with one tensor, q_filters [layers, KV heads, head size], in the channel order of
    transformers, and negated; edgekv convert --qfilters and other programs read it. Its path is printed last.
    """
    from edgekv.filters import read
    from edgekv.gguf_file import GGUF
    from edgekv.published import save

    gguf = GGUF(model)
    path = checked_output(output, Path(model), "")
    if path.exists() and any(os.path.samefile(path, part.path) for part in gguf.parts):
        raise EdgekvError(f"-o {path}: is MODEL itself; name another file")
    found = read(gguf)
    if found is None:
        raise EdgekvError(f"{model}: holds no Q-Filters; edgekv convert {model} --with-qfilters adds them")
    save(path, found, gguf)
    click.echo(path)


@filters.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--model", metavar="GGUF", help="The model that published filters are for, if neither A nor B holds it.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Format on standard output.")
def diff(a: str, b: str, model: str | None, output: str) -> None:
    """Compare the Q-Filters A and B of one model, head by head.

    A and B: a GGUF file with filters, or published ones (a .safetensors file, its folder, or ORG/NAME on the hub).
    Two filters that keep the same keys have cosine 1, whatever their norms.
    """
    facts = describe(a, b, model)
    if output == "json":
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def describe(a: str, b: str, model: str | None) -> dict[str, Any]:
    """The facts as plain values. EdgekvError if one cannot be read, or if they are not of one model."""
    from edgekv.published import find, is_gguf

    named = [(name, text, find(text, flag=name)) for name, text in (("A", a), ("B", b))]
    in_gguf = [is_gguf(path, f"{name} {text}") for name, text, path in named]
    target = _model(model, [path for (_, _, path), yes in zip(named, in_gguf) if yes])
    fa, fb = (_read(name, text, path, yes, target) for (name, text, path), yes in zip(named, in_gguf))
    if fa.model_sha256 != fb.model_sha256:
        raise EdgekvError(f"{a} and {b}: belong to different models (model_sha256 differs)")
    if (fa.layers, fa.head_count_kv, fa.head_size) != (fb.layers, fb.head_count_kv, fb.head_size):
        raise EdgekvError(f"{a} and {b}: are of different shape: {_shape(fa)}, and {_shape(fb)}")
    return {"a": a, "b": b, **_compared(fa, fb), "metadata": _differences(fa, fb)}


def _model(model: str | None, files: list[Path]):
    """The GGUF of the model: of ``--model``, else one of ``files`` that is a model's; None if there is none."""
    from edgekv.gguf_file import GGUF
    from edgekv.pull import resolve_model

    if model is not None:
        return GGUF(resolve_model(model))
    # edgekv calibrate writes filters without tensors
    return next((gguf for gguf in map(GGUF, files) if gguf.tensors), None)


def _read(name: str, text: str, path: Path, in_gguf: bool, target):
    """The filters of A or B, checked against their own model, or else against ``target`` if there is one."""
    import numpy as np

    from edgekv.filters import read
    from edgekv.gguf_file import GGUF
    from edgekv.published import load

    if not in_gguf:
        if target is None:
            raise EdgekvError(f"{name} {text}: published filters do not say which model they are for: add --model GGUF")
        return load(path, target, flag=name)
    gguf = GGUF(path)
    found = read(gguf)
    if found is None:
        raise EdgekvError(f"{name} {text}: holds no Q-Filters; edgekv convert {text} --with-qfilters adds them")
    if gguf.tensors or target is not None:
        found.validate(gguf if gguf.tensors else target, source=f"{name} {text}")
    elif not all(np.isfinite(v).all() and v.any(axis=1).all() for v in found.vectors):
        raise EdgekvError(f"{name} {text}: holds NaN, infinity or an all-zero vector; make it again with edgekv "
                          "calibrate")
    return found


def _shape(filters) -> str:
    heads, sizes = (f"{min(n)} to {max(n)}" if len(set(n)) > 1 else str(n[0])
                    for n in (filters.head_count_kv, filters.head_size))
    return f"{len(filters.layers)} layers from {filters.layers[0]} to {filters.layers[-1]}, {heads} KV heads of {sizes}"


def _compared(a, b) -> dict[str, Any]:
    import numpy as np

    layers, cosines, ratios = [], [], []
    for il, u, v in zip(a.layers, a.vectors, b.vectors):
        u, v = u.astype(np.float64), v.astype(np.float64)
        norm_a, norm_b = (np.sqrt((x**2).sum(axis=1)) for x in (u, v))
        cosine, ratio = (u * v).sum(axis=1) / (norm_a * norm_b), norm_b / norm_a
        layers.append({"layer": il, "least": float(cosine.min()), "median": float(np.median(cosine)),
                       "norm_ratio": float(np.median(ratio)), "cosine": cosine.tolist()})
        cosines.append(cosine)
        ratios.append(ratio)
    cosines, ratios = np.concatenate(cosines), np.concatenate(ratios)
    return {
        "identical": a.flat().tobytes() == b.flat().tobytes(),
        "least": float(cosines.min()),
        "median": float(np.median(cosines)),
        "norm_ratio": {"least": float(ratios.min()), "median": float(np.median(ratios)), "most": float(ratios.max())},
        "layers": layers,
    }


def _differences(a, b) -> dict[str, list[Any]]:
    """What else differs: name -> [A's value, B's value]; of the reports the names only."""
    found = {name: [getattr(a, name), getattr(b, name)]
             for name in ("method", "text_sha256", "n_tokens", "n_queries", "runtime")
             if getattr(a, name) != getattr(b, name)}
    if a.report.keys() != b.report.keys() or any((a.report[name] != b.report[name]).any() for name in a.report):
        found["report"] = [sorted(a.report), sorted(b.report)]
    return found


def _print(facts: dict[str, Any]) -> None:
    ratio = facts["norm_ratio"]
    click.echo(f"{'layer':>8}{'least':>10}{'median':>10}{'norm B/A':>10}")
    for row in facts["layers"]:
        click.echo(f"{row['layer']:>8}{row['least']:>10.4f}{row['median']:>10.4f}{row['norm_ratio']:>10.4f}")
    click.echo(f"{'all':>8}{facts['least']:>10.4f}{facts['median']:>10.4f}{ratio['median']:>10.4f}")
    click.echo()
    click.echo("cosines of the KV heads of a layer, and the median ratio of their norms" +
               ("; the vectors are identical" if facts["identical"] else ""))
    for name, values in facts["metadata"].items():
        for which, value in zip("AB", values):
            text = ", ".join(value) if isinstance(value, list) else value
            click.echo(f"{name + ' of ' + which:<20}{text if text != '' else '-'}")
