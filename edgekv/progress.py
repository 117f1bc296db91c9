"""One way to show progress: a bar with time left on a terminal's standard error, nothing elsewhere."""

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
