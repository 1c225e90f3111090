"""`deltamem pack` and `deltamem unpack`: base and adapter in one GGUF that loads as one model, and both back again.

The base's keys and tensors come first, as they are; the adapter's follow. Keys of the adapter that are not `deltamem.…`
are kept as `deltamem.packed.…`, so that unpacking gives back both files byte for byte. Nothing is held in memory but
headers.
"""

from __future__ import annotations

import argparse
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import gguf
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import AdapterError, InputError, ModelError
from .files import replacing
from .gguf_header import MAGIC, Header, Tensor

PREFIX = "deltamem."
OTHERS = "deltamem.packed."  # before the adapter's keys that are not its own
PIECE = 8 << 20  # bytes that are copied at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="base model as GGUF, of any quantisation")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter GGUF for that model")
    parser.add_argument("-o", "--outfile", metavar="FILE", required=True, help="the packed model to write")


def run(args: argparse.Namespace) -> int:
    with progress() as advance:
        pack(args.base, args.adapter, args.outfile, advance)
    print(f"{args.outfile}: {os.path.getsize(args.outfile) / 1e6:,.2f} MB, loads as one model")
    return 0


def pack(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    path: str | os.PathLike[str],
    advance: Callable[[int, int], None] = lambda n, total: None,
) -> None:
    """Writes base and adapter as one model, in one step. `advance(bytes, bytes in all)` is called as it is written.

    Raises ModelError or AdapterError if they are damaged or do not belong together, InputError if `path` is one of
    them.
    """
    model, memory = Header(base), Header(adapter)
    if model.keys.get("general.type") == "adapter":
        raise ModelError(f"{model.path}: is an adapter, not a model: give the base first, then the adapter")
    if "deltamem.version" in model.keys:
        raise ModelError(f"{model.path}: is packed already: unpack it first")
    if model.keys.get("split.count", 1) != 1:
        raise ModelError(f"{model.path}: is one shard of several: merge them first (llama-gguf-split --merge)")
    if memory.keys.get("adapter.type") != "deltamem":
        raise AdapterError(f"{memory.path}: is no δ-mem adapter")
    architecture = model.keys.get("general.architecture")
    for key, mine, theirs in (
        ("architecture", architecture, memory.keys.get("general.architecture")),
        *(
            (name, model.keys.get(f"{architecture}.{name}"), memory.keys.get(f"deltamem.base.{name}"))
            for name in ("embedding_length", "block_count")
        ),
    ):
        if mine != theirs:
            raise AdapterError(f"{memory.path}: is for another model than {model.path}: {key} {theirs}, not {mine}")
    _check_target(path, model.path, memory.path)

    keys = [_key(model, key) for key in model.keys]
    keys += [_key(memory, key, key if key.startswith(PREFIX) else OTHERS + key) for key in memory.keys]
    tensors = [(header, tensor) for header in (model, memory) for tensor in header.tensors.values()]
    _write(path, model.version, model.alignment, keys, tensors, advance)


def unpack(
    packed: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    advance: Callable[[int, int], None] = lambda n, total: None,
) -> None:
    """Writes the base and the adapter of a packed model. Raises ModelError if it is none, InputError as `pack`."""
    model = Header(packed)
    if "deltamem.version" not in model.keys or model.keys.get("general.type") == "adapter":
        raise ModelError(f"{model.path}: is no packed model")
    for path in (base, adapter):
        _check_target(path, model.path)
    if os.path.realpath(base) == os.path.realpath(adapter):
        raise InputError(f"{os.fspath(base)}: is named for both, base and adapter: name two files")

    of_base = [_key(model, key) for key in model.keys if not key.startswith(PREFIX)]
    of_adapter = [_key(model, key, key.removeprefix(OTHERS)) for key in model.keys if key.startswith(PREFIX)]
    parts: tuple[list, list] = ([], [])
    for name, tensor in model.tensors.items():
        parts[".deltamem_" in name].append((model, tensor))
    alignment = model.keys.get(OTHERS + "general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    _write(base, model.version, model.alignment, of_base, parts[0], advance)
    _write(adapter, gguf.GGUF_VERSION, alignment, of_adapter, parts[1], advance)


def _check_target(path: str | os.PathLike[str], *sources: Path) -> None:
    for source in sources:
        if os.path.exists(path) and source.samefile(path):
            raise InputError(f"{os.fspath(path)}: is read: name another file to write")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _key(header: Header, key: str, name: str | None = None) -> bytes:
    """A key with its value as in the file, perhaps under another name."""
    start, end = header.spans[key]
    with open(header.path, "rb") as file:
        file.seek(start)
        return _string(name or key) + file.read(end - start)


def _entry(tensor: Tensor, offset: int) -> bytes:
    dims = tensor.shape[::-1]
    return _string(tensor.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, int(tensor.type), offset)


def _write(
    path: str | os.PathLike[str],
    version: int,
    alignment: int,
    keys: list[bytes],
    tensors: Iterable[tuple[Header, Tensor]],
    advance: Callable[[int, int], None],
) -> None:
    tensors = list(tensors)
    for header, tensor in tensors:
        if tensor.n_bytes == 0 and tensor.n_elements:
            raise ModelError(f"{header.path}: tensor {tensor.name} is of a type that is too new: upgrade gguf")
    entries, offset = [], 0
    for _, tensor in tensors:
        entries.append(_entry(tensor, offset))
        offset += -(-tensor.n_bytes // alignment) * alignment
    try:
        with replacing(path) as temporary, open(temporary, "wb") as out:
            out.write(MAGIC + struct.pack("<IQQ", version, len(tensors), len(keys)))
            for part in (*keys, *entries):
                out.write(part)
            out.write(bytes(-out.tell() % alignment))
            done = 0
            for header, tensor in tensors:
                with open(header.path, "rb") as source:
                    source.seek(tensor.offset)
                    for n in _copied(source, out, tensor.n_bytes):
                        done += n
                        advance(done, offset)
                out.write(bytes(-tensor.n_bytes % alignment))
    except OSError as error:
        raise ModelError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error


def _copied(source: BinaryIO, out: BinaryIO, n_bytes: int) -> Iterable[int]:
    while n_bytes > 0:
        piece = source.read(min(PIECE, n_bytes))
        if not piece:
            raise ModelError(f"{source.name}: it is truncated")
        out.write(piece)
        n_bytes -= len(piece)
        yield len(piece)


class progress:
    """A bar on the terminal while files are written: `advance(bytes, bytes in all)`."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.__enter__()
        task = self._bar.add_task("writing")
        return lambda n, total: self._bar.update(task, completed=n, total=total)

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)
