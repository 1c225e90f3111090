"""`deltamem inspect`: the tables of what a file holds. Needs no llama.cpp."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import InputError, printable
from ..formats.checkpoint import CONFIG
from ..formats.description import describe, writes_of
from ..hub import adapter_file, fetch, is_name, model_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="adapter, model, packed model or memory file, or a name")
    parser.add_argument(
        "--base", metavar="MODEL", help="convert the PyTorch adapter FILE for this model, a name or a GGUF"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _file(name: str, base: str | None) -> str:
    """The file that a name, or a PyTorch directory, stands for."""
    if base is not None:
        return adapter_file(name, model_file(base))
    path = fetch(name) if is_name(name) else name
    if os.path.isfile(os.path.join(path, CONFIG)):
        raise InputError(f"{name}: is a PyTorch adapter, which must be converted for its model: add --base MODEL")
    return model_file(path) if os.path.isfile(os.path.join(path, "config.json")) else path


def run(args: argparse.Namespace) -> int:
    description = describe(_file(args.file, args.base))
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        _print(description)
    return 0


def _print(description: dict[str, Any]) -> None:
    # a pipe has no width: nothing is folded there
    # names come from files: they are text, not rich's markup
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    titles = {
        "adapter": "δ-mem adapter",
        "base": "base model",
        "packed": "model with a δ-mem adapter",
        "memory": "memory",
    }
    shards = description.get("shards", 1)
    _values(
        console,
        {
            "file": description["file"],
            "kind": titles[description["kind"]],
            "size": _size(description["bytes"]) + (f" in {shards} shards" if shards > 1 else ""),
        },
    )
    if "model" in description:
        _print_model(console, description["model"])
    if "adapter" in description:
        _print_adapter(console, description["adapter"])
    if "memory" in description:
        _print_memory(console, description["memory"])


def _print_model(console: Console, model: dict[str, Any]) -> None:
    _values(
        console,
        {
            "architecture": model["architecture"],
            "name": model["name"],
            "parameters": f"{model['parameters']:,}",
            "file type": model["file_type"],
            "layers": model["layers"],
            "width": model["width"],
            "heads": _span(model["heads"]),
            "key-value heads": _span(model["kv_heads"]),
            "context": model["context"],
            "vocabulary": model["vocabulary"],
        },
        "Model",
    )
    _types(console, model["tensor_types"])


def _print_adapter(console: Console, adapter: dict[str, Any]) -> None:
    epsilon = adapter["o_norm_epsilon"]
    _values(
        console,
        {
            "name": adapter["name"],
            "for": f"{adapter['architecture']}, {adapter['base_layers']} layers, width {adapter['base_width']}",
            "layers": f"{len(adapter['layers'])}: {_ranges(adapter['layers'])}",
            "heads × rank": f"{adapter['heads']} × {adapter['rank']}",
            "alpha": f"{adapter['alpha']:g}",
            "update mode": adapter["update_mode"],
            "gates": adapter["gates"],
            "λ": adapter["lambda"].replace("beta", "β"),
            "keys and queries": "tanh, then l2-normalised" if adapter["normalize_qk"] else "as projected",
            "writes": writes_of(adapter["write_granularity"]),
            "corrects": ", ".join(adapter["delta_heads"])
            + ("" if epsilon is None else f" (o by RMS norm, ε {epsilon:g})"),
            "converted from": adapter["source"],
            "sha256": adapter["source_sha256"],
            "format version": adapter["version"],
        },
        "Adapter",
    )
    _types(console, adapter["tensor_types"])
    table = _numbers("Norms of the corrections", "layer", *(f"|Δ{head}|" for head in adapter["delta_heads"]))
    for row in adapter["correction_norms"]:
        table.add_row(str(row["layer"]), *(_number(row[head]) for head in adapter["delta_heads"]))
    _show(console, table)


def _print_memory(console: Console, memory: dict[str, Any]) -> None:
    age = memory["age_seconds"]
    _values(
        console,
        {
            "state [L, H, r, r]": " × ".join(map(str, memory["shape"])),
            "layers": _ranges(memory["layers"]),
            "architecture": memory["architecture"],
            "base": memory["base"] or None,
            "adapter": memory["adapter"],
            "its sha256": memory["adapter_sha256"],
            "tokens written": memory["tokens_written"],
            "began": memory["created"],
            "saved": memory["saved"] and memory["saved"] + ("" if age is None else f", {_duration(age)} ago"),
        },
        "Memory",
    )
    table = _numbers("Norms of the states", "layer", "|S|")
    for row in memory["norms"]:
        table.add_row(str(row["layer"]), _number(row["norm"]))
    _show(console, table)


def _values(console: Console, values: dict[str, Any], title: str | None = None) -> None:
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value is not None:
            table.add_row(name, printable(str(value)))
    _show(console, table)


def _types(console: Console, types: dict[str, dict[str, int]]) -> None:
    if not types:
        return
    table = _numbers("Tensors", "type", "tensors", "size")
    for name, row in types.items():
        table.add_row(name, str(row["tensors"]), _size(row["bytes"]))
    _show(console, table)


def _show(console: Console, table: Table) -> None:
    title, table.title = table.title, None
    table.box, table.pad_edge = None, False
    if title:
        console.print()
        console.print(title, style="bold")
    console.print(table)


def _numbers(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(printable(column), justify="right" if i else "left")
    return table


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _size(n_bytes: int) -> str:
    size, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{n_bytes} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers, runs of them as first-last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _span(value: Any) -> Any:
    """A value per layer, as its smallest and largest."""
    if not isinstance(value, list) or not value:
        return value
    low, high = min(value), max(value)
    return low if low == high else f"{low} to {high}"


def _duration(seconds: int) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            n = seconds // length
            return f"{n} {unit}{'s' if n > 1 else ''}"
    return f"{seconds} s"
