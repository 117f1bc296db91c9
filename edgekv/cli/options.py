"""The options of a context and of sampling, under llama.cpp's names, and what a command makes of them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import click

from edgekv.cli.common import format_bytes
from edgekv.cli.talk import read_text, say
from edgekv.errors import EdgekvError
from edgekv.settings import (
    CACHE_TYPES,
    DEFAULT_POLICY,
    FLOAT_TYPES,
    PAGE_SIZES,
    POLICIES,
    ROPE_SCALINGS,
    SELECTIONS,
    RopeSettings,
    SelectionSettings,
    needs_filters,
    parse_budget,
)

_MIB = 1 << 20


def _help_all(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        for param in ctx.command.params:
            if isinstance(param, click.Option):
                param.hidden = False
        click.echo(ctx.get_help())
        ctx.exit()


def _apply(options: list[Callable], function: Callable) -> Callable:
    for option in reversed(options):
        function = option(function)
    return function


def rare(*args: Any, **kwargs: Any) -> Callable:
    """An option that only ``--help-all`` lists."""
    return click.option(*args, hidden=True, **kwargs)


_help_all_option = click.option(
    "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_help_all, help="Show the rarer options too."
)

rpc_option = click.option(
    "--rpc", "rpc", metavar="HOST:PORT,...",
    help="Servers (edgekv rpc-server) that compute layers and hold their caches.",
)

_eviction_options = [
    click.option("--kv-evict", type=click.Choice(("auto", *POLICIES)), default="auto", show_default=True,
                 help="Which tokens stay in the KV cache. auto: all of them if they fit the free memory."),
    click.option("--kv-budget", metavar="N|xN|SIZE",
                 help="Tokens kept by an eviction: 2048, x8 (context / 8) or 1.5GiB."),
    rare("--kv-window", type=int, metavar="N", help="Last tokens, always kept [default: min(256, budget / 4)]."),
    rare("--keep", type=int, metavar="N", help="First tokens, always kept [default: the system prompt, else 4]."),
    rare("-cram", "--cache-ram", type=click.IntRange(min=0), metavar="MIB",
         help="Checkpoints to go back to, 0: none [default: a quarter of the free memory, at most 8192]."),
]

_selection_options = [
    click.option("--kv-select", type=click.Choice(SELECTIONS), default="none", show_default=True,
                 help="Which cached tokens a decode step reads. quest: the pages that look likeliest, faster."),
    click.option("--kv-select-budget", metavar="N|auto",
                 help="Tokens read per step [default: auto, 768 and a 32nd of the cached ones]."),
    rare("--kv-page-size", type=click.Choice([str(n) for n in PAGE_SIZES]), help="Tokens per page [default: 16]."),
    rare("--kv-dense-layers", type=click.IntRange(min=0), metavar="N",
         help="First layers that read the whole cache [default: 2]."),
    rare("--kv-grouped-attn", is_flag=True,
         help="Read the whole cache with our attention kernel too where nothing is selected."),
]

_context_options = [
    click.option("-c", "--ctx-size", "n_ctx", type=click.IntRange(min=0), default=0,
                 help="Tokens of context [default: what the model was trained on]."),
    click.option("-t", "--threads", "n_threads", type=click.IntRange(min=1), help="Threads [default: all cores]."),
    click.option("-ngl", "--gpu-layers", "--n-gpu-layers", "n_gpu_layers", type=int, metavar="N",
                 help="Layers on GPUs and --rpc servers, the last ones; -1: all [default: 0, with --rpc all]."),
    rpc_option,
    click.option("-ctk", "--cache-type-k", "type_k", type=click.Choice(CACHE_TYPES), default="f16", show_default=True,
                 help="Type of K in the cache."),
    click.option("-ctv", "--cache-type-v", "type_v", type=click.Choice(CACHE_TYPES), default="f16", show_default=True,
                 help="Type of V in the cache; quantised types need -fa on."),
    rare("-fa", "--flash-attn", "flash_attn", type=click.Choice(("on", "off", "auto")), default="auto",
         show_default=True, help="Flash attention. auto: on a GPU and for quantised V."),
    rare("-b", "--batch-size", "n_batch", type=click.IntRange(min=1), default=512, show_default=True,
         help="Tokens per call of the prompt."),
    rare("-ub", "--ubatch-size", "n_ubatch", type=click.IntRange(min=1), default=512, show_default=True,
         help="Tokens computed at once; a bounded cache has room for one ubatch behind the budget."),
]

_rope_options = [
    rare("--rope-scaling", type=click.Choice(tuple(ROPE_SCALINGS)),
         help="How positions are stretched beyond the trained context [default: as the model says, else linear]."),
    rare("--rope-scale", type=float, metavar="N", help="Stretch the context N times."),
    rare("--rope-freq-base", type=float, metavar="N", help="Base frequency of RoPE [default: the model's]."),
    rare("--rope-freq-scale", type=float, metavar="N", help="Frequency factor of RoPE, 1 / --rope-scale."),
    rare("--yarn-orig-ctx", type=int, metavar="N", help="YaRN: the context before it is stretched [default: the trained]."),
    rare("--yarn-ext-factor", type=float, metavar="N", help="YaRN: share of extrapolation, 0: all interpolated."),
    rare("--yarn-attn-factor", type=float, metavar="N", help="YaRN: factor of the attention's magnitude."),
    rare("--yarn-beta-slow", type=float, metavar="N", help="YaRN: high correction dimension."),
    rare("--yarn-beta-fast", type=float, metavar="N", help="YaRN: low correction dimension."),
]

_sampling_options = [
    click.option("-n", "--predict", "--n-predict", "n_predict", type=int, default=-1, show_default=True,
                 help="Tokens to answer with at most, -1: until the model stops."),
    click.option("--temp", type=float, default=0.8, show_default=True, help="Temperature, 0: always the likeliest."),
    click.option("-s", "--seed", type=int, default=-1, show_default=True, help="Seed, -1: random."),
    rare("--top-k", type=int, default=40, show_default=True, help="Sample among the k likeliest, 0: all."),
    rare("--top-p", type=float, default=0.95, show_default=True, help="Sample among those that sum up to p."),
    rare("--min-p", type=float, default=0.05, show_default=True, help="Drop what is less likely than p times the best."),
    rare("--repeat-penalty", type=float, default=1.0, show_default=True, help="Penalty for repetitions, 1: none."),
    rare("--presence-penalty", type=float, default=0.0, show_default=True, help="Penalty for tokens seen before."),
    rare("--frequency-penalty", type=float, default=0.0, show_default=True, help="Penalty per time seen before."),
]


_grammar_options = [
    rare("--grammar", metavar="GBNF", help="Answers follow this grammar."),
    rare("--grammar-file", metavar="FILE", type=click.Path(), help="Answers follow the grammar in this file."),
    rare("-j", "--json-schema", metavar="SCHEMA", help="Answers are JSON of this schema; {} for any."),
    rare("-jf", "--json-schema-file", metavar="FILE", type=click.Path(), help="Answers are JSON of the schema in this file."),
]


def context_options(function: Callable) -> Callable:
    """Adds the options of a context; the command gets them as keyword arguments for :func:`open_llama`."""
    return _apply([*_eviction_options, *_selection_options, *_context_options, _help_all_option], function)


def rope_options(function: Callable) -> Callable:
    """Adds llama.cpp's options of RoPE scaling; the command gets its :class:`RopeSettings` from :func:`take_rope`."""
    return _apply(_rope_options, function)


