"""``edgekv pull``"""

from __future__ import annotations

import click

from edgekv.cli.common import model_option
from edgekv.cli.talk import say


@click.command()
@model_option(resolve=False)
def pull(model: str) -> None:
    """Fetch MODEL and print its path.

    MODEL is a known name (smollm2-135m: 94 MiB; gemma3-270m: 241 MiB, a base model), or a GGUF file on the Hugging Face
    hub: hf:ORG/REPO:QUANT (hf:ORG/REPO:Q4_K_M) or hf:ORG/REPO/FILE.gguf. Known models are kept in the user's cache
    folder, or in the folder that EDGEKV_CACHE names, others in the hub's own cache.
    """
    from edgekv.media import is_projector
    from edgekv.pull import KNOWN
    from edgekv.pull import pull as fetch

    licence = f" (licence: {KNOWN[model].licence})" if model in KNOWN else ""
    click.echo(f"pulling {model}{licence}", err=True)
    path = fetch(model)
    if is_projector(path):
        say(f"{path}: is the projector of a multimodal model (mmproj), not a language model: fetch the model's own file "
            "too, and give this one to edgekv serve with --mmproj")
    click.echo(path)
