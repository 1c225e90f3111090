"""The results of an evaluation as tables in the terminal, and conversations with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ..formats.kinds import json_of
from .recall import Case
from .statistics import Row

REPORT = json_of("a report of deltamem eval", {"setup", "rows", "ratios"})


def print_tables(console: Console, rows: Sequence[Row], ratios: Mapping[str, float | str]) -> None:
    """Prints a line for each kind of question, a column for each method; then the ratios."""
    kinds = list(dict.fromkeys((row.task, row.facts, row.distance) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    by_key = {(row.method, row.task, row.facts, row.distance): row for row in rows}
    title, label, cell = "Answers that are right, in % (95 % interval)", 23, 13  # columns of the terminal
    n_fit = max(1, (console.width - label) // cell)
    for some in (methods[i : i + n_fit] for i in range(0, len(methods), n_fit)):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("", width=label - 1)
        for method in some:
            table.add_column(method, justify="right", width=cell - 1)
        for task, facts, distance in kinds:
            detail = f"{distance} tokens" if distance else f"{facts} fact{'s' if facts > 1 else ''}"
            found = (by_key[method, task, facts, distance] for method in some)
            cells = (f"{100 * r.accuracy:.0f} ({100 * r.low:.0f}–{100 * r.high:.0f})" for r in found)
            table.add_row(f"{task.replace('_', ' ')}, {detail}", *cells)
        console.print(table)
    if ratios:
        names = {
            "average": "all tasks, over the backbone with the same window",
            "other": "all tasks, over the best other method with that window",
            "memory_heavy": "tasks that need memory, over the backbone with that window",
            "no_memory": "tasks that need none, over the backbone with that window",
        }
        summary = Table(title=f"Ratios of {ratios['best']}", box=None, show_header=False)
        for name, text in names.items():
            if name in ratios:
                summary.add_row(text, f"{ratios[name]:.2f} ×")
        console.print(summary)


def show(case: Case, answers: Mapping[str, str]) -> None:
    """Prints a conversation, its question and each method's answer."""
    print()
    for user, assistant in case.turns:
        print(f"> {user}\n{assistant}")
    print(f"> {case.question}  [{case.fact.value if case.fact else case.answer}]")
    for method, answer in answers.items():
        print(f"{'+' if case.is_right(answer) else '-'} {method}: {answer}")