def take_rope(options: dict[str, Any]) -> RopeSettings:
    """Takes the options of RoPE scaling out of a command's. EdgekvError, naming the flag, if one is wrong."""
    return RopeSettings.resolve(**{name: options.pop(name) for name in
                                   (*signature(RopeSettings.resolve).parameters,) if name in options})


def warn_beyond_training(n_ctx: int, gguf, rope: RopeSettings, flag: str = "-c", tell: Callable[[str], None] = say) -> None:
    """Says that a context is longer than what the model was trained on, stretched as it may be."""
    trained, factor = gguf.context_length, gguf.rope_factor
    reach = rope.reach(trained, factor)
    if 0 < reach < n_ctx:
        stretched = f", stretched to {reach:,}" if reach != trained else ""
        tell(f"{flag} {n_ctx} is beyond the {trained:,} tokens the model was trained on{stretched}: answers may be nonsense "
             f"there. --rope-scaling yarn --rope-scale {math.ceil(factor * n_ctx / trained)} stretches positions that far")


def sampling_options(function: Callable) -> Callable:
    """Adds the options of sampling and grammars; the command passes its keyword arguments to :func:`take_sampling` and
    :func:`take_grammar`."""
    return _apply([*_sampling_options, *_grammar_options], function)


# our name (llama.cpp's) -> the bindings' name
SAMPLING = {
    "n_predict": "max_tokens",
    "temp": "temperature",
    **{name: name for name in ("seed", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
                               "frequency_penalty")},
}


