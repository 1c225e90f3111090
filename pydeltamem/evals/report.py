"""The results of an evaluation: as tables in the terminal, as JSON, and single conversations with their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from ..formats.kinds import json_of
from .bootstrap import Estimate
from .case import Case
from .statistics import Row

REPORT = json_of("a report of deltamem eval", {"setup", "rows", "ratios"})
RATIOS = {
    "average": "memory and window, all tasks, over the backbone with that window",
    "other": "memory and window, all tasks, over the best other method with that window",
    "memory_heavy": "memory and window, tasks that need memory, over the backbone with that window",
    "no_memory": "memory and window, tasks that need none, over the backbone with that window",
    "full": "memory and full text, all tasks, over the backbone with the full text",
}


def as_json(
    setup: Mapping[str, Any],
    rows: Sequence[Row],
    ratios: Mapping[str, Mapping[str, Estimate]],
    cases: Sequence[Case],
    answers: Mapping[str, Sequence[str]],
) -> str:
    asked = [
        {
            "task": case.task,
            "kind": case.kind,
            "question": case.question,
            "values": case.values,
            "answers": {method: given[i] for method, given in answers.items()},
            "right": [method for method, given in answers.items() if case.is_right(given[i])],
        }
        for i, case in enumerate(cases)
    ]
    of_memories = {memory: {name: _plain(of) for name, of in found.items()} for memory, found in ratios.items()}
    report = {"setup": setup, "rows": [asdict(row) for row in rows], "ratios": of_memories, "answers": asked}
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def print_tables(console: Console, rows: Sequence[Row], ratios: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Prints a line for each kind of question, a column for each method; then the ratios."""
    kinds = list(dict.fromkeys((row.task, row.kind) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    by_key = {(row.method, row.task, row.kind): row for row in rows}
    title, label = "Answers that are right, in % (95 % interval)", 30  # columns of the terminal
    cell = 1 + max(12, *map(len, methods))
    n_fit = max(1, (console.width - label) // cell)
    for some in (methods[i : i + n_fit] for i in range(0, len(methods), n_fit)):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("", width=label - 6)
        table.add_column("n", width=5, justify="right")
        for method in some:
            table.add_column(method, justify="right", width=cell - 1)
        for task, kind in kinds:
            found = [by_key[method, task, kind] for method in some]
            cells = (f"{100 * r.accuracy:.0f} ({100 * r.low:.0f}–{100 * r.high:.0f})" for r in found)
            table.add_row(name_of(task, kind), str(found[0].n), *cells)
        console.print(table)
    if ratios:
        summary = Table("", *ratios, title="Ratios (95 % interval)", title_justify="left", box=None)
        for name, text in RATIOS.items():
            row = [str(found[name]) if name in found else "" for found in ratios.values()]
            if any(row):
                summary.add_row(text, *row)
        console.print(summary)


def name_of(task: str, kind: str) -> str:
    """What a kind of question is called."""
    return f"{task.replace('_', ' ')}, {kind}" if kind else task.replace("_", " ")


def _plain(ratio: Estimate) -> dict[str, float | None]:
    """null is infinite, which JSON does not have."""
    found = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def show(case: Case, answers: Mapping[str, str], out: TextIO) -> None:
    """Prints a conversation, its question and each method's answer."""
    print(file=out)
    for user, assistant in case.turns:
        print(f"> {user}\n{assistant}", file=out)
    print(f"> {case.question}  [{' / '.join(case.values) or 'was not told'}]", file=out)
    for method, answer in answers.items():
        print(f"{'+' if case.is_right(answer) else '-'} {method}: {answer}", file=out)
