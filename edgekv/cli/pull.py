"""``edgekv pull``"""

from __future__ import annotations

import click

from edgekv.cli.common import model_option


@click.command()
@model_option(resolve=False)
def pull(model: str) -> None:
    """Fetch MODEL and print its path.

    MODEL is a known name (smollm2-135m: SmolLM2-135M-Instruct, 94 MiB, Apache-2.0) or hf:ORG/REPO/FILE.gguf. Known
    models are kept in the user's cache folder, or in the folder that EDGEKV_CACHE names.
    """
    from edgekv.pull import pull as fetch

    click.echo(f"pulling {model}", err=True)
    click.echo(fetch(model))