def take_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampling options out of a command's: arguments for ``create_completion`` and its like."""
    values = {theirs: options.pop(ours) for ours, theirs in SAMPLING.items() if ours in options}
    for name in ("max_tokens", "seed"):
        if values.get(name, 0) < 0:  # no limit, no fixed seed
            values[name] = None
    return values


def take_grammar(options: dict[str, Any]):
    """Takes the options of grammars out of a command's: a ``LlamaGrammar`` or None. EdgekvError, naming the flag, if it
    cannot be read or parsed."""
    from edgekv.grammar import parse_grammar, parse_json_schema

    given = []
    for name, parse in (("grammar", parse_grammar), ("json_schema", parse_json_schema)):
        flag = "--" + name.replace("_", "-")
        text, file = options.pop(name), options.pop(f"{name}_file")
        if text is not None:
            given.append((flag, text, parse))
        if file is not None:
            given.append((f"{flag}-file {file}", read_text(f"{flag}-file", file), parse))
    if len(given) > 1:
        raise EdgekvError(f"{given[0][0].split()[0]} and {given[1][0].split()[0]} both say what the answer looks like: "
                          "drop one of them")
    for where, text, parse in given:
        try:
            return parse(text)
        except EdgekvError as error:
            raise EdgekvError(f"{where}: {error}") from None
    return None


def open_llama(model: str, *, goes_back: bool = True, **options: Any):
    """A ready ``edgekv.Llama`` from the options of a context and of RoPE scaling. It says what ``auto`` decided; filters
    that the model's file lacks come from the user's cache folder, calibrated there once.

    Without ``goes_back``, for one prompt and its answer, layers with sliding windows keep the windows alone."""
    from edgekv.calibrate import filters_for
    from edgekv.gguf_file import GGUF
    from edgekv.llama import Llama
    from edgekv.memory import default_cache_ram
    from edgekv.rpc import gpu_layers
    from edgekv.session import CACHE_TYPES as GGML_TYPES
    from edgekv.session import default_threads

    gguf = GGUF(model)
    rope = take_rope(options)
    o = SimpleNamespace(**options)
    servers = look_at_servers(o.rpc, o.n_gpu_layers)
    o.n_gpu_layers = gpu_layers(o.n_gpu_layers, o.rpc)
    o.n_ctx = o.n_ctx or gguf.context_length
    warn_beyond_training(o.n_ctx, gguf, rope)
    if o.cache_ram is None:
        o.cache_ram = default_cache_ram()
    selection = settle(o, gguf, servers, checkpoints=o.cache_ram * _MIB, swa_full=goes_back)

    threads = o.n_threads or default_threads()
    quantised = o.type_v not in FLOAT_TYPES
    llama = Llama(
        model,
        qfilters=filters_for(model, n_threads=threads, say=say) if needs_filters(o.kv_evict) else None,
        selection=selection,
        cache_ram=o.cache_ram,
        seed=secrets.randbits(32),  # the bindings' own default is a fixed one
        kv_evict=o.kv_evict,
        kv_budget=o.kv_budget,
        kv_window=o.kv_window,
        keep=o.keep,
        n_ctx=o.n_ctx,
        n_batch=o.n_batch,
        n_ubatch=o.n_ubatch,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=o.n_gpu_layers,
        rpc_servers=o.rpc or (),
        swa_full=goes_back,
        type_k=GGML_TYPES[o.type_k],
        type_v=GGML_TYPES[o.type_v],
        flash_attn=o.flash_attn == "on" or (o.flash_attn == "auto" and (o.n_gpu_layers != 0 or quantised)),
        **rope.params(),
    )
    llama.on_notice = say
    return llama


