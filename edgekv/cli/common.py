"""What the commands share."""

from __future__ import annotations

import functools
from typing import Any, Callable

import click


def model_option(function: Callable[..., Any] | None = None, *, resolve: bool = True) -> Callable[..., Any]:
    """MODEL as an argument or as ``-m``: the command gets ``model``, the path of its file, fetched if need be.

    With ``resolve=False`` it gets the text as given.
    """
    if function is None:
        return functools.partial(model_option, resolve=resolve)

    @click.argument("model_argument", metavar="MODEL", required=False)
    @click.option("-m", "--model", "model_flag", metavar="MODEL",
                  help="The model, if not given as an argument: a path, a known name or hf:ORG/REPO/FILE.gguf.")
    @functools.wraps(function)
    def command(*args: Any, model_argument: str | None, model_flag: str | None, **kwargs: Any) -> Any:
        if model_argument is not None and model_flag is not None:
            raise click.UsageError("MODEL is given twice, as an argument and with -m")
        model = model_flag if model_argument is None else model_argument
        if not model:
            raise click.UsageError("no MODEL; give a path, a known name or hf:ORG/REPO/FILE.gguf")
        if resolve:
            from edgekv.pull import resolve_model

            kwargs["model"] = str(resolve_model(model))
        else:
            kwargs["model"] = model
        return function(*args, **kwargs)

    return command


def format_bytes(n: float) -> str:
    """A size for people: ``180.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
