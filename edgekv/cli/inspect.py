"""``edgekv inspect``"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgekv.cli.common import format_bytes, model_option
from edgekv.cli.talk import read_text
from edgekv.errors import EdgekvError
from edgekv.settings import PAGE_SIZES, SelectionSettings

# cache type -> (elements, bytes) of a block
CACHE_TYPES = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}

UBATCH = 512  # llama.cpp's default


@click.command()
@model_option
@click.option("--kv-budget", "budget", default="x8", show_default=True, metavar="N|xN|SIZE",
              help="Budget to compare with: tokens, a fraction of the context, or bytes (of an f16 cache).")
@click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=1), help="Context [default: the trained one].")
@click.option("--attention", is_flag=True,
              help="Instead: the share of the attention that the pages hold which --kv-select quest reads.")
@click.option("--quality", is_flag=True,
              help="Instead: how well the Q-Filters' scores, and K-norm's, rank keys by the attention that they get.")
@click.option("-f", "--file", metavar="FILE", type=click.Path(),
              help="The text for either, - is standard input [default: for --quality a built-in one, else none].")
@click.option("--kv-select-budget", metavar="N|auto",
              help="With --attention: tokens read per step [default: auto, as in edgekv run].")
@click.option("--kv-page-size", type=click.Choice([str(n) for n in PAGE_SIZES]),
              help="With --attention: tokens per page [default: 16].")
@click.option("--kv-dense-layers", type=click.IntRange(min=0), metavar="N",
              help="With --attention: first layers that read the whole cache and are not judged [default: 0].")
@click.option("--length", type=click.IntRange(min=2), metavar="N",
              help="With either: tokens of the text [default: all, at most 4096 and the trained context].")
@click.option("--steps", type=click.IntRange(min=1), metavar="N",
              help="With either: the last tokens, whose choices or attention are judged by [default: 64].")
@click.option("--plot", metavar="FILE", type=click.Path(),
              help="Write a heat map, layer by KV head (.png or .svg): of --quality, else of the calibration's report.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Format on standard output.")
def inspect(model: str, budget: str, n_ctx: int | None, output: str, attention: bool, quality: bool, plot: str | None,
            **options: Any) -> None:
    """Show MODEL's Q-Filters and what its KV cache costs."""
    _check_flags(attention, quality, plot, options)
    if plot is not None:
        from edgekv.plot import check

        check(plot)
    if attention:
        _print_attention(model, output, **options)
    elif quality:
        _print_quality(model, output, plot, options["file"], options["length"], options["steps"])
    else:
        facts = describe(model, n_ctx, budget)
        if plot is not None:
            _plot_report(model, plot)
        if output == "json":
            click.echo(json.dumps(facts, indent=2))
        else:
            _print(facts)


def _check_flags(attention: bool, quality: bool, plot: str | None, options: dict[str, Any]) -> None:
    if attention and quality:
        raise click.UsageError("--attention and --quality exclude each other: drop one of them")
    if attention or quality:
        mode = "--attention" if attention else "--quality"
        for name, flag in (("budget", "--kv-budget"), ("n_ctx", "--ctx-size")):
            if click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{flag} is not for {mode}: drop one of them")
    if attention and options["file"] is None:
        raise click.UsageError("--attention needs a text: -f FILE")
    if attention and plot is not None:
        raise click.UsageError("--plot is not for --attention: drop one of them")
    for name, value in options.items():
        both = name in ("file", "length", "steps")
        if value is not None and not (attention or quality and both):
            flag = "-f" if name == "file" else f"--{name.replace('_', '-')}"
            modes = "--attention or --quality: add one of them" if both else "--attention: add it"
            raise click.UsageError(f"{flag} is for {modes} or drop {flag}")