def settle(o: SimpleNamespace, gguf, servers: list, **room: Any) -> SelectionSettings:
    """Checks the options of a context against each other, and decides what is left to us: ``n_ubatch``, ``flash_attn``,
    ``kv_evict`` and ``kv_budget`` of ``o`` are final then.

    Args:
        o: the options, with ``n_ctx`` of each sequence.
        servers: what :func:`check_servers` found.
        room: goes to :func:`auto_policy`.

    Raises:
        EdgekvError: naming the flag that is wrong, or two that do not go together.
    """
    o.n_ubatch = min(o.n_ubatch, o.n_batch)
    if o.flash_attn == "off" and o.type_v not in FLOAT_TYPES:
        raise EdgekvError(f"-ctv {o.type_v}: a quantised V needs flash attention, drop -fa off")
    if o.kv_evict == "none":
        for flag, value in (("--kv-budget", o.kv_budget), ("--kv-window", o.kv_window)):
            if value is not None:
                raise EdgekvError(f"{flag} says what an eviction keeps, but --kv-evict none evicts nothing: drop one of "
                                  "them")
    selection = SelectionSettings.resolve(o.kv_select, o.kv_select_budget, o.kv_page_size and int(o.kv_page_size),
                                          o.kv_dense_layers, o.kv_grouped_attn)
    if selection.needs_flash_attention:
        if o.flash_attn == "off":
            flag = "--kv-select quest" if o.kv_select != "none" else "--kv-grouped-attn"
            raise EdgekvError(f"{flag} needs flash attention: drop -fa off")
        o.flash_attn = "on"
    if o.kv_evict == "auto":
        o.kv_evict, o.kv_budget = auto_policy(gguf, o.kv_budget, o.n_ctx, o.type_k, o.type_v, o.n_ubatch, selection,
                                              servers, o.n_gpu_layers, **room)
    return selection


def look_at_servers(servers: str | None, n_gpu_layers: int | None) -> list:
    """As :func:`check_servers`, for a process that will use them itself: from here on it ends with one line if one of
    them dies."""
    found = check_servers(servers, n_gpu_layers)
    if found:
        from edgekv import rpc

        rpc.exit_on_loss(servers)
    return found


def check_servers(servers: str | None, n_gpu_layers: int | None) -> list:
    """The ``edgekv.rpc.Server`` of ``--rpc``, before anything is loaded. EdgekvError, naming the flag or the server, if
    one cannot be used."""
    if not servers:
        return []
    if n_gpu_layers == 0:
        raise EdgekvError("--rpc: -ngl 0 leaves no layer for the servers; drop one of them")
    from edgekv import rpc

    return rpc.look(servers)


def _free_bytes(servers: list, n_gpu_layers: int, gguf, aside: int = 0, projector: int = 0) -> int | None:
    """The memory that model and cache may fill: that of servers and GPUs, and this machine's, but for the bytes to set
    ``aside``, if layers stay here. A ``projector`` goes to the GPU where there is one."""
    from edgekv.memory import available_bytes, gpu_bytes

    there = sum(sum(server.free_bytes) for server in servers) + (gpu_bytes() if n_gpu_layers else 0)
    here = available_bytes()
    if there and not 0 <= n_gpu_layers < (gguf.get(f"{gguf.architecture}.block_count") or 0):
        return max(0, there - projector)
    return None if here is None else max(0, here - aside - projector) + there


