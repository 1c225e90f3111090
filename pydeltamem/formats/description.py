"""What an adapter, a model, a packed model or a memory file holds, as values that JSON can hold. Needs no llama.cpp.

Reads only the header of a model, whatever its size; of an adapter also the corrections, for their norms.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from ..errors import AdapterError, ModelError, no_file, shown
from .gguf_header import MAGIC, Header, Tensor
from .memory_file import MemorySnapshot
from .packed import OF_ADAPTER
from .pointer import refuse_pointer

ADAPTER_VERSION = 1


def describe(path: str) -> dict[str, Any]:
    """What the file holds, as values that JSON can hold. `kind` is adapter, base, packed or memory.

    Raises ModelError, AdapterError or MemoryFileError.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise ModelError(no_file(file, "adapter, model or memory file"))
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    common = {"file": str(file), "bytes": file.stat().st_size}
    refuse_pointer(file, ModelError)
    if not start.startswith(MAGIC):
        if start[8:] != b"{":  # a safetensors file begins so, after the length
            raise ModelError(f"{file}: is neither a GGUF file nor a memory file")
        return {**common, "kind": "memory", "memory": _memory(path)}

    header = Header.of_model(file)
    common |= {"bytes": header.n_bytes, "shards": len(header.files)}
    if header.keys.get("general.type") == "adapter":
        kind = header.keys.get("adapter.type", "unknown")
        if kind != "deltamem":
            raise AdapterError(f"{file}: is an adapter of type '{shown(kind)}', not a δ-mem adapter")
        return {**common, "kind": "adapter", "adapter": _adapter(header)}
    if "deltamem.version" in header.keys:
        return {**common, "kind": "packed", "model": _model(header), "adapter": _adapter(header)}
    return {**common, "kind": "base", "model": _model(header)}


def _model(header: Header) -> dict[str, Any]:
    architecture = header.keys.get("general.architecture")
    if architecture is None:
        raise ModelError(f"{header.path}: has no key general.architecture, it is no language model")

    def get(key: str) -> Any:
        return header.keys.get(f"{architecture}.{key}")

    tensors = [tensor for name, tensor in header.tensors.items() if OF_ADAPTER not in name]
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
            f"{header.path}: has adapter version {shown(version)}, this release reads {ADAPTER_VERSION}: upgrade"
            " pydeltamem"
        )

    def get(key: str, kind: GGUFValueType, is_list: bool = False) -> Any:
        key = f"deltamem.{key}"
        if key not in header.keys:
            raise AdapterError(f"{header.path}: has no key {key}, the adapter is damaged")
        if header.types[key] != kind or isinstance(header.keys[key], list) != is_list:
            raise AdapterError(f"{header.path}: has key {key} of an unexpected type, the adapter is damaged")
        value = header.keys[key]
        if isinstance(value, float) and not math.isfinite(value):
            raise AdapterError(f"{header.path}: has {key} = {value}, the adapter is damaged")
        return value

    u32, f32, string, flag = (getattr(GGUFValueType, name) for name in ("UINT32", "FLOAT32", "STRING", "BOOL"))
    layers, corrected = get("layers", u32, True), get("delta_heads", string, True)
    if layers != sorted(set(layers)):
        raise AdapterError(f"{header.path}: has layers in deltamem.layers that do not ascend, the adapter is damaged")
    no_lambda = get("update_mode", string) == "no_lambda"
    return {
        "version": version,
        "architecture": header.keys.get("general.architecture"),
        "name": header.keys.get("deltamem.packed.general.name", header.keys.get("general.name")),
        "rank": get("rank", u32),
        "heads": get("head_count", u32),
        "alpha": get("alpha", f32),
        "update_mode": get("update_mode", string),
        "gates": "per row" if get("rankwise_gates", flag) else "per head",
        "lambda": "none" if no_lambda else "1 - beta" if get("couple_lambda", flag) else "its own projection",
        "normalize_qk": get("normalize_qk", flag),
        "write_granularity": get("write_granularity", string),
        "delta_heads": corrected,
        "o_norm_epsilon": get("o_norm_epsilon", f32) if "deltamem.o_norm_epsilon" in header.keys else None,
        "layers": layers,
        "base_layers": get("base.block_count", u32),
        "base_width": get("base.embedding_length", u32),
        "source": header.keys.get("deltamem.source.name"),
        "source_sha256": header.keys.get("deltamem.source.sha256"),
        "tensor_types": _tensor_types(tensor for name, tensor in header.tensors.items() if OF_ADAPTER in name),
        "correction_norms": _correction_norms(header, layers, corrected),
    }


def _correction_norms(header: Header, layers: list[int], heads: list[str]) -> list[dict[str, Any]]:
    """The norm of each correction of these heads, layer by layer."""
    norms = []
    for layer in layers:
        row: dict[str, Any] = {"layer": layer}
        for head in heads:
            name = f"blk.{layer}.deltamem_{head}.weight"
            if name not in header.tensors:
                raise AdapterError(f"{header.path}: has no tensor {shown(name)}, the adapter is damaged")
            row[head] = _norm(header.read(name))
        norms.append(row)
    return norms


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


def writes_of(granularity: str) -> str:
    """When an adapter of this deltamem.write_granularity writes, in words."""
    if granularity == "token_deferred":
        return "per token, read from the next turn on"
    if granularity == "reply_deferred":
        return "per token, read by replies from the next turn on"
    return f"per {granularity.replace('_', ' ')}"


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
