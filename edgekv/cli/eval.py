"""``edgekv eval``"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekv.cli.common import Numbers, Shares, Words, model_option
from edgekv.cli.talk import read_text, say
from edgekv.errors import EdgekvError
from edgekv.eval.tasks import NEEDLES, RULER
from edgekv.settings import (
    DEFAULT_POLICY,
    MODES,
    PAGE_SIZES,
    POLICIES,
    SELECTIONS,
    SelectionSettings,
    needs_filters,
)

if TYPE_CHECKING:  # numpy and the runtime are loaded once the options are known to be right
    from edgekv.eval.haystack import Haystack
    from edgekv.eval.journal import Journal
    from edgekv.eval.perplexity import Text
    from edgekv.eval.setting import Setting
    from edgekv.eval.tasks import Document
    from edgekv.filters import QFilters
    from edgekv.gguf_file import GGUF

MAX_TOKENS = 4096  # of a text, by default
DEFAULT_TEXT = "the docstrings of Python's standard library"


@click.group()
def eval() -> None:
    """Measure what compression costs, against the full cache and with uncertainty beside every figure."""


def _options(*options: Callable) -> Callable:
    return lambda function: functools.reduce(lambda inner, option: option(inner), reversed(options), function)


def _settings_options(budgets: str) -> Callable:
    """What is compared; the command hands its keyword arguments to :func:`_plan`."""
    return _options(
        click.option("--kv-evict", type=Words(), default=f"none,{DEFAULT_POLICY},streaming", show_default=True, metavar="LIST",
                     help=f"Eviction policies: {', '.join(POLICIES)}. none, the full cache, is always measured."),
        click.option("--kv-budget", type=Words(), default=budgets, show_default=True, metavar="LIST",
                     help="Tokens kept by an eviction: 512, or x8 (an eighth of what was read)."),
        click.option("--kv-window", type=click.IntRange(min=0), metavar="N",
                     help="Last tokens, always kept [default: min(256, budget / 4)]."),
        click.option("--keep", type=click.IntRange(min=0), metavar="N",
                     help="First tokens, always kept [default: 4]."),
        click.option("--kv-select", type=click.Choice(SELECTIONS), default="none", show_default=True,
                     help="Which cached tokens a decode step reads; nothing is evicted then."),
        click.option("--kv-select-budget", type=Words(), metavar="LIST",
                     help="Tokens read per step, or auto [default: auto]."),
        click.option("--kv-page-size", type=click.Choice([str(n) for n in PAGE_SIZES]),
                     help="Tokens per page [default: 16]."),
        click.option("--kv-dense-layers", type=click.IntRange(min=0), metavar="N",
                     help="First layers that read the whole cache [default: 2]."),
        click.option("--kv-select-heads", type=Words(("kv", "query")), metavar="LIST",
                     help="Pages are chosen per KV head or per query head: kv, query [default: kv]."),
    )


_types_option = click.option(
    "-ctk", "--cache-types", "types", type=Words(), default="f16", show_default=True, metavar="LIST",
    help="Cache types of K and V alike, such as q8_0,q4_0: measured without an eviction.")
_threads_option = click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), metavar="N",
                               help="Threads [default: all cores].")
_output_option = click.option("-o", "--output", type=click.Choice(["md", "json", "csv"]), default="md",
                              show_default=True, help="Format on standard output.")
_log_option = click.option("--log", type=click.Path(), metavar="FILE",
                           help="Keep what is found, as JSON lines: the same command goes on where it was stopped.")


def _needle_options(tasks: str, choices: Sequence[str], about: str) -> Callable:
    return _options(
        _settings_options("x2,x4,x8"),
        _types_option,
        click.option("-c", "--lengths", type=Numbers(1), default="1024,2048", show_default=True, metavar="LIST",
                     help="Tokens of context, with the question."),
        click.option("--tasks", type=Words(choices), default=tasks, show_default=True, metavar="LIST", help=about),
        click.option("-n", "--documents", "n_documents", type=click.IntRange(min=1), default=20, show_default=True,
                     metavar="N", help="Documents of each kind; their seeds count up from -s."),
        click.option("-s", "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                     help="The first seed; the same seeds make the same documents."),
        click.option("--question-first", is_flag=True,
                     help="The question also stands before the document [default: hidden from the compression]."),
        click.option("--mode", type=click.Choice(MODES), default="prompt", show_default=True,
                     help="Evict once behind the whole document, or while it is read."),
        click.option("-f", "--file", "files", type=click.Path(), multiple=True, metavar="FILE",
                     help=f"A text to hide needles in, may be repeated [default: {DEFAULT_TEXT}]."),
        _threads_option,
        _log_option,
        _output_option,
        click.option("--against", metavar="NAME",
                     help="A method (streaming) or setting (streaming x4) to test all others against."),
        click.option("--plot", type=click.Path(), metavar="FILE",
                     help="Draw accuracy against compression; with --depths a map of length and depth (.png or .svg)."),
    )


def _text_options(budgets: str, *, ubatch: bool) -> Callable:
    return _options(
        _settings_options(budgets),
        *([_types_option] if ubatch else []),
        click.option("-f", "--file", "files", type=click.Path(), multiple=True, metavar="FILE",
                     help=f"A text to read, may be repeated [default: {DEFAULT_TEXT}]."),
        click.option("--length", type=click.IntRange(min=2), metavar="N",
                     help=f"Tokens that are read at a time [default: {MAX_TOKENS}, or the trained context]."),
        *([click.option("-n", "--windows", "n_windows", type=click.IntRange(min=1), default=1, show_default=True,
                        metavar="N", help="Windows of so many tokens from each text, spread over it."),
           click.option("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=1), default=32, show_default=True,
                        metavar="N", help="Tokens computed at once; a bounded cache has room for so many more. "
                                          "8 at most with --kv-select."),
           _log_option,
           click.option("--plot", type=click.Path(), metavar="FILE",
                        help="Draw the loss along the text (.png or .svg).")] if ubatch else []),
        _threads_option,
        _output_option,
    )


@eval.command(short_help="Needles in a haystack: facts hidden in a long text.")
@model_option
@_needle_options("words,key,values,chain", tuple(NEEDLES), f"What is hidden and asked for: {', '.join(NEEDLES)}.")
@click.option("--depths", type=Shares(), metavar="LIST",
              help="Where needles are, from 0 (the start) to 1 (the end); so many documents for each "
                   "[default: anywhere].")
@click.option("--separate", is_flag=True, help="A document for each task [default: one holds the needles of all].")
def niah(model: str, depths: list[float] | None, separate: bool, **options: Any) -> None:
    """Ask MODEL for needles in a haystack: facts hidden in a long text."""
    from edgekv.eval.tasks import needle_documents

    def documents(haystack: Haystack, tokenize: Any, tasks: list[str], **common: Any) -> list[Document]:
        return list(needle_documents(haystack, tokenize, tasks=tasks, depths=depths or (None,), separate=separate,
                                     **common))

    _ask("niah", model, documents, {"depths": depths, "separate": separate}, depths is not None, **options)


@eval.command(short_help="The synthetic tasks of RULER that need no download.")
@model_option
@_needle_options(",".join(RULER), tuple(RULER), f"Of {', '.join(RULER)}.")
@click.option("--chains", type=click.IntRange(1, 100), default=1, show_default=True, metavar="N",
              help="Of the task vt: variables that get a value of their own.")
@click.option("--hops", type=click.IntRange(1, 40), default=4, show_default=True, metavar="N",
              help="Of the task vt: how often each value is handed on.")
def ruler(model: str, chains: int, hops: int, **options: Any) -> None:
    """Ask MODEL the synthetic tasks of RULER (arXiv 2404.06654) that need no download."""
    from edgekv.eval.tasks import ruler_documents

    def documents(haystack: Haystack, tokenize: Any, tasks: list[str], **common: Any) -> list[Document]:
        return [document for task in dict.fromkeys(tasks)
                for document in ruler_documents(task, haystack, tokenize, chains=chains, hops=hops, **common)]

    _ask("ruler", model, documents, {"chains": chains, "hops": hops}, False, **options)


@eval.command(short_help="Loss along a text in a bounded cache.")
@model_option
@_text_options("512", ubatch=True)
def ppl(model: str, **options: Any) -> None:
    """Measure MODEL's loss along a text in a cache that is bounded while it reads."""
    import numpy as np

    from edgekv.eval import perplexity
    from edgekv.eval.report import loss_report

    def measure(settings: list[Setting], texts: list[Text], **common: Any) -> list[perplexity.Loss]:
        return perplexity.evaluate(model, texts, settings, **common)

    def report(results: list[perplexity.Loss], output: str, header: dict[str, Any]) -> str:
        curves = {r.setting.label: r.curve() for r in results}
        return loss_report(perplexity.rows(results), output, header=header, curves=curves)

    def curves(results: list[perplexity.Loss]) -> dict[str, Any]:
        return {r.setting.label: (np.arange(r.length - 1), r.nll.mean(axis=0)) for r in results}

    _read("ppl", model, measure, report, curves, **options)


