"""Bars on the terminal: of files that are written, and of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def writing_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar while files are written. Yields the function that moves it: (bytes, bytes in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)  # if this is no terminal, a bar leaves an empty line
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing")
        yield lambda n, total: bar.update(task, completed=n, total=total)


@contextmanager
def timing_bar(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar while runs are timed. Yields the function that moves it: (what runs, how much is done, of how much)."""
    percent = TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    bar = Progress(*columns, console=err, auto_refresh=False, transient=True, disable=not err.is_terminal)
    with bar:
        task = bar.add_task("")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            bar.refresh()  # drawn by hand: no thread may draw while a run is timed

        yield show