def describe(model: str, n_ctx: int | None, budget: str) -> dict[str, Any]:
    """The facts as plain values; memory in bytes. EdgekvError for a damaged model or damaged filters."""
    from edgekv.filters import read
    from edgekv.gguf_file import GGUF
    from edgekv.quality import stored
    from edgekv.settings import parse_budget

    gguf = GGUF(model)
    filters = read(gguf)
    if filters is not None:
        filters.validate(gguf)
    n_ctx = n_ctx or gguf.context_length
    per_token = {name: gguf.kv_bytes_per_token(b, b) for name, b in CACHE_TYPES.items()}
    if not per_token["f16"] or not n_ctx:
        raise EdgekvError(f"{gguf.path}: this model has no KV cache or no context length in its metadata")
    tokens = parse_budget(budget, n_ctx=n_ctx, bytes_per_token=per_token["f16"])
    # as the runtime allocates them: padded to 256, room for one ubatch behind the budget
    full, bounded = _pad(n_ctx), _pad(min(n_ctx, tokens + UBATCH))

    return {
        "model": str(gguf.path),
        "name": gguf.name,
        "architecture": gguf.architecture,
        "file_bytes": gguf.size,
        "n_layer": gguf.n_layer,
        "head_count": _one(gguf.head_count),
        "head_count_kv": _one(gguf.head_count_kv),
        "key_length": gguf.key_length,
        "value_length": gguf.value_length,
        "context_length": gguf.context_length,
        "sliding_window": gguf.get(f"{gguf.architecture}.attention.sliding_window"),
        "qfilters": None if filters is None else {
            "method": filters.method,
            "layers": filters.layers,
            "head_count_kv": _one(filters.head_count_kv),
            "head_size": _one(filters.head_size),
            "n_tokens": filters.n_tokens,
            "n_queries": filters.n_queries,
            "runtime": filters.runtime,
            "text_sha256": filters.text_sha256,
            "model_sha256": filters.model_sha256,
            "report": _figures(found) if (found := stored(filters)) else None,
        },
        "kv_bytes_per_token": per_token,
        "memory": {
            "n_ctx": n_ctx,
            "cells": full,
            "kv_budget": tokens,
            "budget_cells": bounded,
            "kv_bytes": {name: n and n * full for name, n in per_token.items()},
            "budget_kv_bytes": {name: n and n * bounded for name, n in per_token.items()},
        },
    }


