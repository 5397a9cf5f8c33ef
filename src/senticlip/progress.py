"""Progress bars in one style for all long tasks; none if stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

Row = TypeVar("Row")

console = Console(stderr=True, markup=False, emoji=False)  # file names may contain brackets and :x:


def bar(**options: Any) -> Progress:
    """A rich progress bar on stderr with the time left."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_interactive, **options)


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports progress through a callback (done, total)."""
    with bar(transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def track(rows: Iterable[Row], what: str, total: int) -> Iterator[Row]:
    """Yield the rows, counting them with a bar."""
    with bar(transient=True) as progress:
        yield from progress.track(rows, total=total, description=what)


def spinner(what: str) -> Status:
    """A spinner for work whose progress is not known."""
    return console.status(Text(what))