@eval.command(short_help="KL divergence from the full cache's predictions.")
@model_option
@_text_options("512", ubatch=True)
@click.option("--at-once", type=click.IntRange(min=1), default=4, show_default=True, metavar="N",
              help="Settings that are read beside the full cache, each with a context of its own.")
def kl(model: str, at_once: int, **options: Any) -> None:
    """Measure how far compression moves MODEL's predictions from those with the full cache.

    The figures are those of llama-perplexity --kl-divergence.
    """
    import numpy as np

    from edgekv.eval import divergence
    from edgekv.eval.report import divergence_report

    def measure(settings: list[Setting], texts: list[Text], **common: Any) -> list[divergence.Divergence]:
        return divergence.evaluate(model, texts, settings[1:], at_once=at_once, **common)  # without the full cache

    def report(results: list[divergence.Divergence], output: str, header: dict[str, Any]) -> str:
        return divergence_report(divergence.rows(results), output, header=header)

    def curves(results: list[divergence.Divergence]) -> dict[str, Any]:
        losses = {"none": results[0].nll_base} | {r.setting.label: r.nll for r in results}
        return {label: (np.arange(nll.shape[1]), nll.mean(axis=0)) for label, nll in losses.items()}

    _read("kl", model, measure, report, curves, **options)


@eval.command(short_help="How much of the attention a setting holds.")
@model_option
@_text_options("x2,x4,x8", ubatch=False)
@click.option("--steps", "n_steps", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
              help="The last tokens, by whose attention is judged.")
