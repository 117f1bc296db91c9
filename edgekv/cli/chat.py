"""``edgekv chat``"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click

from edgekv.cli.common import model_option
from edgekv.cli.options import context_options, open_llama, rope_options, sampling_options, take_grammar, take_sampling
from edgekv.cli.talk import check_grammar, figures, read_text, say, warn_unpinned
from edgekv.errors import EdgekvError


@click.command()
@model_option
@click.option("-sys", "--system-prompt", "system", metavar="TEXT", help="System prompt; never evicted.")
@click.option("-f", "--file", "file", metavar="FILE", type=click.Path(),
              help="A text to read before the first question, as /file does.")
@click.option("--session", "session", metavar="FILE", type=click.Path(), help="Go on with what /save has written.")
@context_options
@rope_options
@sampling_options
@click.pass_context
def chat(ctx: click.Context, model: str, system: str | None, file: str | None, session: str | None, **options: Any) -> None:
    """Talk with MODEL about more than its KV cache holds.

    Filters that MODEL lacks are computed once and kept in the user's cache folder. Ctrl-C stops an answer, Ctrl-D or
    /exit ends the conversation, /help lists what else can be done.
    """
    from edgekv.conversation import Conversation
    from edgekv.progress import PromptBar

    sampling = take_sampling(options)
    sampling["grammar"] = take_grammar(options)
    document = read_text("-f", file) if file is not None else None

    llama = open_llama(model, **options)
    check_grammar(llama, sampling["grammar"])
    llama.on_progress = PromptBar()

    conversation = Conversation(llama, system=system, pin=options["keep"] is None, sampling=sampling)
    warn_unpinned(conversation.unpinned)
    terminal = _Terminal(conversation, [p for p in ctx.command.params if isinstance(p, click.Option)])
    if session is not None:
        terminal.load(session)
    if document is not None:
        terminal.read(file, document)
    terminal.run()


@dataclass(frozen=True)
class _Command:
    argument: str  # how --help calls it, "" if there is none
    help: str
    run: Callable[[str], None]


class _Terminal:
    """Questions in, answers out."""

    def __init__(self, conversation, options: list[click.Option]):
        self._conversation = conversation
        self._llama = conversation.llama
        self._options = {option.name: option for option in options}
        self._commands = {
            "/help": _Command("", "this list", lambda _: self._help()),
            "/file": _Command("PATH", "read a text; the next question is asked behind it", self._file),
            "/regen": _Command("", "another answer to the last question", lambda _: self._say(conversation.regenerate())),
            "/undo": _Command("", "take the last question and its answer back", lambda _: self._undo()),
            "/clear": _Command("", "forget everything but the system prompt", lambda _: self._clear()),
            "/stats": _Command("", "figures of the last answer and of the cache", lambda _: say(figures(self._llama))),
            "/set": _Command("[NAME VALUE]", "show or change how answers are sampled", self._set),
            "/save": _Command("PATH", "write conversation and cache to a file", self._save),
            "/load": _Command("PATH", "go on with what was saved", self.load),
            "/exit": _Command("", "leave, as Ctrl-D does", lambda _: None),
        }

    def run(self) -> None:
        """Until the end of the input or /exit."""
        if sys.stdin.isatty():
            say("Ctrl-C stops an answer, /help lists commands, a line that ends in \\ goes on, Ctrl-D leaves")
        for text in _inputs(list(self._commands)):
            text = text.strip()
            if not text:
                continue
            name, _, argument = text.partition(" ")
            if name == "/exit":
                return
            try:
                if not name.startswith("/") or "\n" in name:
                    self._say(self._conversation.ask(text))
                elif name not in self._commands:
                    raise EdgekvError(f"{name}: unknown command, /help lists them")
                else:
                    command, argument = self._commands[name], argument.strip()
                    if argument and not command.argument:
                        raise EdgekvError(f"{name} takes no argument")
                    if not argument and command.argument and not command.argument.startswith("["):
                        raise EdgekvError(f"{name} needs {command.argument}")
                    command.run(argument)
            except EdgekvError as error:
                say(f"error: {' '.join(str(error).split())}")
            except KeyboardInterrupt:
                say("stopped")

    def read(self, name: str, text: str) -> None:
        """Read a document into the conversation."""
        with self._interruptible():
            n = self._conversation.read(text)
        say(f"{name}: {n:,} tokens read")

    def load(self, path: str) -> None:
        """Go on with a saved conversation."""
        self._conversation.load(path)
        turns = sum(message["role"] == "assistant" for message in self._conversation.messages)
        say(f"{path}: {turns} turns, {self._llama.n_tokens:,} tokens")

    def _say(self, answer: Iterator[str]) -> None:
        try:
            with self._interruptible():
                for piece in answer:
                    click.echo(piece, nl=False)
                    sys.stdout.flush()
        finally:
            answer.close()
            click.echo()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C takes effect between batches, where the cache is in order."""
        before = signal.signal(signal.SIGINT, lambda *_: self._llama.interrupt())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self._llama.on_progress.close()

    def _help(self) -> None:
        for name, command in self._commands.items():
            click.echo(f"  {name + ' ' + command.argument:<20} {command.help}", err=True)

    def _file(self, path: str) -> None:
        self.read(path, read_text("/file", path))

    def _undo(self) -> None:
        question = self._conversation.undo()
        say(f"taken back: {question if len(question) < 60 else question[:20] + ' ... ' + question[-30:]}")

    def _clear(self) -> None:
        self._conversation.clear()
        say("the conversation begins anew")

    def _save(self, path: str) -> None:
        self._conversation.save(path)
        say(f"{path}: saved")

    def _set(self, argument: str) -> None:
        from edgekv.cli.options import SAMPLING

        sampling = self._conversation.sampling
        if not argument:
            for name, theirs in SAMPLING.items():
                value = sampling[theirs]
                click.echo(f"  {name:<20} {-1 if value is None else value}", err=True)
            return
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name not in SAMPLING:
            raise EdgekvError(f"/set {name}: choose one of {', '.join(SAMPLING)}")
        option = self._options[name]
        try:
            sampling.update(take_sampling({name: option.type.convert(value.strip(), option, None)}))
        except click.BadParameter as error:
            raise EdgekvError(f"/set {name}: {error.message}") from None


def _inputs(commands: list[str]) -> Iterator[str]:
    """What the user writes: edited, with history, on a terminal; line by line from a pipe. A line that ends in a backslash
    goes on in the next one."""
    read = _terminal_reader(commands) if sys.stdin.isatty() else _plain_reader
    while True:
        try:
            text = read("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + read(". ")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("Ctrl-D or /exit leaves")
            continue
        yield text


def _plain_reader(_prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _terminal_reader(commands: list[str]) -> Callable[[str], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    from edgekv.pull import cache_dir

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))  # Alt-Enter: a new line
    try:
        folder = cache_dir("chat")
        folder.mkdir(parents=True, exist_ok=True)
        history = FileHistory(str(folder / "history"))
    except OSError:
        history = InMemoryHistory()
    session = PromptSession(history=history, key_bindings=keys, completer=WordCompleter(commands, sentence=True),
                            complete_while_typing=False)
    return session.prompt
