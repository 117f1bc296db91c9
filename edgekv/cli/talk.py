"""What the commands that answer, ``run`` and ``chat``, say to people and read from them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgekv.cli.common import format_bytes
from edgekv.errors import EdgekvError


def say(line: str) -> None:
    """A line for people, on standard error."""
    click.echo(f"edgekv: {line}", err=True)


def read_text(flag: str, path: str) -> str:
    """A UTF-8 text, from standard input for ``-``. EdgekvError, naming the flag, if it cannot be read."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise EdgekvError(f"{flag} {path}: is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise EdgekvError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None


def check_grammar(llama, grammar) -> None:
    """EdgekvError, naming the flags, if there is a grammar that cannot be followed."""
    from edgekv.grammar import check

    if grammar is None:
        return
    try:
        check(llama, grammar)
    except EdgekvError as error:
        raise EdgekvError(f"--grammar, --json-schema: {error}") from None


def warn_unpinned(n: int) -> None:
    """Says how many tokens of the system prompt may be evicted."""
    if n:
        say(f"{n} tokens of the system prompt do not fit beside the window and may be evicted: raise --kv-budget")


def figures(llama) -> str:
    """One line about the last answer and the cache."""
    stats, times = llama.stats(), llama.timings
    parts = []
    if times:
        known = f" ({times['cache_n']:,} more were in the cache)" if times["cache_n"] else ""
        parts += [
            f"prompt {times['prompt_n']:,} tokens in {times['prompt_ms'] / 1e3:.1f} s "
            f"({times['prompt_per_second']:.0f} t/s){known}",
            f"answer {times['predicted_n']:,} tokens ({times['predicted_per_second']:.1f} t/s)",
        ]
    parts.append(f"KV cache {format_bytes(stats.kv_bytes)}, {stats.cells_used:,} of {stats.cells_allocated:,} cells used")
    if llama.eviction.policy != "none":
        parts.append(f"{stats.n_evictions} evictions in {stats.evict_us / 1e6:.2f} s")
        parts.append(f"{len(llama.checkpoints)} checkpoints ({format_bytes(llama.checkpoints.nbytes)})")
    if stats.n_selections:
        ms = (stats.scores_us + stats.choice_us + stats.attn_us + stats.dense_us) / 1e3 / stats.n_selections
        parts.append(f"{stats.n_selections:,} steps read {100 * stats.pages_read / stats.pages_total:.0f} % of the pages"
                     + (f", {ms:.2f} ms of each in attention" if ms else ""))  # GPUs take no times
    return " · ".join(parts)