def _pad(cells: int) -> int:
    return -(-cells // 256) * 256


def _one(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _print(facts: dict[str, Any]) -> None:
    def row(label: str, text: object) -> None:
        click.echo(f"{label:<16}{text}")

    row("model", facts["model"])
    row("name", facts["name"] or "-")
    row("architecture", f"{facts['architecture']}, {facts['n_layer']} layers, {facts['head_count']} heads, "
                        f"{facts['head_count_kv']} KV heads of {facts['key_length']} (K) and "
                        f"{facts['value_length']} (V) channels")
    row("file", format_bytes(facts["file_bytes"]))
    row("trained context", f"{facts['context_length']} tokens")
    q = facts["qfilters"]
    if q is None:
        row("Q-Filters", f"none; edgekv convert {facts['model']} --with-qfilters adds them")
    else:
        row("Q-Filters", f"{len(q['layers'])} layers, {q['head_count_kv']} KV heads of {q['head_size']} channels")
        row("  made by", q["method"] or "-")
        if q["n_tokens"] or q["n_queries"]:
            row("  from", f"{q['n_tokens']} tokens, {q['n_queries']} queries per head")
        if q["runtime"]:
            row("  with", q["runtime"])
        for digest in q["text_sha256"]:
            row("  text sha256", digest)
        _print_report(q["report"], row)
    m = facts["memory"]
    click.echo()
    click.echo(f"{'KV cache':<16}{'per token':>12}{'full, ' + str(m['n_ctx']):>18}{'budget ' + str(m['kv_budget']):>18}")
    for name, per_token in facts["kv_bytes_per_token"].items():
        if per_token is None:
            row(name, "not possible with this head size")
        else:
            click.echo(f"{name:<16}{format_bytes(per_token):>12}{format_bytes(m['kv_bytes'][name]):>18}"
                       f"{format_bytes(m['budget_kv_bytes'][name]):>18}")
    if isinstance(facts["sliding_window"], int) and facts["sliding_window"]:
        click.echo("layers with a sliding window are counted like the others; they cost less")


def _print_attention(model: str, output: str, *, file: str, kv_select_budget: str | None, kv_page_size: str | None,
                     kv_dense_layers: int | None, length: int | None, steps: int | None) -> None:
    selection = SelectionSettings.resolve("quest", kv_select_budget, kv_page_size and int(kv_page_size),
                                          kv_dense_layers or 0)
    text = read_text("-f", file)
    if not text.strip():
        raise EdgekvError(f"-f {file}: the text is empty")

    from edgekv.attention import N_STEPS, measure

    found = measure(model, text, selection, length=length, n_steps=steps or N_STEPS, progress=True,
                    source=f"-f {file}")
    if output == "json":
        click.echo(json.dumps(_attention_facts(model, file, found), indent=2))
    else:
        _print_shares(found)


def _attention_facts(model: str, file: str, found) -> dict[str, Any]:
    names = ("held", "best", "window")
    columns = [getattr(found, name) for name in names]
    return {
        "model": model,
        "text": file,
        **{name: getattr(found, name) for name in ("n_tokens", "n_steps", "n_selecting", "budget", "page_size",
                                                   "pages_read", "pages_total")},
        "mean": {name: _mean(column) for name, column in zip(names, columns)},
        # a list per layer, one number per KV head; NaN stands for heads that this layer does not have
        "layers": [{"layer": il, **{name: [float(x) for x in column[i] if x == x]
                                    for name, column in zip(names, columns)}} for i, il in enumerate(found.layers)],
    }


def _mean(values) -> float:
    values = values[values == values]
    return float(values.mean())


def _print_shares(found) -> None:
    percent = 100 * found.pages_read / found.pages_total
    click.echo(f"{found.n_tokens:,} tokens, the last {found.n_steps:,} read as decode steps; budget {found.budget:,} "
               f"tokens, {percent:.1f} % of the pages of {found.page_size} were read")
    if found.n_selecting < found.n_steps:
        click.echo(f"in {found.n_steps - found.n_selecting:,} of {found.n_steps:,} steps the budget covered the cache: "
                   "all was read, and everything is held")
    click.echo("share of the attention that the pages read hold / that the best choice of as many would hold; "
               "window: the\nfirst page and the newest ones, as many")
    click.echo()

    _table(found.layers, found.held, found.best, "window", found.window, _mean)


def _table(layers: list[int], left, right, last: str, values, summary: Callable[[Any], float], marks=None) -> None:
    """``left/right`` per layer: of every KV head, or where there are many of that with the least ``left``, then the
    mean; in the last column the summary of ``values``. A line for all layers ends it."""
    n_heads = left.shape[1]
    many = n_heads > 8

    def pair(left, right, mark: bool = False) -> str:
        return f"{_mean(left):.3f}/{_mean(right):.3f}{'*' if mark else ''}" if (left == left).any() else "-"

    def row(label: object, left, right, values, marks=None) -> None:
        if many:
            least = left == _least(left)
            columns = [pair(left[least][:1], right[least][:1], marks is not None and marks[least][0])]
        else:
            columns = [pair(left[:, h], right[:, h], marks is not None and marks[:, h].any()) for h in range(n_heads)]
        line(label, *columns, pair(left, right), f"{summary(values):.3f}")

    def line(label: object, *columns: str) -> None:
        click.echo(f"{label:<6}" + "".join(f"{column:>15}" for column in columns))

    line("layer", *(["least KV head"] if many else [f"KV head {h}" for h in range(n_heads)]), "mean", last)
    for i, il in enumerate(layers):
        part = slice(i, i + 1)
        row(il, left[part], right[part], values[part], None if marks is None else marks[part])
    row("all", left, right, values)


# --- --quality, and the report of the calibration --------------------------------------------------------------------


def _figures(found) -> dict[str, Any]:
    """What a FilterQuality holds, as plain values: means, marked heads as [layer, KV head], all numbers by layer."""
    columns = {name: column for name in ("energy", "one_sided", "positive", "spearman", "spearman_knorm")
               if (column := getattr(found, name)) is not None}
    return {
        "n_heads": int(next((column == column).sum() for column in columns.values())),
        "mean": {name: _mean(column) for name, column in columns.items()},
        "least": {name: _least(column) for name, column in columns.items()},
        "marked": [list(head) for head in found.marked_heads()],
        # a list per layer, one number per KV head; NaN stands for heads that this layer does not have
        "layers": [{"layer": il, **{name: [float(x) for x in column[i] if x == x] for name, column in columns.items()}}
                   for i, il in enumerate(found.layers)],
    }


def _least(values) -> float:
    return float(values[values == values].min())


def _marked(marked: list[list[int]], n_heads: int) -> str:
    names = ": " + ", ".join(f"{il}/{head}" for il, head in marked) + " (layer/KV head)" if marked else ""
    return f"{len(marked) or 'none'} of {n_heads} heads{names}"


def _print_report(report: dict[str, Any] | None, row: Callable[[str, object], None]) -> None:
    if report is None:
        row("  fit", "no report of a calibration; --quality measures it on a text")
        return
    mean, least = report["mean"], report["least"]
    if "energy" in mean:
        row("  energy", f"{mean['energy']:.3f} of the queries' second moment lies along the filters' directions, "
                         f"least {least['energy']:.3f}")
    if "one_sided" in mean:
        row("  one-sided", f"{mean['one_sided']:.3f}, least {least['one_sided']:.3f} (1: all queries on one side)")
    if "spearman" in mean:
        knorm = f"; K-norm {mean['spearman_knorm']:.3f}" if "spearman_knorm" in mean else ""
        row("  correlation", f"{mean['spearman']:.3f} with attention, least {least['spearman']:.3f}{knorm}")
    row("  do not fit", _marked(report["marked"], report["n_heads"]))


def _plot_report(model: str, plot: str) -> None:
    from edgekv.filters import read
    from edgekv.gguf_file import GGUF
    from edgekv.plot import heat_map
    from edgekv.quality import stored

    filters = read(GGUF(model))
    if filters is None:
        raise EdgekvError(f"{model}: has no Q-Filters to plot; edgekv convert {model} --with-qfilters adds them")
    found = stored(filters)
    if found is None or found.spearman is None or found.spearman_knorm is None:
        raise EdgekvError(f"{model}: its Q-Filters carry no correlations to plot; --quality measures them")
    heat_map(found, plot, f"{_title(model)}, report of the calibration")


def _title(model: str) -> str:
    from edgekv.gguf_file import GGUF

    gguf = GGUF(model)
    return gguf.name or gguf.path.name


def _print_quality(model: str, output: str, plot: str | None, file: str | None, length: int | None,
                   steps: int | None) -> None:
    from edgekv.quality import N_STEPS, measure

    if file is None:
        from edgekv.calibrate import default_text

        text, source = default_text(), "the built-in text"
    else:
        text, source = read_text("-f", file), f"-f {file}"
        if not text.strip():
            raise EdgekvError(f"-f {file}: the text is empty")
    found = measure(model, text, length=length, n_steps=steps or N_STEPS, progress=True, source=source)
    if plot is not None:
        from edgekv.plot import heat_map

        of = "the built-in text" if file is None else "standard input" if file == "-" else Path(file).name
        heat_map(found, plot, f"{_title(model)}, {found.n_tokens:,} tokens of {of}")
    if output == "json":
        facts = {"model": model, "text": file or "built-in", "n_tokens": found.n_tokens, "n_steps": found.n_steps}
        click.echo(json.dumps({**facts, **_figures(found)}, indent=2))
    else:
        _print_correlations(found, file)


def _print_correlations(found, file: str | None) -> None:
    from edgekv.quality import MIN_POSITIVE, N_SINKS

    click.echo(f"{found.n_tokens:,} tokens, the last {found.n_steps:,} read as decode steps; judged were the "
               f"{found.n_tokens - found.n_steps - N_SINKS:,} keys between the first {N_SINKS} and these")
    if file is None:
        click.echo("the text is the built-in one, of which calibration reads parts by default: -f FILE tells more")
    click.echo("rank correlation with the attention that the keys got: of the filter's score / of K-norm's; positive: "
               "the least\nshare of a head's queries that project positively on its filter")
    click.echo()
    _table(found.layers, found.spearman, found.spearman_knorm, "positive", found.positive, _least, found.marked)
    click.echo()
    n_heads = int((found.spearman == found.spearman).sum())
    click.echo(f"* the filter does not fit: {_marked([list(head) for head in found.marked_heads()], n_heads)}")
    click.echo(f"  (the rule: less than {100 * MIN_POSITIVE:.0f} % of the queries project positively, or no positive "
               "correlation)")
