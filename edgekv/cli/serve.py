"""``edgekv serve``"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from edgekv.cli.common import model_option
from edgekv.cli.options import check_servers, context_options, rare, settle, warn_beyond_training
from edgekv.cli.talk import say
from edgekv.errors import EdgekvError
from edgekv.settings import ROPE_SCALINGS, EvictionSettings, RopeSettings, needs_filters

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

    for word in map(_flag, passed_on):
        # --gpt-oss-20b-default and its like fetch one, and set a port
        preset = word.startswith("--") and word.endswith("-default") and word != "--spec-default"
        if preset or word in _OTHER_MODEL_FLAGS:
            raise EdgekvError(f"{word}: names a model, and so does {model}; give one "
                              "as MODEL (hf:ORG/REPO:QUANT fetches it)")

    hosts = tuple(name.strip() for name in host.split(",") if name.strip())
    if not hosts:
        raise EdgekvError(f"--host {host!r}: give an address")
    with_tcp = not all(name.endswith(".sock") for name in hosts)
    shared_port = _given(passed_on, ("--reuse-port",), "LLAMA_ARG_REUSE_PORT")
    if not shared_port:
        server.free_port(hosts, port)

    media = _Media(passed_on)
    plan = _Plan(model, gguf, n_parallel, kv_filters, passed_on, media, notices, **options)
    with ExitStack() as stack:
        argv = [program, "-m", model, *plan.argv(stack), "--host", host]
        if with_tcp:
            port = port or server.free_port(hosts, 0)
        argv += ["--port", port, *_defaults(model, passed_on), *passed_on]
        address = server.Address(hosts, port, _value(passed_on, "--api-prefix", "LLAMA_ARG_API_PREFIX"),
                                 bool(_value(passed_on, "--ssl-cert-file", "LLAMA_ARG_SSL_CERT_FILE")
                                      and _value(passed_on, "--ssl-key-file", "LLAMA_ARG_SSL_KEY_FILE")))
        if address.is_public and not (_value(passed_on, "--api-key", "LLAMA_API_KEY")
                                      or _value(passed_on, "--api-key-file", "LLAMA_ARG_API_KEY_FILE")):
            notices.append(f"warning: {host} can be reached by others, and without --api-key or --api-key-file whoever "
                           "connects can use the model and read the slots")
        log = _Log(verbose or _given(passed_on, ("-lv", "--verbosity", "--log-verbosity", "--log-verbose",
                                                 "--log-jsonl"), "LLAMA_ARG_LOG_VERBOSITY"))

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


class _Media:
    """What brings images and sound: the projector that llama-server is told to load.

    Attributes: ``flag`` and its value as the user gave them, "" without; ``nbytes`` of the file, if it is here.

    EdgekvError, naming the flag, if it is the file of something else.
    """

    def __init__(self, passed_on: list[str]):
        from edgekv.media import check_projector

        file = _value(passed_on, ("-mm", "--mmproj"), "LLAMA_ARG_MMPROJ")
        url = _value(passed_on, ("-mmu", "--mmproj-url"), "LLAMA_ARG_MMPROJ_URL")
        self.flag = f"--mmproj-url {url}" if url else f"--mmproj {file}" if file else ""
        # with a URL, the file is where to put what comes from there
        self.nbytes = check_projector(file, "--mmproj").size if file and not url else 0


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
        media: _Media,
        notices: list[str],
        **options: Any,
    ):
        from edgekv.llama import bytes_per_token
        from edgekv.media import refuse_eviction
        from edgekv.memory import default_cache_ram
        from edgekv.rpc import gpu_layers
        from edgekv.session import CACHE_TYPES as GGML_TYPES
        from edgekv.session import default_threads

        o = SimpleNamespace(**options)
        self.model, self.gguf, self.filters, self.n_slots = model, gguf, filters, n_slots
        self.n_threads = o.n_threads or default_threads()
        servers = check_servers(o.rpc, o.n_gpu_layers)
        o.n_gpu_layers = gpu_layers(o.n_gpu_layers, o.rpc)
        # one cache for all slots takes what it is given, otherwise each has its share
        n_caches = 1 if _unified(passed_on) else n_slots
        n_ctx_all = o.n_ctx or gguf.context_length * n_caches
        self.n_ctx = o.n_ctx = _padded(_padded(n_ctx_all) // n_caches)  # of a cache, as llama.cpp rounds it
        rope = _rope(passed_on)
        warn_beyond_training(self.n_ctx, gguf, rope, "-c, tokens of a slot:", tell=notices.append)
        # llama-server answers no further than it takes the model to have been trained
        self.n_ctx_slot = min(self.n_ctx, rope.reach(gguf.context_length, gguf.rope_factor)
                              if rope.scaling_type == ROPE_SCALINGS["yarn"] else gguf.context_length)
        if o.cache_ram is None:
            o.cache_ram = default_cache_ram()

        if filters is not None and o.kv_evict == "none":
            raise EdgekvError(f"--kv-filters {filters}: filters say what an eviction keeps, but --kv-evict none evicts "
                              "nothing: drop one of them")
        is_ours = o.kv_evict == "auto" and o.kv_budget is None  # the decision to evict
        settle(o, gguf, servers, n_slots=n_caches, aside=max(0, o.cache_ram) * _MIB, projector=media.nbytes,
               swa_full=False, swa_checkpoints=True, tell=notices.append)
        if filters is not None and o.kv_evict != "none" and not needs_filters(o.kv_evict):
            raise EdgekvError(f"--kv-filters {filters}: --kv-evict {o.kv_evict} looks at no filters, drop one of them")
        if o.kv_evict != "none":
            if media.flag and is_ours:
                raise refuse_eviction(media.flag, f"--kv-evict auto, which evicts here ({notices[-1]})",
                                      "give a smaller -c or -np, or --kv-evict none")
            if media.flag:
                raise refuse_eviction(media.flag, f"--kv-evict {o.kv_evict}")
            # why it is on belongs before what the server may say against it
            while notices:
                say(notices.pop(0))
        self.eviction = EvictionSettings.resolve(
            o.kv_evict, o.kv_budget, o.kv_window, o.keep or None, n_ctx=self.n_ctx,
            bytes_per_token=bytes_per_token(gguf, o.kv_budget, GGML_TYPES[o.type_k], GGML_TYPES[o.type_v]))

        self._argv = ["-c", n_ctx_all, "-np", n_slots, "-b", o.n_batch, "-ub", o.n_ubatch, "-t", self.n_threads,
                      "-ngl", "all" if o.n_gpu_layers < 0 else o.n_gpu_layers, "-ctk", o.type_k, "-ctv", o.type_v,
                      "-fa", o.flash_attn, "-cram", o.cache_ram]
        wishes = {"--rpc": o.rpc, "--keep": o.keep}
        if o.kv_evict != "none":
            wishes |= {"--kv-evict": o.kv_evict, "--kv-budget": o.kv_budget, "--kv-window": o.kv_window}
        if o.kv_select != "none":
            wishes |= {"--kv-select": o.kv_select, "--kv-select-budget": o.kv_select_budget,
                       "--kv-page-size": o.kv_page_size, "--kv-dense-layers": o.kv_dense_layers}
        for flag, value in wishes.items():
            if value is not None:
                self._argv += [flag, value]
        if o.kv_grouped_attn:
            self._argv.append("--kv-grouped-attn")

    def argv(self, stack: ExitStack) -> list[Any]:
        """The arguments. Filters that are needed and not in the model's file are calibrated if need be, and lie in the
        user's cache folder, or where that cannot be written to in one that goes with ``stack``."""
        path = self._filters_file(stack) if needs_filters(self.eviction.policy) else None
        return [*self._argv, *(["--kv-filters", path] if path else [])]

    def _filters_file(self, stack: ExitStack) -> str | Path | None:
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
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekv-")))
        except OSError:
            raise EdgekvError(f"{self.model}: has no Q-Filters, and neither {kept.parent} nor a temporary folder can be "
                              "written to; edgekv convert --with-qfilters puts them into the file") from None
        save_filters(folder / "filters.gguf", self.gguf, found)
        return folder / "filters.gguf"

    def __str__(self) -> str:
        slots = f"{self.n_slots} slot{'s' if self.n_slots > 1 else ''} of {self.n_ctx_slot:,} tokens"
        evicted = self.eviction.policy != "none"
        return slots + (f", {self.eviction.policy} keeps {self.eviction.budget:,}" if evicted else "")


