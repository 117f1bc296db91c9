"""``edgekv convert``"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import click

from edgekv.cli.common import checked_output, format_bytes, model_option
from edgekv.cli.talk import say
from edgekv.errors import EdgekvError
from edgekv.hf import OUTTYPES
from edgekv.quantize import TYPES


@click.command()
@model_option(resolve=False)
@click.option("--outtype", metavar="TYPE",
              type=click.Choice([*dict.fromkeys((*OUTTYPES, *TYPES))], case_sensitive=False),
              help="The weights' type: auto, f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, ... "
                   "[default: of a GGUF its own; of a checkpoint auto, its nearest 16-bit type].")
@click.option("--with-qfilters", is_flag=True, help="Add Q-Filters (calibrates unless --qfilters is given).")
@click.option("--qfilters", "source", metavar="SOURCE",
              help="Take the filters from SOURCE: published ones (a .safetensors file, its folder, or ORG/NAME on the "
                   "hub), or a GGUF of the same model.")
@click.option("--force", is_flag=True, help="Replace the filters that MODEL has already.")
@click.option("--calibrate-with", type=click.Choice(["gguf", "torch"]), default="gguf", show_default=True,
              help="Calibrate on the new file, or on the checkpoint with torch.")
@click.option("--device", metavar="NAME", help="For --calibrate-with torch: cpu, cuda, mps [default: the fastest].")
@click.option("--text", "texts", metavar="FILE", type=click.Path(), multiple=True,
              help="Text to calibrate on instead of the built-in one; may be given again.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(),
              help="The new file [default: MODEL's name with -TYPE and -qfilters; of a checkpoint in the working folder].")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads [default: all cores].")
def convert(model: str, outtype: str | None, with_qfilters: bool, source: str | None, force: bool, calibrate_with: str,
            device: str | None, texts: tuple[str, ...], output: str | None, threads: int | None) -> None:
    """Write MODEL as a GGUF file with Q-Filters in its metadata.

    MODEL is a GGUF file, or a Hugging Face checkpoint: a folder, or ORG/NAME on the hub. Without --outtype the tensors
    of a GGUF stay byte for byte. The new file runs everywhere; its path is printed last.
    """
    if source is not None and (texts or calibrate_with == "torch"):
        raise click.UsageError("--qfilters takes filters that are made: drop --text and --calibrate-with")
    if not with_qfilters and (source is not None or texts or force or calibrate_with == "torch"):
        raise click.UsageError("--qfilters, --text, --force and --calibrate-with are for --with-qfilters: add it")
    if device is not None and calibrate_with != "torch":
        raise click.UsageError("--device is for --calibrate-with torch")
    for text in texts:
        if not Path(text).is_file():
            raise EdgekvError(f"--text {text}: no such file")

    suffix = (f"-{outtype}" if outtype not in (None, "auto") else "") + ("-qfilters" if with_qfilters else "")
    checkpoint = _checkpoint(model)
    if checkpoint is not None:
        from edgekv.hf import check

        check(checkpoint)
        name = _name(model)
        path = checked_output(output, Path.cwd() / name, suffix)
    else:
        if calibrate_with == "torch":
            raise EdgekvError("--calibrate-with torch: needs a checkpoint of transformers; MODEL is a GGUF file")
        if outtype is None and not with_qfilters:
            raise click.UsageError("nothing to do; add --with-qfilters, --outtype or both")
        if outtype == "auto":
            raise click.UsageError("--outtype auto is for checkpoints; drop it, or name the type")
        gguf = _gguf(model, with_qfilters, force)
        model = str(gguf.path)
        path = checked_output(output, Path(model), suffix, stays_split=outtype is None)
        if outtype is None:
            from edgekv.convert import output_paths

            output_paths(gguf, path)  # -o of a split model must name a first part

    with _scratch(path) if checkpoint is not None or outtype is not None else nullcontext() as folder:
        current = Path(model)
        if checkpoint is not None:
            from edgekv.hf import to_gguf

            current = folder / "converted.gguf"
            to_gguf(checkpoint, current, outtype if outtype in OUTTYPES else "auto", name=name, progress=True)
        if outtype in TYPES and not (checkpoint is not None and outtype in OUTTYPES):
            from edgekv.quantize import quantize

            smaller = folder / "quantised.gguf"
            quantize(current, smaller, outtype, n_threads=threads, progress=True, say=say)
            if checkpoint is not None:
                current.unlink()  # the disk may not hold both and the result
            current = smaller
        if with_qfilters:
            with _called(current, model):
                filters = _filters(current, source, texts, threads, checkpoint if calibrate_with == "torch" else None,
                                   device)
                _write(current, path, filters)
        else:
            os.replace(current, path)
    click.echo(path)


def _checkpoint(model: str) -> Path | None:
    """The folder of a checkpoint, fetched if MODEL names one on the hub; None if MODEL names a GGUF file."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_file():
        return None
    from edgekv import hub

    return hub.checkpoint(hub.repo_id(model)) if hub.is_repo_id(model) else None


def _name(model: str) -> str:
    """What to call a checkpoint: its folder's name, or NAME of ORG/NAME."""
    return Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1].split("@")[0]


def _gguf(model: str, with_qfilters: bool, force: bool):
    """A model's file, fetched if need be, which may be annotated."""
    from edgekv.filters import PREFIX
    from edgekv.gguf_file import GGUF
    from edgekv.pull import resolve_model

    gguf = GGUF(resolve_model(model))
    if with_qfilters and not force and any(key.startswith(PREFIX) for key in gguf.fields):
        raise EdgekvError(f"{gguf.path}: has Q-Filters already; --force replaces them")
    return gguf


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside the new file for what is made on the way; gone at the end, whatever happens."""
    folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _called(current: Path, model: str) -> Iterator[None]:
    """Errors about a file made on the way name the model that it was made from."""
    try:
        yield
    except EdgekvError as error:
        raise EdgekvError(str(error).replace(str(current), model)) from None


def _filters(gguf_path: Path, source: str | None, texts: tuple[str, ...], threads: int | None, checkpoint: Path | None,
             device: str | None):
    """Filters for a GGUF file: taken from ``source``, else calibrated, on ``checkpoint`` if there is one."""
    from edgekv.gguf_file import GGUF

    gguf = GGUF(gguf_path)
    if source is not None:
        from edgekv.published import load

        return load(source, gguf)
    if checkpoint is not None:
        from edgekv.calibrate_torch import calibrate

        return calibrate(checkpoint, gguf, text_files=texts, device=device, n_threads=threads, progress=True)
    from edgekv.calibrate import calibrate

    return calibrate(gguf_path, text_files=texts, n_threads=threads, progress=True)


def _write(src: Path, path: Path, filters) -> None:
    from edgekv.convert import convert as write
    from edgekv.gguf_file import GGUF
    from edgekv.progress import bar

    size = GGUF(src).size
    with bar(f"writing {format_bytes(size)}", size, "B") as advance:
        written = 0

        def progress(done: int, _total: int) -> None:
            nonlocal written
            advance(done - written)
            written = done

        write(src, path, filters, progress)
