"""The ``edgekv`` command.

Subcommands are imported when they are used, so that ``edgekv --help`` and ``edgekv inspect`` do not load the native
library. Every expected failure ends here, as one line on standard error and an exit status that is not 0: 1 for
errors, 2 for wrong usage, 130 for Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any, NoReturn, Sequence

import click

from edgekv.errors import EdgekvError

# name -> one line for --help, so that listing the commands imports none of them
COMMANDS = {
    "pull": "Fetch a model and print its path.",
    "calibrate": "Compute Q-Filters for a model.",
    "convert": "Write a model or checkpoint as GGUF with Q-Filters in its metadata.",
    "filters": "Export Q-Filters and compare them.",
    "chat": "Talk with a model about more than its KV cache holds.",
    "run": "Answer a prompt with a bounded KV cache.",
    "serve": "Answer OpenAI's API for a model, with a bounded KV cache.",
    "inspect": "Show a model's Q-Filters and what its KV cache costs.",
    "plan": "Work out what memory a model and its cache take, and which flags make them fit.",
    "bench": "Measure speed and memory across settings.",
    "eval": "Measure what compression costs: answers found, loss, divergence, attention held.",
    "rpc-server": "Compute layers for an edgekv on another machine.",
    "doctor": "Show which devices there are, what runs where, and why something is not used.",
}


_MEDIA = ("--mmproj", "--mmproj-url", "--image", "--audio", "--video")  # of llama.cpp's programs that read more than texts


def _fail(message: object, status: int) -> NoReturn:
    line = " ".join(str(message).split())
    try:
        click.echo(f"edgekv: error: {line}", err=True)
    except OSError:
        pass  # nobody listens
    sys.exit(status)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        name = name.replace("-", "_")
        module = f"edgekv.cli.{name}"
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as e:
            if e.name != module:
                raise
            raise EdgekvError(f"edgekv {name} is not part of this installation") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        try:
            status = super().main(args, prog_name or "edgekv", **extra)
            sys.stdout.flush()  # a closed pipe shows here rather than at the interpreter's exit
            sys.exit(status if isinstance(status, int) else 0)
        except click.UsageError as e:
            if type(e).__name__ == "NoArgsIsHelpError":
                click.echo(e.format_message(), err=True)
                sys.exit(2)
            command = e.ctx.command_path if e.ctx else "edgekv"
            if isinstance(e, click.NoSuchOption) and e.option_name in _MEDIA and command.split()[-1] in ("run", "chat"):
                _fail(f"{e.option_name}: {command} reads texts; edgekv serve MODEL --mmproj FILE takes images and sound", 2)
            _fail(f"{e.format_message().rstrip('.')}; see {command} --help", 2)
        except (click.Abort, KeyboardInterrupt):
            _debug()
            _fail("interrupted", 130)
        except click.ClickException as e:
            _fail(e.format_message(), 1)
        except EdgekvError as e:
            _debug()
            _fail(e, 1)
        except MemoryError:
            _debug()
            _fail("out of memory", 1)
        except OSError as e:
            if e.filename is None and e.errno in (errno.EPIPE, errno.ENOSPC):
                # what is still buffered goes nowhere: flushing it at the interpreter's exit would change the status
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if e.errno == errno.EPIPE:  # the reader has gone: nothing to say
                sys.exit(1)
            if e.filename is None and e.errno != errno.ENOSPC:
                raise
            _debug()
            _fail(f"{e.filename or 'standard output'}: {e.strerror or e}", 1)


def _debug() -> None:
    """With EDGEKV_DEBUG=1, show the traceback of an expected failure."""
    if os.environ.get("EDGEKV_DEBUG", "0") not in ("", "0"):
        raise


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from edgekv import __version__

        click.echo(f"edgekv {__version__}")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
              help="Show the version and exit.")
def main() -> None:
    """Long contexts in a bounded KV cache: llama.cpp that keeps the tokens future queries will read."""
