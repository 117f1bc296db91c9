"""Progress: a bar with time left on a terminal's standard error, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int, unit: str = "", show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how much was done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield lambda n: None
        return

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[count]}"),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total, count="")
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            progress.update(task, completed=done, count=f"{done:,} of {total:,} {unit}".rstrip())

        yield advance


class PromptBar:
    """A bar for ``Llama.on_progress``: shown while a prompt is read that is longer than one batch, gone when it is."""

    def __init__(self, label: str = "reading"):
        self._label = label
        self._bar = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and done < total:
            self._bar, self._done = bar(self._label, total, unit="tokens"), 0
            self._advance = self._bar.__enter__()
        if self._bar is not None:
            self._advance(done - self._done)
            self._done = done
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen, wherever it stands."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
