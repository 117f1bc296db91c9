"""``edgekv run``"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import format_bytes, model_option
from edgekv.cli.options import context_options, open_llama, sampling_options, take_sampling
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
@sampling_options
@click.option("--no-stats", is_flag=True, help="Leave out the figures behind the answer.")
def run(model: str, prompt: str | None, file: str | None, system: str | None, raw: bool, no_stats: bool,
        **options: Any) -> None:
    """Answer one prompt, with a text before it if -f names one, and stop.

    The answer goes to standard output, figures about time and cache to standard error.
    """
    sampling = take_sampling(options)
    text = _prompt(prompt, file)
    if raw and system is not None:
        raise click.UsageError("-sys needs the chat template: drop -no-cnv")

    llama = open_llama(model, **options, say=lambda line: click.echo(f"edgekv: {line}", err=True))
    with_template = not raw and llama.chat_format is not None and "tokenizer.chat_template" in llama.metadata
    if system is not None and not with_template:
        raise EdgekvError(f"{model}: has no chat template, so -sys cannot be used")

    if with_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        if options["keep"] is None and llama.eviction.policy != "none":
            _pin_system_prompt(llama, messages)
        messages.append({"role": "user", "content": text})
        n_prompt = len(llama.chat_tokens(messages))
        answer, arguments = llama.create_chat_completion, {"messages": messages}
    else:
        n_prompt = len(llama.tokenize(text.encode(), special=True))
        answer, arguments = llama.create_completion, {"prompt": text}

    began, first = time.perf_counter(), None
    try:
        pieces = answer(**arguments, stream=True, **sampling)
        for piece in pieces:
            choice = piece["choices"][0]
            word = choice["delta"].get("content") if with_template else choice["text"]
            if word:
                first = first or time.perf_counter()
                click.echo(word, nl=False)
                sys.stdout.flush()
    except ValueError as error:
        raise EdgekvError(f"-c {options['n_ctx'] or llama.n_ctx()}: {error}; raise the context or shorten the text") from None
    except RuntimeError as error:
        raise EdgekvError(f"{model}: {error}") from None
    click.echo()
    if not no_stats:
        click.echo(_figures(llama, n_prompt, began, first, time.perf_counter()), err=True)


def _prompt(prompt: str | None, file: str | None) -> str:
    if prompt is None and file is None:
        raise click.UsageError("no prompt; give -p TEXT, -f FILE or both")
    if prompt == "-" and file == "-":
        raise click.UsageError("-p - and -f - both read standard input")
    parts = [_read("-f", file)] if file is not None else []
    if prompt is not None:
        parts.append(_read("-p", "-") if prompt == "-" else prompt)
    text = "\n\n".join(part.strip("\n") for part in parts)
    if not text.strip():
        raise EdgekvError("the prompt is empty: give -p TEXT, -f FILE or both")
    return text


def _read(flag: str, path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise EdgekvError(f"{flag} {path}: is not UTF-8 text") from None
    except OSError as error:
        raise EdgekvError(f"{flag} {path}: {error.strerror or error}") from None


def _pin_system_prompt(llama, messages: list[dict]) -> None:
    """Keep what comes before the user's words, as far as the budget allows."""
    n = llama.system_tokens(messages)
    room = llama.eviction.budget - llama.eviction.window
    if n > room:
        click.echo(f"edgekv: the system prompt has {n} tokens, {room} of them fit beside the window: raise --kv-budget", err=True)
    llama.set_keep(max(min(llama.eviction.keep, room), min(n, room)))


def _figures(llama, n_prompt: int, began: float, first: float | None, ended: float) -> str:
    stats = llama.stats()
    first = first or ended
    n_answer = max(0, llama.n_tokens - n_prompt)
    parts = [
        f"prompt {n_prompt:,} tokens in {first - began:.1f} s ({n_prompt / max(first - began, 1e-9):.0f} t/s)",
        f"answer {n_answer + 1:,} tokens ({n_answer / max(ended - first, 1e-9):.1f} t/s)",
        f"KV cache {format_bytes(stats.kv_bytes)}, {stats.cells_used:,} of {stats.cells_allocated:,} cells used",
    ]
    if llama.eviction.policy != "none":
        full = stats.kv_bytes / stats.cells_allocated * llama.n_ctx()
        parts.append(f"{stats.n_evictions} evictions in {stats.evict_us / 1e6:.2f} s (full cache: {format_bytes(full)})")
    return "edgekv: " + " · ".join(parts)
