"""``edgekv calibrate``"""

from __future__ import annotations

from pathlib import Path

import click

from edgekv.cli.common import checked_output, model_option
from edgekv.errors import EdgekvError


@click.command()
@model_option
@click.option("--text", "texts", metavar="FILE", type=click.Path(), multiple=True,
              help="Text to calibrate on instead of the built-in one; may be given again.")
@click.option("-o", "--output", metavar="OUT", type=click.Path(),
              help="The filters' file [default: MODEL with .qfilters before .gguf].")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads [default: all cores].")
def calibrate(model: str, texts: tuple[str, ...], output: str | None, threads: int | None) -> None:
    """Compute the Q-Filters of MODEL and write them to a file of their own.

    `edgekv convert MODEL --with-qfilters` does both: it calibrates and writes the filters into the model;
    with --qfilters FILE it takes those written here. The file's path is printed last.
    """
    from edgekv.calibrate import calibrate as compute
    from edgekv.convert import save_filters
    from edgekv.gguf_file import GGUF

    for text in texts:
        if not Path(text).is_file():
            raise EdgekvError(f"--text {text}: no such file")
    path = checked_output(output, Path(model), ".qfilters")

    filters = compute(model, text_files=texts, n_threads=threads, progress=True)
    save_filters(path, GGUF(model), filters)
    heads = sum(filters.head_count_kv)
    click.echo(f"{heads} filters from {filters.n_queries:,} queries per head, {filters.n_tokens:,} tokens", err=True)
    click.echo(path)