@click.option("--values", is_flag=True, help="Weigh the attention to a token with the norm of its V.")
def attention(model: str, files: tuple[str, ...], length: int | None, n_steps: int, values: bool, n_threads: int | None,
              output: str, **sweep: Any) -> None:
    """Measure how much of MODEL's attention a setting holds, against the best possible choice."""
    from edgekv.attention import context_for, first_tokens
    from edgekv.eval import journal, recall
    from edgekv.eval.report import recall_report
    from edgekv.session import Vocabulary

    gguf, settings = _prepared(model, None, **sweep)
    if len(settings) == 1:
        raise EdgekvError("--kv-evict none: holds all attention; add a policy, or --kv-select quest")
    n_ctx = context_for(gguf, length, n_steps, 1)
    named = _named_texts(files)
    with Vocabulary(model) as vocabulary:
        shortest = min(len(first_tokens(vocabulary, text, n_ctx, length, n_steps, 1, name)) for name, text in named)
    for s in settings:
        s.eviction(shortest - n_steps)  # says what is wrong with it
    filters = _filters(model, settings, n_threads, named)
    header = journal.header("attention", model, _config(settings, filters) | {
        "length": length, "steps": n_steps, "values": values,
        "texts": [hashlib.sha256(text.encode()).hexdigest() for _, text in named]}, n_threads)
    reports = [recall.measure(model, text, settings, length=length, n_steps=n_steps, values=values, filters=filters,
                              n_threads=n_threads, progress=True, source=name) for name, text in named]
    click.echo(recall_report(recall.pooled(reports).as_dict(), output, header=header), nl=False)


