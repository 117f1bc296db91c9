"""``edgekv convert``"""

from __future__ import annotations

from pathlib import Path

import click

from edgekv.cli.common import checked_output, format_bytes, model_option
from edgekv.errors import EdgekvError


@click.command()
@model_option
@click.option("--with-qfilters", is_flag=True, help="Add Q-Filters (calibrates unless --qfilters is given).")
@click.option("--qfilters", "source", metavar="SOURCE", type=click.Path(),
              help="Take the filters from SOURCE: published filters (.safetensors), or a GGUF of the same model.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(),
              help="The new file [default: MODEL with -qfilters before .gguf].")
@click.option("--text", "texts", metavar="FILE", type=click.Path(), multiple=True,
              help="Text to calibrate on instead of the built-in one; may be given again.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads for the calibration [default: all cores].")
def convert(model: str, with_qfilters: bool, source: str | None, output: str | None, texts: tuple[str, ...],
            threads: int | None) -> None:
    """Write MODEL with Q-Filters in its metadata.

    The tensors stay byte for byte, and the file still runs everywhere; its path is printed last.
    """
    from edgekv.convert import convert as write
    from edgekv.gguf_file import GGUF
    from edgekv.progress import bar

    if not with_qfilters:
        raise click.UsageError("nothing to do; add --with-qfilters")
    if source is not None and texts:
        raise click.UsageError("--text and --qfilters exclude each other: one calibrates, the other does not")
    for text in texts:
        if not Path(text).is_file():
            raise EdgekvError(f"--text {text}: no such file")

    gguf = GGUF(model)
    path = checked_output(output, Path(model), "-qfilters")

    filters = filters_from(source, gguf) if source is not None else _calibrate(model, texts, threads)
    with bar(f"writing {format_bytes(gguf.size)}", gguf.size, "B") as advance:
        written = 0

        def progress(done: int, _total: int) -> None:
            nonlocal written
            advance(done - written)
            written = done

        write(model, path, filters, progress)
    click.echo(path)


def filters_from(source: str, gguf):
    """Filters of a safetensors file in the published form or of another GGUF; checked against the model."""
    from edgekv.filters import from_safetensors, read
    from edgekv.gguf_file import GGUF, MAGIC

    try:
        with open(source, "rb") as f:
            is_gguf = f.read(4) == MAGIC
    except OSError as e:
        raise EdgekvError(f"--qfilters {source}: {e.strerror or e}") from None
    if not is_gguf:
        return from_safetensors(source, gguf)
    filters = read(GGUF(source))
    if filters is None:
        raise EdgekvError(f"--qfilters {source}: this GGUF holds no Q-Filters")
    filters.validate(gguf, source=source)
    return filters


def _calibrate(model: str, texts: tuple[str, ...], threads: int | None):
    from edgekv.calibrate import calibrate

    return calibrate(model, text_files=texts, n_threads=threads, progress=True)
