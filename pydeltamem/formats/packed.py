"""Packs base and adapter into one GGUF that loads as one model, and unpacks it again.

The base's keys and tensors come first, as they are; the adapter's follow. Keys of the adapter that are not `deltamem.…`
are kept as `deltamem.packed.…`, so that unpacking gives back both files byte for byte. Only headers are
held in RAM. Inputs and the packed model may be in shards, as llama-gguf-split makes them.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf

from ..errors import AdapterError, InputError, ModelError, shown
from .base_model import Base
from .disk_errors import disk_errors
from .gguf_header import MAGIC, Header, Tensor
from .kinds import ADAPTER, MODEL, SHARD, Kind
from .outputs import refuse_inputs, writing

PREFIX = "deltamem."
OTHERS = "deltamem.packed."  # prefix of the adapter's other keys
OF_ADAPTER = ".deltamem_"  # in the names of its tensors
SPLIT = "split."  # prefix of the keys that describe shards
PIECE = 8 << 20  # bytes that are copied at a time
MAX_SHARDS = 65535  # split.count has 16 bits
MAX_ALIGNMENT = 1 << 20  # of an adapter, bytes: more would only be padding


class Part(NamedTuple):
    """What one file gets: its keys as bytes, its tensors, and its kind."""

    keys: list[bytes]
    tensors: list[Tensor]
    version: int
    alignment: int
    kind: Kind


def pack(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    advance: Callable[[int, int], None] = lambda n, total: None,
    max_size: int | None = None,
    max_tensors: int | None = None,
) -> list[Path]:
    """Writes base and adapter as one model, in one step. Calls `advance(bytes, bytes in all)` meanwhile.

    With max_size (bytes of tensors) or max_tensors it writes shards: for `x.gguf`, x-00001-of-0000N.gguf and so on.
    Returns the files that it wrote.

    Raises ModelError or AdapterError if they are damaged or do not belong together, InputError if `path` is one of
    them, OutputError if it cannot be written.
    """
    model, weights = Header.of_model(base), Header(adapter)
    if model.keys.get("general.type") == "adapter":
        raise ModelError(f"{model.path}: is an adapter, not a model: give the base first, then the adapter")
    if "deltamem.version" in model.keys:
        raise ModelError(f"{model.path}: is packed already: unpack it first")
    if weights.keys.get("adapter.type") != "deltamem":
        raise AdapterError(f"{weights.path}: is no δ-mem adapter")
    _check_names(model, weights)
    _check_fit(Base(base), weights)
    in_shards = max_size is not None or max_tensors is not None
    merged = len(model.files) == 1 and not in_shards  # may have such keys, which then mean nothing
    keys = [_key(model, key) for key in model.keys if merged or not key.startswith(SPLIT)]
    keys += [_key(weights, key, key if key.startswith(PREFIX) else OTHERS + key) for key in weights.keys]
    tensors = [*model.tensors.values(), *weights.tensors.values()]
    if not in_shards:
        parts = {Path(path): Part(keys, tensors, model.version, model.alignment, MODEL)}
    else:
        parts = _shards(path, keys, tensors, model, max_size, max_tensors)
    for part in parts:
        refuse_inputs(part, (*model.files, weights.path))
    _write(parts, advance)
    return list(parts)


def n_packed(path: str | os.PathLike[str]) -> int:
    """Parameters of the adapter in a packed model, which llama.cpp counts with the base's. Raises ModelError."""
    return sum(tensor.n_elements for name, tensor in Header.of_model(path).tensors.items() if OF_ADAPTER in name)


def _check_names(model: Header, weights: Header) -> None:
    """Raises ModelError or AdapterError if one has names that belong to the other, of which a file would have two."""
    for name in model.keys:
        if name.startswith(PREFIX):
            raise ModelError(f"{model.path}: has key {shown(name)} of an adapter: it is no base model")
    for name in model.tensors:
        if OF_ADAPTER in name:
            raise ModelError(f"{model.path}: has tensor {shown(name)} of an adapter: it is no base model")
    for name in weights.keys:
        if name.startswith(OTHERS):
            raise AdapterError(f"{weights.path}: has key {shown(name)} of a packed model: convert the adapter again")
    for name in weights.tensors:
        if OF_ADAPTER not in name:
            raise AdapterError(f"{weights.path}: has tensor {shown(name)} of no adapter: convert it again")


def _check_fit(base: Base, weights: Header) -> None:
    """Raises AdapterError if the adapter is for another model, as loading it would."""
    for key, mine, theirs in (
        ("architecture", base.architecture, weights.keys.get("general.architecture")),
        ("embedding_length", base.n_embd, weights.keys.get("deltamem.base.embedding_length")),
        ("block_count", base.n_layer, weights.keys.get("deltamem.base.block_count")),
    ):
        if mine != theirs:
            raise AdapterError(
                f"{weights.path}: is for another model than {base.path}: {key} {shown(theirs)}, not {shown(mine)}"
            )
    for i, layer in enumerate(base.layers):
        for head in "qkvo":
            tensor = weights.tensors.get(f"blk.{i}.deltamem_{head}.weight")
            if tensor and tensor.shape[0] != layer.rows(head):
                raise AdapterError(
                    f"{weights.path}: is for another model than {base.path}: {tensor.name} has {tensor.shape[0]} rows, "
                    f"the projection {layer.rows(head)}"
                )


