"""Bars on the terminal: of files that are written, and of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


class progress:
    """A bar on the terminal while files are written: `advance(bytes, bytes in all)`."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        console = Console(stderr=True)  # if this is no terminal, a bar leaves an empty line
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.__enter__()
        task = self._bar.add_task("writing")
        return lambda n, total: self._bar.update(task, completed=n, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)


@contextmanager
def progress_bar(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal. Yields the function that moves it: (what runs, how much is done, of how much)."""
    percent = TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    bar = Progress(*columns, console=err, auto_refresh=False, transient=True, disable=not err.is_terminal)
    with bar:
        task = bar.add_task("")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            bar.refresh()  # drawn by hand: no thread may draw while a run is timed

        yield show
