"""``edgekv run``"""

from __future__ import annotations

import sys
from typing import Any

import click

from edgekv.cli.common import model_option
from edgekv.cli.options import context_options, open_llama, rope_options, sampling_options, take_grammar, take_sampling
from edgekv.cli.talk import check_grammar, figures, read_text, say, warn_unpinned
from edgekv.errors import EdgekvError


@click.command()
@model_option
@click.option("-p", "--prompt", help="The prompt, - for standard input.")
@click.option("-f", "--file", "file", metavar="FILE", type=click.Path(),
              help="A text to read before the prompt, - for standard input.")
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt; never evicted.")
@click.option("-no-cnv", "--no-conversation", "raw", is_flag=True,
              help="Continue the prompt as it is, without the model's chat template.")
@context_options
@rope_options
@sampling_options
@click.option("--no-stats", is_flag=True, help="Leave out the figures behind the answer.")
def run(model: str, prompt: str | None, file: str | None, system: str | None, raw: bool, no_stats: bool,
        **options: Any) -> None:
    """Answer one prompt, with a text before it if -f names one, and stop.

    The answer goes to standard output, figures about time and cache to standard error.
    """
    sampling = take_sampling(options)
    sampling["grammar"] = take_grammar(options)
    text = _prompt(prompt, file)
    if raw and system is not None:
        raise click.UsageError("-sys needs the chat template: drop -no-cnv")

    from edgekv.conversation import has_template, pin_system_prompt
    from edgekv.progress import PromptBar

    llama = open_llama(model, goes_back=False, **options)
    llama.on_progress = PromptBar()
    with_template = not raw and has_template(llama)
    if system is not None and not with_template:
        raise EdgekvError(f"{model}: has no chat template, so -sys cannot be used")

    check_grammar(llama, sampling["grammar"])

    if with_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        if options["keep"] is None:
            warn_unpinned(pin_system_prompt(llama, messages))
        messages.append({"role": "user", "content": text})
        answer, arguments = llama.create_chat_completion, {"messages": messages}
    else:
        answer, arguments = llama.create_completion, {"prompt": text}

    try:
        for piece in answer(**arguments, stream=True, **sampling):
            choice = piece["choices"][0]
            word = choice["delta"].get("content") if with_template else choice["text"]
            if word:
                click.echo(word, nl=False)
                sys.stdout.flush()
    except ValueError as error:
        raise EdgekvError(f"-c {options['n_ctx'] or llama.n_ctx()}: {error}; raise the context or shorten the text") from None
    except RuntimeError as error:
        raise EdgekvError(f"{model}: {error}") from None
    finally:
        llama.on_progress.close()
    click.echo()
    if not no_stats:
        say(figures(llama))


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is None and file is None:
        raise click.UsageError("no prompt; give -p TEXT, -f FILE or both")
    if prompt == "-" and file == "-":
        raise click.UsageError("-p - and -f - both read standard input")
    parts = [read_text("-f", file)] if file is not None else []
    if prompt is not None:
        parts.append(read_text("-p", "-") if prompt == "-" else prompt)
    text = "\n\n".join(part.strip("\n") for part in parts)
    if not text.strip():
        raise EdgekvError("the prompt is empty: give -p TEXT, -f FILE or both")
    return text
