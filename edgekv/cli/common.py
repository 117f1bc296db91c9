"""What the commands share."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, Callable

import click

from edgekv import atomic
from edgekv.errors import EdgekvError


def model_option(function: Callable[..., Any] | None = None, *, resolve: bool = True) -> Callable[..., Any]:
    """MODEL as an argument or as ``-m``: the command gets ``model``, the path of its file, fetched if need be.

    With ``resolve=False`` it gets the text as given. A command that has ``-ngl`` says first which GPU is not used, and
    why.
    """
    if function is None:
        return functools.partial(model_option, resolve=resolve)

    @click.argument("model_argument", metavar="MODEL", required=False)
    @click.option("-m", "--model", "model_flag", metavar="MODEL",
                  help="The model, if not given as an argument: a path, a known name or hf:ORG/REPO:QUANT.")
    @functools.wraps(function)
    def command(*args: Any, model_argument: str | None, model_flag: str | None, **kwargs: Any) -> Any:
        if model_argument is not None and model_flag is not None:
            raise click.UsageError("MODEL is given twice, as an argument and with -m")
        model = model_flag if model_argument is None else model_argument
        if not model:
            raise click.UsageError("no MODEL; give a path, a known name or hf:ORG/REPO:QUANT")
        if "n_gpu_layers" in kwargs:
            _say_unused_devices(kwargs["n_gpu_layers"], elsewhere=bool(kwargs.get("rpc")))
        if resolve:
            from edgekv.pull import resolve_model

            kwargs["model"] = str(resolve_model(model))
        else:
            kwargs["model"] = model
        return function(*args, **kwargs)

    return command


def _say_unused_devices(n_gpu_layers: int | list[int] | None, *, elsewhere: bool) -> None:
    """EdgekvError if the runtime cannot work at all."""
    from edgekv import _runtime

    _runtime.check()
    wanted = next(filter(None, n_gpu_layers), 0) if isinstance(n_gpu_layers, list) else n_gpu_layers
    for line in _runtime.notices(wanted or 0, elsewhere=elsewhere):
        click.echo(f"edgekv: {line}", err=True)


def checked_output(output: str | None, model: Path, suffix: str, *, stays_split: bool = False) -> Path:
    """The file to write: ``-o``, else the model's name with ``suffix`` before ``.gguf``; that of a split model's first
    part as well if the new one ``stays_split``.

    Checked before minutes of work, not after: EdgekvError if it cannot be written there.
    """
    from edgekv.gguf_file import part_path, split_name

    stem = model.name[:-5] if model.name.lower().endswith(".gguf") else model.name
    stem, _, count = split_name(model) or (stem, 1, 1)
    if output:
        path = Path(output)
    elif stays_split and count > 1:
        path = part_path(model, f"{stem}{suffix}", 1, count)
    else:
        path = model.with_name(f"{stem}{suffix}.gguf")
    atomic.check(path, "-o")
    return path


class Words(click.ParamType):
    """Words with commas between them, any or those of ``choices``."""

    name = "list"

    def __init__(self, choices: Collection[str] = ()):
        self.choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        return [self.item(word.strip(), param, ctx) for word in value.split(",")]

    def item(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not word:
            self.fail("an item of the list is empty", param, ctx)
        if self.choices and word not in self.choices:
            self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        return word


class Numbers(Words):
    """Whole numbers of at least ``least`` with commas between them."""

    def __init__(self, least: int):
        super().__init__()
        self.least = least

    def item(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(word)
        except ValueError:
            self.fail(f"{word!r} is not a whole number", param, ctx)
        if not self.least <= number < 2**31:
            self.fail(f"{number} is not in the range from {self.least} to 2147483647", param, ctx)
        return number


class Shares(Words):
    """Numbers between 0 and 1 with commas between them."""

    def item(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(word)
        except ValueError:
            self.fail(f"{word!r} is not a number", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{word} is not between 0 and 1", param, ctx)
        return share


def format_bytes(n: float) -> str:
    """A size for people: ``180.0 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"
