"""`deltamem inspect`: what an adapter, a model, a packed model or a memory file holds. Needs no llama.cpp.

Of a model only the header is read, whatever its size; of an adapter the corrections too, for their norms.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from rich.console import Console
from rich.table import Table

from ..errors import AdapterError, ModelError, named
from ..formats.gguf_header import MAGIC, Header, Tensor
from ..formats.memory_file import MemorySnapshot
from ..hub import fetch, is_name

ADAPTER_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="adapter, model, packed model or memory file, or a name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    description = describe(fetch(args.file) if is_name(args.file) else args.file)
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        _print(description)
    return 0


def describe(path: str) -> dict[str, Any]:
    """What the file holds, as values that JSON can hold. `kind` is adapter, base, packed or memory.

    Raises ModelError, AdapterError or MemoryFileError.
    """
    file = Path(path)
    if os.path.isdir(file):
        raise ModelError(f"{file}: is a folder; give an adapter, model or memory file")
    if not os.path.isfile(file):
        raise ModelError(f"{named(file)}: no such file")
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    common = {"file": str(file), "bytes": file.stat().st_size}
    if not start.startswith(MAGIC):
        if start[8:] != b"{":  # how every safetensors file begins, after the length
            raise ModelError(f"{file}: is neither a GGUF file nor a memory file")
        return {**common, "kind": "memory", "memory": _memory(path)}

    header = Header.of_model(file)
    common |= {"bytes": header.n_bytes, "shards": len(header.files)}
    if header.keys.get("general.type") == "adapter":
        kind = header.keys.get("adapter.type", "unknown")
        if kind != "deltamem":
            raise AdapterError(f"{file}: is an adapter of type '{kind}', not a δ-mem adapter")
        return {**common, "kind": "adapter", "adapter": _adapter(header)}
    if "deltamem.version" in header.keys:
        return {**common, "kind": "packed", "model": _model(header), "adapter": _adapter(header)}
    return {**common, "kind": "base", "model": _model(header)}


def _is_of_adapter(name: str) -> bool:
    return ".deltamem_" in name


def _model(header: Header) -> dict[str, Any]:
    architecture = header.keys.get("general.architecture")
    if architecture is None:
        raise ModelError(f"{header.path}: has no key general.architecture, it is no language model")

    def get(key: str) -> Any:
        return header.keys.get(f"{architecture}.{key}")

    tensors = [tensor for name, tensor in header.tensors.items() if not _is_of_adapter(name)]
    tokens = header.keys.get("tokenizer.ggml.tokens")
    return {
        "architecture": architecture,
        "name": header.keys.get("general.name"),
        "parameters": sum(tensor.n_elements for tensor in tensors),
        "file_type": _file_type(header),
        "layers": get("block_count"),
        "width": get("embedding_length"),
        "heads": get("attention.head_count"),
        "kv_heads": get("attention.head_count_kv"),
        "context": get("context_length"),
        "vocabulary": len(tokens) if isinstance(tokens, list) else get("vocab_size"),
        "tensor_types": _tensor_types(tensors),
    }


def _adapter(header: Header) -> dict[str, Any]:
    version = header.keys.get("deltamem.version")
    if version != ADAPTER_VERSION:
        raise AdapterError(
            f"{header.path}: has adapter version {version}, this release reads {ADAPTER_VERSION}: upgrade pydeltamem"
        )

    def get(key: str, kind: GGUFValueType, is_list: bool = False) -> Any:
        key = f"deltamem.{key}"
        if key not in header.keys:
            raise AdapterError(f"{header.path}: has no key {key}, the adapter is damaged")
        if header.types[key] != kind or isinstance(header.keys[key], list) != is_list:
            raise AdapterError(f"{header.path}: has key {key} of an unexpected type, the adapter is damaged")
        return header.keys[key]

    u32, string, flag = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.BOOL
    layers, corrected = get("layers", u32, True), get("delta_heads", string, True)
    norms = []
    for layer in layers:
        row: dict[str, Any] = {"layer": layer}
        for head in corrected:
            name = f"blk.{layer}.deltamem_{head}.weight"
            if name not in header.tensors:
                raise AdapterError(f"{header.path}: has no tensor {name}, the adapter is damaged")
            row[head] = _norm(header.read(name))
        norms.append(row)

    no_lambda = get("update_mode", string) == "no_lambda"
    return {
        "version": version,
        "architecture": header.keys.get("general.architecture"),
        "name": header.keys.get("deltamem.packed.general.name", header.keys.get("general.name")),
        "rank": get("rank", u32),
        "heads": get("head_count", u32),
        "alpha": get("alpha", GGUFValueType.FLOAT32),
        "update_mode": get("update_mode", string),
        "gates": "per row" if get("rankwise_gates", flag) else "per head",
        "lambda": "none" if no_lambda else "1 - beta" if get("couple_lambda", flag) else "its own projection",
        "normalize_qk": get("normalize_qk", flag),
        "write_granularity": get("write_granularity", string),
        "delta_heads": corrected,
        "o_norm_epsilon": header.keys.get("deltamem.o_norm_epsilon"),
        "layers": layers,
        "base_layers": get("base.block_count", u32),
        "base_width": get("base.embedding_length", u32),
        "source": header.keys.get("deltamem.source.name"),
        "source_sha256": header.keys.get("deltamem.source.sha256"),
        "tensor_types": _tensor_types(tensor for name, tensor in header.tensors.items() if _is_of_adapter(name)),
        "correction_norms": norms,
    }


def _memory(path: str) -> dict[str, Any]:
    memory = MemorySnapshot.load(path)
    metadata = memory.metadata
    saved = metadata.get("saved") or metadata.get("created")
    return {
        "shape": list(memory.state.shape),
        "heads": memory.state.shape[1],
        "rank": memory.state.shape[2],
        "layers": memory.layers,
        "architecture": metadata.get("architecture"),
        "base": metadata.get("base_name"),
        "adapter": metadata.get("adapter_name"),
        "adapter_sha256": metadata.get("adapter"),
        "tokens_written": memory.tokens_written if "tokens_written" in metadata else None,
        "created": metadata.get("created"),
        "saved": saved,
        "age_seconds": _age(saved),
        "norms": [{"layer": layer, "norm": _norm(state)} for layer, state in zip(memory.layers, memory.state)],
    }


def _norm(values: np.ndarray) -> float | None:
    """Frobenius norm, None if the values are not finite (JSON has no such number)."""
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        norm = float(np.linalg.norm(values.astype(np.float64)))
    return norm if np.isfinite(norm) else None


def _tensor_types(tensors: Iterable[Tensor]) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = types.setdefault(tensor.type_name, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.n_bytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))


def _file_type(header: Header) -> str | None:
    number = header.keys.get("general.file_type")
    try:
        return None if number is None else gguf.LlamaFileType(number).name.replace("MOSTLY_", "").replace("ALL_", "")
    except ValueError:
        return str(number)


def _age(created: str | None) -> int | None:
    try:
        date = datetime.datetime.fromisoformat(created or "")
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return max(0, int((datetime.datetime.now(datetime.timezone.utc) - date).total_seconds()))


# tables


def _print(description: dict[str, Any]) -> None:
    # a pipe has no width: there nothing is folded
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
            "writes": f"per {adapter['write_granularity'].replace('_', ' ')}",
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
            table.add_row(name, str(value))
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
        table.add_column(column, justify="right" if i else "left")
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