def _rope(passed_on: list[str]) -> RopeSettings:
    """What llama-server is told about RoPE. EdgekvError, naming the flag, if something is wrong with it."""
    found: dict[str, Any] = {}
    for name, parameter in signature(RopeSettings.resolve).parameters.items():
        flag = "--" + name.replace("_", "-")
        variable = "LLAMA_ARG_" + {"rope_scaling": "rope_scaling_type"}.get(name, name).upper()
        if text := _value(passed_on, flag, variable):
            try:
                found[name] = text if "str" in str(parameter.annotation) else float(text)
            except ValueError:
                raise EdgekvError(f"{flag} {text}: must be a number") from None
    return RopeSettings.resolve(**found)


def _padded(n: int) -> int:
    return -(-n // 256) * 256


def _name(model: str) -> str:
    return Path(model).name.removesuffix(".gguf")


def _defaults(model: str, passed_on: list[str]) -> list[str]:
    """What llama-server does otherwise unless it is told, for whatever the user does not say."""
    defaults = (
        # it would shrink the context, which is decided here
        (("-fit", "--fit"), ("LLAMA_ARG_FIT",), ["-fit", "off"]),
        # each new request would copy the caches of all idle slots
        (("--cache-idle-slots", "--no-cache-idle-slots"),
         ("LLAMA_ARG_CACHE_IDLE_SLOTS", "LLAMA_ARG_NO_CACHE_IDLE_SLOTS"), ["--no-cache-idle-slots"]),
        (("--metrics",), ("LLAMA_ARG_ENDPOINT_METRICS",), ["--metrics"]),
        (("-a", "--alias"), ("LLAMA_ARG_ALIAS",), ["--alias", _name(model).replace(",", "-")]),
    )
    return [word for flags, variables, words in defaults if not _given(passed_on, flags, *variables) for word in words]


def _unified(passed_on: list[str]) -> bool:
    """Whether there is one cache for all slots."""
    for word in reversed(passed_on):
        if _flag(word) in ("-kvu", "--kv-unified"):
            return True
        if _flag(word) in ("-no-kvu", "--no-kv-unified"):
            return False
    if "LLAMA_ARG_NO_KV_UNIFIED" in os.environ:
        return False
    return os.environ.get("LLAMA_ARG_KV_UNIFIED", "").lower() in ("1", "on", "true", "enabled")


def _given(passed_on: list[str], flags: Collection[str], *variables: str) -> bool:
    return any(_flag(word) in flags for word in passed_on) or any(name in os.environ for name in variables)


def _value(passed_on: list[str], names: str | Collection[str], variable: str) -> str:
    """What the user gave llama-server for one of its flags, by any of its names, "" if nothing."""
    names = (names,) if isinstance(names, str) else names
    for flag, value in reversed(list(zip(passed_on, [*passed_on[1:], ""]))):  # the last one counts
        if _flag(flag) in names:
            return value
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