def unpack(
    packed: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    advance: Callable[[int, int], None] = lambda n, total: None,
) -> None:
    """Writes the base and the adapter of a packed model, both or none. Raises ModelError if it is not one,
    InputError and OutputError as `pack`.
    """
    model = Header.of_model(packed)
    if "deltamem.version" not in model.keys or model.keys.get("general.type") == "adapter":
        raise ModelError(f"{model.path}: is no packed model")
    for path in (base, adapter):
        refuse_inputs(path, model.files)
    if os.path.realpath(base) == os.path.realpath(adapter):
        raise InputError(f"{os.fspath(base)}: names both the base and the adapter: name two files")

    first = next(i for i, key in enumerate(model.keys) if key.startswith(PREFIX))
    of_base = [  # the keys of the shards themselves come last
        _key(model, key)
        for i, key in enumerate(model.keys)
        if not key.startswith(PREFIX) and (i < first or not key.startswith(SPLIT))
    ]
    of_adapter = [_key(model, key, key.removeprefix(OTHERS)) for key in model.keys if key.startswith(PREFIX)]
    tensors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, tensor in model.tensors.items():
        tensors[OF_ADAPTER in name].append(tensor)
    alignment = model.keys.get(OTHERS + "general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelError(
            f"{model.path}: is damaged: {OTHERS}general.alignment is {shown(alignment)}, no power of two up to "
            f"{MAX_ALIGNMENT}: pack it again"
        )
    parts = {
        Path(base): Part(of_base, tensors[0], model.version, model.alignment, MODEL),
        Path(adapter): Part(of_adapter, tensors[1], gguf.GGUF_VERSION, alignment, ADAPTER),
    }
    _write(parts, advance)


def _shards(
    path: str | os.PathLike[str],
    keys: list[bytes],
    tensors: list[Tensor],
    model: Header,
    max_size: int | None,
    max_tensors: int | None,
) -> dict[Path, Part]:
    """The parts of a model in shards: keys in the first, tensors in order. A tensor above max_size gets its own."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        padded = _padded(tensor.n_bytes, model.alignment)
        full = size + padded > max_size if max_size is not None else len(shards[-1]) == max_tensors
        if full and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += padded
    n = len(shards)
    if n > MAX_SHARDS:
        raise InputError(f"{os.fspath(path)}: that makes {n} shards, more than {MAX_SHARDS}: make them larger")
    path = Path(path)
    parts = {}
    for i, shard in enumerate(shards):
        of_shard = keys if i == 0 else []
        if i and model.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            of_shard = [_scalar("general.alignment", "I", gguf.GGUFValueType.UINT32, model.alignment)]
        of_shard = [
            *of_shard,
            _scalar("split.no", "H", gguf.GGUFValueType.UINT16, i),
            _scalar("split.count", "H", gguf.GGUFValueType.UINT16, n),
            _scalar("split.tensors.count", "i", gguf.GGUFValueType.INT32, len(tensors)),
        ]
        file = path.with_name(f"{path.name.removesuffix('.gguf')}-{i + 1:05}-of-{n:05}.gguf")
        parts[file] = Part(of_shard, shard, model.version, model.alignment, SHARD)
    return parts


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _key(header: Header, key: str, name: str | None = None) -> bytes:
    """A key with its value as in the file, perhaps under another name."""
    start, end = header.spans[key]
    with open(header.path, "rb") as file:
        file.seek(start)
        return _string(name or key) + file.read(end - start)


def _scalar(key: str, letter: str, kind: gguf.GGUFValueType, value: int) -> bytes:
    return _string(key) + struct.pack(f"<I{letter}", int(kind), value)


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _entry(tensor: Tensor, offset: int) -> bytes:
    dims = tensor.shape[::-1]
    return _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, int(tensor.type), offset)


def _write(parts: dict[Path, Part], advance: Callable[[int, int], None]) -> None:
    """Writes the files, all or none."""
    tensors = [tensor for part in parts.values() for tensor in part.tensors]
    for tensor in tensors:
        if tensor.n_bytes == 0 and tensor.n_elements:
            raise ModelError(f"{tensor.path}: tensor {tensor.name} is of a type that is too new: upgrade gguf")
    done, total = 0, sum(tensor.n_bytes for tensor in tensors)
    with contextlib.ExitStack() as stack:
        # the files get their names when all are written, the first shard last
        temporaries = [stack.enter_context(writing(path, part.kind)) for path, part in parts.items()]
        for temporary, (path, part) in zip(temporaries, parts.items()):
            with disk_errors(path), open(temporary, "wb") as out:
                for n in _written(out, part):
                    done += n
                    advance(done, total)


def _written(out: BinaryIO, part: Part) -> Iterable[int]:
    """Writes a file. Yields bytes of tensors as they are written."""
    entries, offset = [], 0
    for tensor in part.tensors:
        entries.append(_entry(tensor, offset))
        offset += _padded(tensor.n_bytes, part.alignment)
    out.write(MAGIC + struct.pack("<IQQ", part.version, len(part.tensors), len(part.keys)))
    for data in (*part.keys, *entries):
        out.write(data)
    out.write(bytes(-out.tell() % part.alignment))
    for tensor in part.tensors:
        with open(tensor.path, "rb") as source:
            source.seek(tensor.offset)
            yield from _copied(source, out, tensor.n_bytes)
        out.write(bytes(-tensor.n_bytes % part.alignment))


def _copied(source: BinaryIO, out: BinaryIO, n_bytes: int) -> Iterable[int]:
    while n_bytes > 0:
        piece = source.read(min(PIECE, n_bytes))
        if not piece:
            raise ModelError(f"{source.name}: it is truncated")
        out.write(piece)
        n_bytes -= len(piece)
        yield len(piece)