def auto_policy(gguf, budget: str | None, n_ctx: int, type_k: str, type_v: str, n_ubatch: int,
                selection: SelectionSettings, servers: list, n_gpu_layers: int, *, n_slots: int = 1, aside: int = 0,
                checkpoints: int = 0, projector: int = 0, swa_full: bool = True,
                swa_checkpoints: bool = False, tell: Callable[[str], None] = say) -> tuple[str, str | None]:
    """What ``--kv-evict auto`` means here, as policy and budget: a budget asks for eviction, otherwise the free memory
    decides.

    Args:
        n_ctx: tokens of context of each of ``n_slots`` sequences.
        servers: what :func:`check_servers` found.
        aside: bytes of this machine's free memory that are for something else.
        checkpoints: bytes of it that are for checkpoints if something is evicted.
        projector: bytes of the file that makes embeddings of images or sound.
        swa_full: layers with sliding windows keep the whole context while nothing is evicted.
        swa_checkpoints: they keep checkpoints of their windows, llama-server's: as large as the whole context at most.
        tell: gets a line about what the free memory decided.
    """
    from edgekv import native
    from edgekv.llama import window_layers, window_tokens
    from edgekv.session import CACHE_TYPES as GGML_TYPES

    blocks = native.type_block(GGML_TYPES[type_k]), native.type_block(GGML_TYPES[type_v])
    windows = window_layers(gguf)
    per_token = gguf.kv_bytes_per_token(*blocks, without=windows) or 0
    if budget is None:
        # a page's summary is as large as one token in f16
        summaries = 0 if selection.method == "none" else (gguf.kv_bytes_per_token((1, 2), (1, 2)) or 0) // selection.page_size
        in_windows = max(0, (gguf.kv_bytes_per_token(*blocks) or 0) - per_token)
        per_token += summaries
        # llama.cpp rounds up to 256 cells
        window = n_ctx if swa_full or swa_checkpoints else min(n_ctx, window_tokens(gguf, n_ctx) + n_ubatch + 255)
        full = (per_token * n_ctx + in_windows * window) * n_slots

        def room(free: int) -> int:
            # the model's pages and the compute buffers want room too
            return max(0, free - gguf.size) * 4 // 5

        free = _free_bytes(servers, n_gpu_layers, gguf, aside, projector)
        each = f" in each of {n_slots} slots" if n_slots > 1 else ""
        if free is None or full <= room(free):
            tell(f"the whole context of {n_ctx:,} tokens{each} fits the free memory ({format_bytes(full)}): nothing is "
                 "evicted")
            return "none", None
        # layers with sliding windows keep those, which are small beside the context
        free = _free_bytes(servers, n_gpu_layers, gguf, aside + checkpoints, projector)
        tokens = room(free) // n_slots // max(per_token, 1) - n_ubatch
        if tokens < 256:
            raise EdgekvError(f"{gguf.path}: {format_bytes(free)} of free memory are not enough for "
                              + (f"{n_slots} KV caches: lower -np" if n_slots > 1 else "a KV cache"))
        if tokens >= n_ctx:
            tell(f"the whole context of {n_ctx:,} tokens{each} fits the free memory if layers with sliding windows keep "
                 "those alone: nothing is evicted")
            # a cache that evicts keeps windows alone, and is gone back in by checkpoints
            return ("streaming", str(n_ctx)) if swa_full else ("none", None)
        budget = str(tokens)
        tell(f"the context of {n_ctx:,} tokens{each} ({format_bytes(full)}) exceeds the free memory: {tokens:,} tokens "
             "are kept")
    elif parse_budget(budget, n_ctx=n_ctx, bytes_per_token=per_token) >= n_ctx:
        return "none", None

    return DEFAULT_POLICY, budget
