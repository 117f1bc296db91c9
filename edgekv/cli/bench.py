"""``edgekv bench``"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import click

from edgekv import atomic
from edgekv.cli.common import Numbers, Words, format_bytes, model_option
from edgekv.cli.options import look_at_servers, rope_options, rpc_option, take_rope
from edgekv.errors import EdgekvError
from edgekv.settings import POLICIES
from edgekv.table import markdown, to_csv, to_json


class Switches(Words):
    """``on`` and ``off``, or ``1`` and ``0``, with commas between them."""

    def item(self, word: str, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if word not in ("on", "off", "1", "0"):
            self.fail(f"{word!r} is neither on nor off", param, ctx)
        return word in ("on", "1")


@click.command()
@model_option
@click.option("--kv-evict", "kv_evict", type=Words(), default="none", show_default=True, metavar="LIST",
              help=f"Eviction policies: {', '.join(POLICIES)}.")
@click.option("--kv-budget", "kv_budget", type=Words(), metavar="LIST",
              help="Tokens kept by an eviction: 2048, x8 (depth / 8) or 1.5GiB.")
@click.option("--kv-window", type=click.IntRange(min=0), metavar="N",
              help="Last tokens, always kept [default: min(256, budget / 4)].")
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="First tokens, always kept [default: 4].")
@click.option("--kv-select", type=Words(), default="none", show_default=True, metavar="LIST",
              help="Selections: none, quest; only with -fa on.")
@click.option("--kv-select-budget", type=Words(), metavar="LIST",
              help="Tokens read per step by quest, or auto [default: auto].")
@click.option("--kv-page-size", type=Numbers(1), metavar="LIST", help="Tokens per page [default: 16].")
@click.option("--kv-dense-layers", type=click.IntRange(min=0), metavar="N",
              help="First layers that read the whole cache [default: 2].")
@click.option("--kv-grouped-attn", type=Switches(), default="off", show_default=True, metavar="LIST",
              help="Our attention kernel where nothing is selected: on, off; only with -fa on.")
@click.option("-d", "--n-depth", "depths", type=Numbers(0), default="0", show_default=True, metavar="LIST",
              help="Tokens in the context before the tests.")
@click.option("-n", "--n-gen", "n_gen", type=Numbers(0), default="128", show_default=True, metavar="LIST",
              help="Tokens to decode one by one; whole eviction cycles under eviction.")
@click.option("-p", "--n-prompt", "n_prompt", type=Numbers(0), default="512", show_default=True, metavar="LIST",
              help="Tokens of a prompt behind the context.")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True, metavar="N",
              help="Times that every setting is measured.")
@click.option("-fa", "--flash-attn", type=Switches(), default="on", show_default=True, metavar="LIST",
              help="Flash attention: on, off.")
@click.option("-ctk", "--cache-type-k", "types_k", type=Words(), default="f16", show_default=True, metavar="LIST",
              help="Types of K in the cache.")
@click.option("-ctv", "--cache-type-v", "types_v", type=Words(), default="f16", show_default=True, metavar="LIST",
              help="Types of V in the cache; quantised ones need -fa on.")
@click.option("-t", "--threads", "n_threads", type=Numbers(1), metavar="LIST", help="Threads [default: all cores].")
@click.option("-ub", "--ubatch-size", "n_ubatch", type=Numbers(1), default="512", show_default=True, metavar="LIST",
              help="Tokens computed at once; a bounded cache has room for so many behind the budget.")
@click.option("-ngl", "--n-gpu-layers", "n_gpu_layers", type=Numbers(0), metavar="LIST",
              help="Layers on GPUs and --rpc servers, the last ones [default: 0, with --rpc all].")
@rpc_option
@rope_options
@click.option("--fill", type=click.Choice(("read", "copies")), default="read", show_default=True,
              help="How a context gets as deep as -d: by reading so much, or, where nothing is evicted, by copies of the "
                   "cells of its first 1,024 tokens. Copies are there in seconds; speed and memory are the same.")
@click.option("--trace", "trace", metavar="FILE", type=click.Path(),
              help="Write the memory over time, a row per ubatch and 16 decoded tokens, as CSV.")
@click.option("--plot", "plot", metavar="FILE", type=click.Path(),
              help="Draw decode speed and memory against depth, with --trace also over time (.png or .svg).")
@click.option("--bandwidth", is_flag=True, help="Measure how fast the memory can be read, to compare with gb_s.")
@click.option("--progress/--no-progress", default=None,
              help="Say on standard error what runs [default: on a terminal].")
@click.option("-o", "--output", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md", show_default=True,
              help="Format on standard output.")
def bench(model: str, n_gen: list[int], n_prompt: list[int], repetitions: int, bandwidth: bool,
          progress: bool | None, output: str, trace: str | None, plot: str | None, **sweep: Any) -> None:
    """Measure speed and memory of MODEL.

    Lists are swept: every combination is measured, interleaved with the others. Tests are named as by llama-bench:
    tg32 @ d8192 decodes 32 tokens at a depth of 8192, pp512 @ d8192 reads a prompt there, prompt @ d8192 fills the
    context from empty.
    """
    from edgekv import bench as library
    from edgekv.gguf_file import GGUF

    gguf = GGUF(model)
    rope = take_rope(sweep)
    if plot:
        from edgekv import plot as pictures

        pictures.check(plot)
        if not any(n_gen):
            raise EdgekvError(f"--plot {plot}: draws how fast it decodes, give -n a number above 0")
    if trace:
        atomic.check(trace, "--trace")
    for ngl in sweep["n_gpu_layers"] or (None,):
        look_at_servers(sweep["rpc"], ngl)
    settings = library.plan(gguf, **{name: value for name, value in sweep.items() if value is not None}, rope=rope)
    deepest = max(s.depth for s in settings)
    samples: list[dict[str, Any]] | None = [] if trace else None
    with _status(progress) as report:
        if deepest > rope.reach(gguf.context_length, gguf.rope_factor):
            report(f"note: -d {deepest} is beyond the {gguf.context_length} tokens the model was trained on", keep=True)
        rows = library.bench(model, settings, n_gen=n_gen, n_prompt=n_prompt, repetitions=repetitions,
                             bandwidth=bandwidth, trace=samples, report=report)
    click.echo(FORMATS[output](rows), nl=False)
    if trace:
        atomic.write(trace, [to_csv(samples or []).encode()])
    if plot:
        pictures.bench_curves(rows, plot, f"{gguf.path.name}: {rows[0]['machine']}", samples or ())


@contextmanager
def _status(show: bool | None) -> Iterator[Callable[..., None]]:
    """Yields a function for lines about what runs: one line in its place on a terminal, all of them elsewhere."""
    terminal = sys.stderr.isatty()
    show = terminal if show is None else show
    erase = "\r\033[K" if show and terminal else ""

    def report(line: str, keep: bool = False) -> None:
        if erase and not keep:
            line = line[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be erased
        if keep or show:
            click.echo(erase + line, err=True, nl=keep or not terminal)

    try:
        yield report
    finally:
        if erase:
            click.echo(erase, err=True, nl=False)


def to_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# heading, row -> text, right-aligned, shown only if a row differs from this text
_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str], bool, str | None]] = [
    ("model", lambda r: r["model_type"], False, None),
    ("size", lambda r: format_bytes(r["model_size"]), True, None),
    ("params", lambda r: f"{r['model_n_params'] / 1e6:.2f} M", True, None),
    ("backend", lambda r: r["backend"], False, None),
    ("threads", lambda r: str(r["threads"]), True, None),
    ("ngl", lambda r: str(r["n_gpu_layers"]), True, "0"),
    ("rpc", lambda r: r["rpc"] or "-", False, "-"),
    ("n_ubatch", lambda r: str(r["n_ubatch"]), True, "512"),
    ("type_k", lambda r: r["type_k"], True, "f16"),
    ("type_v", lambda r: r["type_v"], True, "f16"),
    ("fa", lambda r: "on" if r["flash_attn"] else "off", True, None),
    ("kv_evict", lambda r: r["kv_evict"], False, None),
    ("kv_budget", lambda r: "-" if r["kv_budget"] is None else str(r["kv_budget"]), True, None),
    ("kv_select", lambda r: r["kv_select"], False, "none"),
    ("select_budget", lambda r: "-" if r["kv_select_budget"] is None else str(r["kv_select_budget"]), True, "-"),
    ("page", lambda r: "-" if r["kv_page_size"] is None else str(r["kv_page_size"]), True, "-"),
    ("grouped", lambda r: "on" if r["kv_grouped_attn"] else "off", True, "off"),
    ("test", lambda r: r["test"], True, None),
    ("t/s", lambda r: f"{r['t_s']:.2f} ± {r['t_s_sd']:.2f}", True, None),
    ("cells", lambda r: f"{r['cells_mean']:.0f}", True, None),
    ("KV", lambda r: format_bytes(r["kv_bytes"]), True, None),
    ("peak RSS", lambda r: format_bytes(r["peak_rss_bytes"]), True, None),
    ("peak GPU", lambda r: "-" if r["peak_device_bytes"] is None else format_bytes(r["peak_device_bytes"]), True, "-"),
    ("evicting", lambda r: f"{100 * r['evict_share']:.2f} %" if r["n_evictions"] else "-", True, "-"),
    ("pages read", lambda r: f"{100 * r['pages_read'] / r['pages_total']:.1f} %" if r["pages_read"] else "-", True, "-"),
    ("GB/s", lambda r: "-" if r["gb_s"] is None else f"{r['gb_s']:.2f}", True, "-"),
    ("memory GB/s", lambda r: "-" if r["mem_gb_s"] is None else f"{r['mem_gb_s']:.2f}", True, "-"),
]


def to_md(rows: list[dict[str, Any]]) -> str:
    """A table in llama-bench's form; ``cells`` is the mean number of cells in use."""
    columns = [(heading, [text(row) for row in rows], right, usual) for heading, text, right, usual in _COLUMNS]
    shown = [column for *column, usual in columns if usual is None or set(column[1]) != {usual}]
    r = rows[0]
    return (f"{markdown(shown)}\n{r['model']}, {r['reps']} repetitions; edgekv {r['edgekv']}, llama-cpp-python "
            f"{r['llama_cpp_python']}, {r['cpu_variant']}; {r['machine']}\n")


FORMATS = {"md": to_md, "json": to_json, "jsonl": to_jsonl, "csv": to_csv}
