"""`deltamem architectures`: the table of which architectures take an adapter."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..formats.kinds import json_of
from ..formats.outputs import output

if TYPE_CHECKING:
    from rich.console import Console

REPORT = json_of("a report of deltamem architectures", {"version", "statuses", "architectures"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="architecture, named as in general.architecture (all)")
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON (-: standard output)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..runtime.architectures import describe

    err = Console(stderr=True, width=None if sys.stderr.isatty() else 160, highlight=False, markup=False)
    out = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    if args.json == "-":
        out = err
    with output(args.json, REPORT) as write:
        description = describe(args.names)
        _print(out, description)
        write(json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return 0


def _print(console: Console, description: dict[str, Any]) -> None:
    from rich.table import Table

    from ..runtime.architectures import HEADS

    table = Table(box=None, pad_edge=False)
    for column in ("architecture", "", "corrects", "converts", "evidence"):
        table.add_column(column, overflow="fold")
    rows = description["architectures"]
    for row in rows:
        takes = [layer["corrects"] for layer in row["layers"]]
        heads = "".join(head for head in HEADS if any(head in corrects for corrects in takes))
        converts = "".join(head for head in heads if head in row["converts"])
        table.add_row(row["architecture"], row["status"], *map(", ".join, (heads, converts)), _evidence(row))
    console.print(table)
    console.print()
    counts = [(status, sum(row["status"] == status for row in rows)) for status in description["statuses"]]
    said = ", ".join(f"{count} {status}" for status, count in counts if count)
    console.print(f"llama.cpp of llama-cpp-python {description['llama_cpp_python']}: {said}")
    for status, count in counts:
        if count:
            console.print(f"{status}: {description['statuses'][status]}")


def _evidence(row: dict[str, Any]) -> str:
    if row["problem"]:
        return _why(row["problem"].replace("error loading model hyperparameters: ", ""))
    numbers = ""
    if row["verified"]:
        error = max(max(model["logits"], model["state"]) for model in row["verified"])
        numbers = f"{', '.join(model['model'] for model in row['verified'])} in PyTorch: NMSE below {_above(error)}"
    layers = row["layers"]
    refused: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        if layer["reason"]:
            refused.setdefault(_why(layer["reason"]), []).append(i)
    refusals = [
        why if len(which) == len(layers) else f"layer {', '.join(map(str, which))} of {len(layers)}: {why}"
        for why, which in refused.items()
    ]
    return "; ".join([numbers, *refusals] if numbers else refusals)


def _why(reason: str) -> str:
    """The reason of a refusal, without what the row already says."""
    return reason.rpartition("error loading model: ")[2].rpartition(" is not supported: ")[2].rpartition(", but ")[2]


def _above(error: float) -> str:
    """The next power of ten."""
    return f"1e{int(f'{error:e}'.partition('e')[2]) + 1}"