# --- what they share -------------------------------------------------------------------------------------------------


def _ask(kind: str, model: str, make: Callable[..., list[Document]], config: dict[str, Any], with_map: bool, *,
         lengths: list[int], tasks: list[str], n_documents: int, seed: int, question_first: bool, mode: str,
         files: tuple[str, ...], n_threads: int | None, log: str | None, output: str, against: str | None,
         plot: str | None, **sweep: Any) -> None:
    """Make documents, ask about them, print the table. ``config``: what else the documents depend on."""
    from edgekv.eval import haystack, journal, needles
    from edgekv.eval.report import needle_report
    from edgekv.session import Vocabulary

    gguf, settings = _prepared(model, plot, **sweep)
    for length in lengths:
        if length > gguf.context_length:
            raise EdgekvError(f"--lengths {length}: the model was trained on {gguf.context_length} tokens of context; "
                              "give smaller ones")
        for s in settings:
            s.eviction(length, mode)  # says what is wrong with it
    methods = dict.fromkeys(s.method for s in settings)
    if against is not None and against not in methods and against not in [s.label for s in settings]:
        raise EdgekvError(f"--against {against}: is not measured here; choose one of {', '.join(methods)}, or one of "
                          "their settings")

    named = _named_texts(files) if files else []
    hay = haystack.Haystack(haystack.paragraphs(files) if files else haystack.default_paragraphs())
    with Vocabulary(model) as vocabulary:
        documents = make(hay, vocabulary.tokenize, tasks, lengths=lengths, seeds=range(seed, seed + n_documents),
                         question_first=question_first)
        shortest = min(len(vocabulary.tokenize(document.text)) for document in documents)
    for s in settings:
        s.eviction(shortest)  # less than --lengths, of which the question is a part
    filters = _filters(model, settings, n_threads, named)
    header = journal.header(kind, model, _config(settings, filters) | {
        "question_first": question_first, "mode": mode, "haystack": hay.sha256, **config}, n_threads,
        {"lengths": lengths, "tasks": tasks, "seeds": [seed, n_documents]})
    with _journal(log, header) as found:
        scores = needles.run(model, documents, settings, found, filters=filters, mode=mode, n_threads=n_threads,
                             progress=True)
    click.echo(needle_report(scores, output, header=header, against=against), nl=False)
    if output == "md" and any(s.selection.method != "none" for s in settings):
        click.echo("\nOf a selection the compression says how many times fewer tokens a step reads: nothing leaves the "
                   "cache.")
    if plot is not None:
        from edgekv.plot import accuracy_curves, needle_map

        draw = needle_map if with_map else accuracy_curves
        draw(scores, plot, f"{Path(model).name}: {', '.join(dict.fromkeys(tasks))}")


def _read(kind: str, model: str, measure: Callable[..., list[Any]], report: Callable[..., str],
          curves: Callable[[list[Any]], dict[str, Any]], *, files: tuple[str, ...], length: int | None, n_windows: int,
          n_ubatch: int, n_threads: int | None, log: str | None, output: str, plot: str | None, **sweep: Any) -> None:
    """Read texts, print the table."""
    from edgekv.eval import journal, perplexity
    from edgekv.session import Vocabulary

    gguf, settings = _prepared(model, plot, **sweep)
    if kind == "kl" and len(settings) == 1:
        raise EdgekvError("--kv-evict none: there is nothing to compare with the full cache; add a policy, -ctk or "
                          "--kv-select quest")
    length = _checked_length(gguf, length)
    for s in settings:
        s.eviction(length)  # says what is wrong with it
    named = _named_texts(files)
    with Vocabulary(model) as vocabulary:
        if not files:  # the default text is long
            named = [(name, text[: 32 * length * n_windows]) for name, text in named]
        texts = [window for name, text in named
                 for window in perplexity.windows(vocabulary, text, name, length=length, n=n_windows)]
    filters = _filters(model, settings, n_threads, named)
    header = journal.header(kind, model, _config(settings, filters) | {
        "length": length, "n_ubatch": n_ubatch, "texts": [text.digest for text in texts]}, n_threads)
    with _journal(log, header) as found:
        results = measure(settings, texts, length=length, journal=found, n_ubatch=n_ubatch, n_threads=n_threads,
                          filters=filters, progress=True)
    click.echo(report(results, output, header), nl=False)
    if plot is not None:
        from edgekv.plot import loss_curves

        loss_curves(curves(results), plot, f"{Path(model).name}: {', '.join(name for name, _ in named)}")


