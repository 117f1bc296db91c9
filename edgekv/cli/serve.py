"""``edgekv serve``"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from edgekv.cli.common import model_option
from edgekv.cli.options import auto_policy, check_servers, context_options, rare
from edgekv.cli.talk import say
from edgekv.errors import EdgekvError
from edgekv.settings import EvictionSettings, SelectionSettings, needs_filters

_MIB = 1 << 20

# the options that something is decided by, and llama-server's variables for them
VARIABLES = {
    "n_ctx": "LLAMA_ARG_CTX_SIZE",
    "n_parallel": "LLAMA_ARG_N_PARALLEL",
    "n_batch": "LLAMA_ARG_BATCH",
    "n_ubatch": "LLAMA_ARG_UBATCH",
    "n_threads": "LLAMA_ARG_THREADS",
    "n_gpu_layers": "LLAMA_ARG_N_GPU_LAYERS",
    "rpc": "LLAMA_ARG_RPC",
    "type_k": "LLAMA_ARG_CACHE_TYPE_K",
    "type_v": "LLAMA_ARG_CACHE_TYPE_V",
    "flash_attn": "LLAMA_ARG_FLASH_ATTN",
    "cache_ram": "LLAMA_ARG_CACHE_RAM",
    "host": "LLAMA_ARG_HOST",
    "port": "LLAMA_ARG_PORT",
    **{name: f"LLAMA_ARG_{name.upper()}" for name in (
        "kv_evict", "kv_budget", "kv_window", "kv_select", "kv_select_budget", "kv_page_size", "kv_dense_layers",
        "kv_grouped_attn", "kv_filters")},
}
# other ways to name a model, which is given here
_OTHER_MODEL_FLAGS = ("-hf", "-hfr", "--hf-repo", "-hff", "--hf-file", "-mu", "--model-url", "-dr", "--docker-repo")
_OTHER_MODELS = ("LLAMA_ARG_MODEL", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_HF_FILE",
                 "LLAMA_ARG_DOCKER_REPO")


class _PassThrough(click.Command):
    """Takes the words that it knows; the others are llama-server's, in their order.

    A word without a dash is MODEL where it cannot be the value of one of llama-server's flags: first, or behind one of
    our options. (click's own way to ignore options would read -cb as -c b.)
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {name: option for option in self.get_params(ctx) if isinstance(option, click.Option)
                 for name in option.opts}
        ours: list[str] = []
        theirs: list[str] = []
        words, may_be_model = list(args), True
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            name = _flag(name)
            option = known.get(name)
            if option is None and (word.startswith("-") or not may_be_model):
                theirs.append(word)
                may_be_model = False
                continue
            may_be_model = True
            if option is None:
                ours.append(word)
            elif option.is_flag or not (equals or words):
                ours.append(name)
            else:
                # an option's value may begin with a dash
                ours += [name, value if equals else words.pop(0)]
        super().parse_args(ctx, ours)
        ctx.params["passed_on"] = theirs
        return ctx.args


def _flag(word: str) -> str:
    """llama-server takes --ctx_size as --ctx-size."""
    return word.replace("_", "-") if word.startswith("--") else word


class _Layers(click.ParamType):
    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value in ("all", "auto"):
            return -1
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor all", param, ctx)


class _Switch(click.Choice):
    def __init__(self):
        super().__init__(("on", "off", "auto"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert({"1": "on", "true": "on", "enabled": "on", "0": "off", "false": "off",
                                "disabled": "off", "-1": "auto"}.get(value, value), param, ctx)


def _help_server(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from edgekv import server

        ctx.exit(subprocess.run([server.program(), "--help"], stdin=subprocess.DEVNULL).returncode)


@click.command(cls=_PassThrough)
@model_option
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST",
              help="Addresses to listen at, with commas between them, or a path that ends in .sock.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True,
              help="Port to listen at, 0: a free one.")
@click.option("-np", "--parallel", "n_parallel", type=click.IntRange(-1), metavar="N", default=4, show_default=True,
              help="Slots: conversations that are answered at the same time, each with a cache of its own.")
@rare("--kv-filters", metavar="FILE", help="A GGUF with Q-Filters, instead of those in MODEL.")
@click.option("-v", "--verbose", is_flag=True, help="Show the server's log; -lv N of llama-server says how much.")
@context_options
@click.option("--help-server", is_flag=True, is_eager=True, expose_value=False, callback=_help_server,
              help="Show llama-server's own options.")
def serve(model: str, host: str, port: int, n_parallel: int, kv_filters: str | None, verbose: bool,
          passed_on: list[str], **options: Any) -> int:
    """Answer OpenAI's API, and more, for MODEL: llama-server with a KV cache of bounded size.

    Every other option of llama-server passes through as it is (--help-server lists them), and its environment
    variables work: --api-key, --alias, --chat-template, -lv, ... MODEL comes first, or with -m. Ctrl-C stops the
    server once what it does is in order, a second one at once.
    """
    from edgekv import server
    from edgekv.gguf_file import GGUF

    program = server.program()
    notices: list[str] = []
    gguf = GGUF(model)
    if n_parallel == 0:
        raise EdgekvError("-np 0: give a number of slots")
    n_parallel = 4 if n_parallel < 0 else n_parallel

    for word in passed_on:
        if _flag(word) in _OTHER_MODEL_FLAGS:
            raise EdgekvError(f"{word}: names a model, and so does {model}; give one "
                              "as MODEL (hf:ORG/REPO:QUANT fetches it)")

    hosts = tuple(name.strip() for name in host.split(",") if name.strip())
    if not hosts:
        raise EdgekvError(f"--host {host!r}: give an address")
    with_tcp = not all(name.endswith(".sock") for name in hosts)
    shared_port = _given(passed_on, ("--reuse-port",), "LLAMA_ARG_REUSE_PORT")
    if with_tcp and not shared_port:
        server.free_port(hosts, port)

    plan = _Plan(model, gguf, n_parallel, kv_filters, passed_on, notices, **options)
    with tempfile.TemporaryDirectory(prefix="edgekv-") as folder:
        argv = [program, "-m", model, *plan.argv(Path(folder)), "--host", host]
        if with_tcp:
            port = port or server.free_port(hosts, 0)
        argv += ["--port", port, *_defaults(model, passed_on), *passed_on]
        address = server.Address(hosts, port, _value(passed_on, "--api-prefix", "LLAMA_ARG_API_PREFIX").rstrip("/"),
                                 bool(_value(passed_on, "--ssl-cert-file", "LLAMA_ARG_SSL_CERT_FILE")))
        if address.is_public and not (_value(passed_on, "--api-key", "LLAMA_API_KEY")
                                      or _value(passed_on, "--api-key-file", "LLAMA_ARG_API_KEY_FILE")):
            notices.append(f"warning: {host} can be reached by others, and without --api-key or --api-key-file whoever "
                           "connects can use the model and read the slots")
        log = _Log(verbose or _given(passed_on, ("-lv", "--verbosity", "--log-verbosity", "--log-verbose",
                                                 "--log-jsonl")))

        def up() -> None:
            log.is_up = True
            for line in notices:
                say(line)
            say(f"{_name(model)} is served at {address.url} ({plan}); Ctrl-C stops it")

        end = server.run([str(word) for word in argv], address, each=log, up=up, env=_environment())
    return _tell(end, model)


def _tell(end, model: str) -> int:
    """Say why a server ended, unless it was asked to; the exit status."""
    from edgekv import server

    if end.signal:
        if not end.was_up:
            say("error: interrupted")
        return end.status
    if end.status == 0 and not end.was_up:  # --version and the like
        click.echo("\n".join(end.lines))
    elif end.status:
        say(f"error: {' '.join(server.reason(end, model).split())}")
    return end.status


class _Plan:
    """What of llama-server's settings is decided here: by the same rules as ``edgekv chat``, for several slots.

    EdgekvError, naming the flag, if something the user wrote is wrong.
    """

    def __init__(
        self,
        model: str,
        gguf,
        n_slots: int,
        filters: str | None,
        passed_on: list[str],
        notices: list[str],
        *,
        kv_evict: str,
        kv_budget: str | None,
        kv_window: int | None,
        keep: int | None,
        kv_select: str,
        kv_select_budget: str | None,
        kv_page_size: str | None,
        kv_dense_layers: int | None,
        kv_grouped_attn: bool,
        n_ctx: int,
        n_threads: int | None,
        n_gpu_layers: int | None,
        rpc: str | None,
        type_k: str,
        type_v: str,
        flash_attn: str,
        n_batch: int,
        n_ubatch: int,
        cache_ram: int | None,
    ):
        from edgekv.memory import available_bytes
        from edgekv.rpc import gpu_layers
        from edgekv.session import default_threads

        self.model, self.gguf, self.filters, self.n_slots = model, gguf, filters, n_slots
        self.n_threads = n_threads or default_threads()
        servers = check_servers(rpc, n_gpu_layers)
        n_gpu_layers = gpu_layers(n_gpu_layers, rpc)
        # one cache for all slots takes what it is given, otherwise each has its share
        n_caches = 1 if _given(passed_on, ("-kvu", "--kv-unified"), "LLAMA_ARG_KV_UNIFIED") else n_slots
        n_ctx_all = n_ctx or gguf.context_length * n_caches
        self.n_ctx = _padded(_padded(n_ctx_all) // n_caches)  # of a cache, as llama.cpp rounds it
        n_ubatch = min(n_ubatch, n_batch)
        if cache_ram is None:
            cache_ram = min(8192, (available_bytes() or 0) // 4 // _MIB)

        if flash_attn == "off" and type_v not in ("f32", "f16", "bf16"):
            raise EdgekvError(f"-ctv {type_v}: a quantised V needs flash attention, drop -fa off")
        if kv_evict == "none" and kv_budget is not None:
            raise EdgekvError("--kv-budget says what an eviction keeps, but --kv-evict none evicts nothing: drop one "
                              "of them")
        selection = SelectionSettings.resolve(kv_select, kv_select_budget, kv_page_size and int(kv_page_size),
                                              kv_dense_layers, kv_grouped_attn)
        if selection.needs_flash_attention and flash_attn == "off":
            flag = "--kv-select quest" if kv_select != "none" else "--kv-grouped-attn"
            raise EdgekvError(f"{flag} needs flash attention: drop -fa off")
        if kv_evict == "auto":
            kv_evict, kv_budget = auto_policy(gguf, kv_budget, self.n_ctx, type_k, type_v, n_ubatch, selection, servers,
                                              n_gpu_layers, n_slots=n_caches, aside=max(0, cache_ram) * _MIB,
                                              tell=notices.append)
        self.eviction = EvictionSettings.resolve(
            kv_evict, kv_budget, kv_window, keep or None, n_ctx=self.n_ctx,
            bytes_per_token=_bytes_per_token(gguf, kv_budget, type_k, type_v))

        self._argv = ["-c", n_ctx_all, "-np", n_slots, "-b", n_batch, "-ub", n_ubatch, "-t", self.n_threads,
                      "-ngl", "all" if n_gpu_layers < 0 else n_gpu_layers, "-ctk", type_k, "-ctv", type_v,
                      "-fa", flash_attn, "-cram", cache_ram]
        wishes = {"--rpc": rpc, "--keep": keep}
        if kv_evict != "none":
            wishes |= {"--kv-evict": kv_evict, "--kv-budget": kv_budget, "--kv-window": kv_window}
        if kv_select != "none":
            wishes |= {"--kv-select": kv_select, "--kv-select-budget": kv_select_budget,
                       "--kv-page-size": kv_page_size, "--kv-dense-layers": kv_dense_layers}
        for flag, value in wishes.items():
            if value is not None:
                self._argv += [flag, value]
        if kv_grouped_attn:
            self._argv.append("--kv-grouped-attn")

    def argv(self, folder: Path) -> list[Any]:
        """The arguments. Filters that are needed and not in the model's file are calibrated if need be, and lie in the
        user's cache folder, or in ``folder`` where that cannot be written to."""
        path = self._filters_file(folder) if needs_filters(self.eviction.policy) else None
        return [*self._argv, *(["--kv-filters", path] if path else [])]

    def _filters_file(self, folder: Path) -> str | Path | None:
        from edgekv.calibrate import filters_for
        from edgekv.convert import save_filters
        from edgekv.filters import model_fingerprint, read
        from edgekv.gguf_file import GGUF
        from edgekv.pull import cache_dir

        if self.filters is not None:
            found = read(GGUF(self.filters))
            if found is None:
                raise EdgekvError(f"--kv-filters {self.filters}: holds no Q-Filters; edgekv calibrate makes such a "
                                  "file")
            found.validate(self.gguf, source=self.filters)
            return self.filters
        found = filters_for(self.model, n_threads=self.n_threads, say=say)
        if read(self.gguf):
            return None
        kept = cache_dir("filters") / f"{model_fingerprint(self.gguf)}.gguf"
        try:
            in_cache = read(GGUF(kept))
        except EdgekvError:
            in_cache = None
        if in_cache is not None and in_cache.flat().tobytes() == found.flat().tobytes():
            return kept
        save_filters(folder / "filters.gguf", self.gguf, found)
        return folder / "filters.gguf"

    def __str__(self) -> str:
        n_ctx = min(self.n_ctx, self.gguf.context_length)
        slots = f"{self.n_slots} slot{'s' if self.n_slots > 1 else ''} of {n_ctx:,} tokens"
        evicted = self.eviction.policy != "none"
        return slots + (f", {self.eviction.policy} keeps {self.eviction.budget:,}" if evicted else "")


def _padded(n: int) -> int:
    return -(-n // 256) * 256


def _bytes_per_token(gguf, budget: str | None, type_k: str, type_v: str) -> int:
    """What one token costs in the layers that are evicted from; 0 if the budget is not in bytes."""
    if not (budget or "").strip().lower().endswith("b"):
        return 0
    from edgekv import native
    from edgekv.llama import window_layers
    from edgekv.session import CACHE_TYPES as GGML_TYPES

    blocks = [native.type_block(GGML_TYPES[kind]) for kind in (type_k, type_v)]
    return gguf.kv_bytes_per_token(*blocks, without=window_layers(gguf)) or 0


def _name(model: str) -> str:
    return Path(model).name.removesuffix(".gguf")


def _defaults(model: str, passed_on: list[str]) -> list[str]:
    """What llama-server does otherwise unless it is told, for whatever the user does not say."""
    defaults = (
        # it measures the full cache, and would shrink the context
        (("-fit", "--fit"), ("LLAMA_ARG_FIT",), ["-fit", "off"]),
        # each new request would copy the caches of all idle slots
        (("--cache-idle-slots", "--no-cache-idle-slots"),
         ("LLAMA_ARG_CACHE_IDLE_SLOTS", "LLAMA_ARG_NO_CACHE_IDLE_SLOTS"), ["--no-cache-idle-slots"]),
        (("--metrics",), ("LLAMA_ARG_ENDPOINT_METRICS",), ["--metrics"]),
        (("-a", "--alias"), ("LLAMA_ARG_ALIAS",), ["--alias", _name(model).replace(",", "-")]),
    )
    return [word for flags, variables, words in defaults if not _given(passed_on, flags, *variables) for word in words]


def _given(passed_on: list[str], flags: Collection[str], *variables: str) -> bool:
    return any(_flag(word) in flags for word in passed_on) or any(name in os.environ for name in variables)


def _value(passed_on: list[str], flag: str, variable: str) -> str:
    """What the user gave llama-server for one of its flags, "" if nothing."""
    flags = [_flag(word) for word in passed_on]
    if flag in flags:
        return "".join(passed_on[flags.index(flag) + 1:][:1])
    return os.environ.get(variable, "")


def _environment() -> dict[str, str]:
    """Without what is on the command line by now: llama-server would warn, or not know our words."""
    gone = {*VARIABLES.values(), *_OTHER_MODELS}
    return {name: value for name, value in os.environ.items() if name not in gone}


class _Log:
    """Lines of the server's log: all of them on standard error, or once it is up its warnings and errors."""

    def __init__(self, shows_all: bool):
        self.shows_all = shows_all
        self.is_up = False

    def __call__(self, line: str) -> None:
        from edgekv.server import level_and_text

        try:
            if self.shows_all:
                click.echo(line, err=True)
            elif self.is_up and (told := level_and_text(line))[0] in ("W", "E"):
                say(told[1])
        except OSError:
            pass  # nobody listens; the server goes on


for _parameter in serve.params:
    _parameter.envvar = VARIABLES.get(_parameter.name)
    if _parameter.name == "n_ctx":
        _parameter.help = "Tokens of context of all slots together [default: what the model was trained on, for each]."
    elif _parameter.name == "n_gpu_layers":
        _parameter.type = _Layers()
    elif _parameter.name == "flash_attn":
        _parameter.type, _parameter.help = _Switch(), "Flash attention. auto: where it works."
    elif _parameter.name == "cache_ram":
        _parameter.type = click.IntRange(min=-1)
        _parameter.help = ("MiB for checkpoints and the prompt cache, 0: none, -1: no limit [default: a quarter of the "
                           "free memory, at most 8192].")
