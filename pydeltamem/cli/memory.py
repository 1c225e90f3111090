"""`deltamem memory`: shows, compares, copies and exports memory files. Needs no llama.cpp."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.table import Column, Table

from ..errors import InputError, printable
from ..formats.memory_file import MemorySnapshot
from ..formats.memory_lock import not_kept_elsewhere
from ..formats.memory_numbers import compare_memories, describe_memory
from .picture import picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")

    show = add("show", "print the adapter of a memory, what each layer holds, and a picture")
    show.add_argument("file", metavar="FILE", help="memory file")
    show.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    diff = add("diff", "compare two memories of one adapter")
    for name in "ab":
        diff.add_argument(name, metavar=name.upper(), help="memory file")
    diff.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    copy = add("copy", "copy a memory to a second file")
    copy.add_argument("source", metavar="FROM", help="memory file")
    copy.add_argument("target", metavar="TO", help="the memory file to write")
    copy.add_argument("--force", action="store_true", help="replace an existing file")
    export = add("export", "export a memory for other programs")
    export.add_argument("file", metavar="FILE", help="memory file")
    export.add_argument("target", metavar="OUT", help="a file that ends in .npz (NumPy) or .json")


def run(args: argparse.Namespace) -> int:
    # a pipe has no width: nothing is folded there
    # names come from files: they are text, not rich's markup
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    if args.action == "show":
        snapshot = MemorySnapshot.load(args.file)
        if args.json:
            print(json.dumps(describe_memory(snapshot), indent=2))
        else:
            _print(console, args.file, snapshot)
    elif args.action == "diff":
        difference = compare_memories(args.a, MemorySnapshot.load(args.a), args.b, MemorySnapshot.load(args.b))
        if args.json:
            print(json.dumps(difference, indent=2))
        else:
            _print_difference(console, difference)
    elif args.action == "copy":
        snapshot = MemorySnapshot.load(args.source)
        with not_kept_elsewhere(args.target):  # a process that holds this file would soon replace the copy
            if os.path.exists(args.target) and not args.force:
                raise InputError(f"{args.target}: exists: name another file, or add --force")
            snapshot.save(args.target)
    else:
        snapshot = MemorySnapshot.load(args.file)
        exporters = {".npz": snapshot.to_npz, ".json": snapshot.to_json}
        suffix = os.path.splitext(args.target)[1]
        if suffix not in exporters:
            raise InputError(f"{args.target}: a memory is exported to a file that ends in .npz or .json")
        exporters[suffix](args.target)
    return 0


def _print(console: Console, path: str, snapshot: MemorySnapshot) -> None:
    metadata = snapshot.metadata
    n_layer, n_head, rank, _ = snapshot.state.shape
    fingerprint = metadata.get("base", "")[:12]
    facts = Table("", Column(overflow="fold"), show_header=False)
    for name, value in {
        "state": f"{n_layer} layers, {n_head} {'head' if n_head == 1 else 'heads'} of rank {rank}",
        "adapter": f"{metadata.get('adapter_name') or 'unnamed'} ({metadata.get('adapter', '')[:12] or 'no checksum'})",
        "base": " ".join(
            filter(None, (metadata.get("architecture"), metadata.get("base_name"), fingerprint and f"({fingerprint})"))
        ),
        "tokens written": f"{snapshot.tokens_written:,}" if "tokens_written" in metadata else None,
        "began": metadata.get("created"),
        "saved": metadata.get("saved"),
    }.items():
        if value:
            facts.add_row(name, printable(value))
    console.print(path, style="bold", soft_wrap=True)  # a table's title would be folded to its width
    console.print(facts)

    leading = min(rank, 3)
    table = Table()
    for name in ("layer", *(["head"] if n_head > 1 else []), "|S|", *["σ₁", "σ₂", "σ₃"][:leading], "rank"):
        table.add_column(name, justify="right", overflow="fold")  # in a narrow terminal no figure is cut
    for row in describe_memory(snapshot)["layers"]:
        for head, (norm, values, effective) in enumerate(
            zip(row["norms"], row["singular_values"], row["effective_ranks"])
        ):
            place = [str(row["layer"]), *([str(head)] if n_head > 1 else [])]
            table.add_row(*place, *(f"{value:.3g}" for value in (norm, *values[:leading])), f"{effective:.1f}")
    console.print("Each state's norm, leading singular values and effective rank.")
    console.print(table)

    largest = float(np.abs(snapshot.state).max())
    coloured = console.color_system is not None and not console.no_color
    legend = "blue negative, red positive" if coloured else "shaded by size, - before what is negative"
    console.print(f"Each state, rows are values, columns are keys; {legend}; the largest value is {largest:.3g}.")
    pictures = [
        picture(state, largest, coloured, f"{layer}" if n_head == 1 else f"{layer}.{head}")
        for layer, heads in zip(snapshot.layers, snapshot.state)
        for head, state in enumerate(heads)
    ]
    console.print(Columns(pictures, padding=(0, 2)))


def _print_difference(console: Console, difference: dict[str, Any]) -> None:
    if difference["identical"]:
        console.print(f"{difference['a']} and {difference['b']} are identical.", soft_wrap=True)
        return
    console.print(f"A: {difference['a']}\nB: {difference['b']}", soft_wrap=True)
    table = Table()
    for name in ("layer", "|A|", "|B|", "|A - B|", "relative", "cosine"):
        table.add_column(name, justify="right", overflow="fold")
    for row in [*difference["layers"], {"layer": "all", **difference["total"]}]:
        numbers = (row[key] for key in ("norm_a", "norm_b", "difference", "relative", "cosine"))
        table.add_row(str(row["layer"]), *(f"{number:.4g}" for number in numbers))
    console.print(table)