def _prepared(model: str, plot: str | None, **sweep: Any) -> tuple[GGUF, list[Setting]]:
    """The model's metadata and the settings. EdgekvError, naming the flag or the file, before anything is loaded."""
    if plot is not None:
        from edgekv.plot import check

        check(plot)
    settings = _plan(**sweep)
    from edgekv.gguf_file import GGUF

    return GGUF(model), settings


def _plan(kv_evict: list[str], kv_budget: list[str], kv_window: int | None, keep: int | None, kv_select: str,
          kv_select_budget: list[str] | None, kv_page_size: str | None, kv_dense_layers: int | None,
          kv_select_heads: list[str] | None, types: Sequence[str] = ("f16",)) -> list[Setting]:
    """The full f16 cache first."""
    from edgekv.eval.setting import plan

    if kv_select == "none" and kv_select_heads:
        raise EdgekvError("--kv-select-heads is for selection: add --kv-select quest or drop it")
    selections = [SelectionSettings.resolve(kv_select, budget, kv_page_size and int(kv_page_size), kv_dense_layers,
                                            per_query_head=heads == "query")
                  for budget in kv_select_budget or (None,) for heads in kv_select_heads or ("kv",)]
    return plan(policies=kv_evict, budgets=kv_budget, window=kv_window, keep=keep, types=types, selections=selections)


def _checked_length(gguf: GGUF, length: int | None) -> int:
    if length is not None and length > gguf.context_length:
        raise EdgekvError(f"--length {length}: the model was trained on {gguf.context_length} tokens of context")
    return length or min(MAX_TOKENS, gguf.context_length)


def _named_texts(files: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names and texts; without files the default text, and a line that says so."""
    if files:
        return [(file, read_text("-f", file)) for file in files]
    from edgekv.eval.haystack import default_paragraphs

    say(f"no -f, so the text is {DEFAULT_TEXT}: prose, but of one kind; give texts like those that you care about")
    return [(DEFAULT_TEXT, "\n\n".join(default_paragraphs()))]


def _filters(model: str, settings: Sequence[Setting], n_threads: int | None,
             texts: Sequence[tuple[str, str]]) -> QFilters | None:
    """The model's Q-Filters, if a setting needs them; warns if they were made from one of the texts."""
    if not any(needs_filters(s.policy) for s in settings):
        return None
    from edgekv.calibrate import filters_for
    from edgekv.eval.perplexity import calibrated_on
    from edgekv.session import default_threads

    filters = filters_for(model, n_threads=n_threads or default_threads(), say=say)
    for name, text in texts:
        if calibrated_on(filters, text):
            say(f"warning: the Q-Filters were calibrated on {name}, which flatters them; give another text")
    return filters


def _config(settings: Sequence[Setting], filters: QFilters | None) -> dict[str, Any]:
    """What every evaluation depends on."""
    return {"settings": [{"label": s.label, **asdict(s)} for s in settings],
            "filters": None if filters is None else hashlib.sha256(filters.flat().tobytes()).hexdigest()}


@contextmanager
def _journal(path: str | None, header: dict[str, Any]) -> Iterator[Journal]:
    from edgekv.eval.journal import Journal

    with Journal.open(path, header) as journal:
        try:
            yield journal
        except KeyboardInterrupt:
            if path is not None:
                say(f"{path} has what was found so far: run the same command again to go on")
            raise
