"""The header of a GGUF file: its keys, and the names, shapes, types and offsets of its tensors.

gguf.GGUFReader makes objects for every element of every array: 14 s and 0.5 GB for a vocabulary of 150000 tokens.
Conversion and `deltamem inspect` need only a few other keys, at once. A model may be in shards, as llama.cpp splits it:
the first one has the keys, all have tensors.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from ..errors import ModelError, no_file, shown
from .pointer import refuse_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_HEADER = 1 << 27  # bytes of keys and entries; those of the largest vocabularies have a tenth. A list takes more RAM

_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry. `shape` in numpy's order, rows first; `offset` in bytes from the start of its file, `path`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType | int  # a number if the gguf package does not know it
    offset: int
    path: Path

    @property
    def type_name(self) -> str:
        return self.type.name if isinstance(self.type, GGMLQuantizationType) else f"type {self.type}"

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes of its values; 0 for a type that the gguf package does not know."""
        block, block_bytes = _block(self.type)
        return self.n_elements // block * block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of the values that are stored together; 0 for a type that the gguf package does not know."""
        return _block(self.type)[1]


def _block(kind: GGMLQuantizationType | int) -> tuple[int, int]:
    """Values that a type stores together, and their bytes; (1, 0) for a type that the gguf package does not know."""
    return gguf.GGML_QUANT_SIZES[kind] if isinstance(kind, GGMLQuantizationType) else (1, 0)


class Header:
    """The header of a GGUF file. Raises ModelError if it is missing, damaged, cut off or of an unknown version.

    Attributes:
        path: the file.
        keys: every key's value, in the file's order: a bool, int, float, str, or a list of them.
        types: every key's type; of a list, that of its elements.
        tensors: every tensor's entry by name, in the file's order; each lies wholly inside the file.
        spans: byte range of every key's type and value in the file.
        version, alignment: of the file.
        files: the file, or the shards of a model that `of_model` reads, the first one first.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not os.path.isfile(self.path):  # unlike Path.is_file it takes every name
            raise ModelError(no_file(self.path, "GGUF file"))
        try:
            with open(self.path, "rb") as file:
                start = file.read(9)
                if not start.startswith(MAGIC):
                    refuse_pointer(self.path, ModelError)
                    is_safetensors = start[8:] == b"{"  # after the length of its header
                    what = ", but a safetensors file, as memory files are" if is_safetensors else ""
                    raise ModelError(f"{self.path}: is not a GGUF file{what}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    parser = _Parser(data, self.path)
                    self.keys, self.types, self.tensors = parser.parse()
                    self.spans, self.version, self.alignment = parser.spans, parser.version, parser.alignment
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be read: {error.strerror}") from error
        except _Damaged as error:
            raise ModelError(f"{self.path}: is not a readable GGUF file: {error}") from None
        self.files = [self.path]

    @classmethod
    def of_model(cls, path: str | os.PathLike[str]) -> Header:
        """The header of a model that may be in shards. `path` names the first, which has the keys; all have tensors.
        Raises ModelError, also if a shard is missing or they do not belong together.
        """
        header = cls(path)
        n = header.keys.get("split.count", 1)
        if not isinstance(n, int) or n < 2:
            return header
        name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", header.path.name)
        if not name or header.keys.get("split.no") != 0 or (int(name[2]), int(name[3])) != (1, n):
            raise ModelError(
                f"{header.path}: is a part of a split model: name its first part, ...-00001-of-{n:05}.gguf"
            )
        for i in range(1, n):
            shard = cls(header.path.with_name(f"{name[1]}-{i + 1:05}-of-{n:05}.gguf"))
            if shard.keys.get("split.no") != i or shard.keys.get("split.count") != n:
                raise ModelError(f"{shard.path}: is not part {i + 1} of {n} of {header.path}, as its header says")
            if twice := header.tensors.keys() & shard.tensors.keys():
                raise ModelError(f"{shard.path}: has tensor {shown(min(twice))}, which another part has too")
            header.tensors.update(shard.tensors)
            header.files.append(shard.path)
        expected = header.keys.get("split.tensors.count")
        if expected != len(header.tensors):
            raise ModelError(f"{header.path}: its {n} parts have {len(header.tensors)} tensors, not {expected}")
        return header

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, dequantised: float32, rows first."""
        tensor = self.tensors[name]
        data = np.fromfile(tensor.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        with contextlib.suppress(NotImplementedError):
            if isinstance(tensor.type, GGMLQuantizationType):
                return gguf.quants.dequantize(data, tensor.type).reshape(tensor.shape)
        raise ModelError(f"{self.path}: tensor {name} is {tensor.type_name}, which cannot be read here")


class _Damaged(Exception):
    """What is wrong with the file; the caller adds its name."""


class _Parser:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data = data
        self.path = path
        self.at = len(MAGIC)
        self.spans: dict[str, tuple[int, int]] = {}
        self.version = 0
        self.alignment = gguf.GGUF_DEFAULT_ALIGNMENT

    def parse(self) -> tuple[dict[str, Any], dict[str, GGUFValueType], dict[str, Tensor]]:
        self.version = version = self.scalar(GGUFValueType.UINT32)
        if version & 0xFFFF == 0 < version:
            raise _Damaged("it was written for a processor of the other byte order: convert the model again")
        if version not in VERSIONS:
            raise _Damaged(f"its version is {version}, this release reads {' and '.join(map(str, VERSIONS))}")
        n_tensors, n_keys = self.scalar(GGUFValueType.UINT64), self.scalar(GGUFValueType.UINT64)

        keys: dict[str, Any] = {}
        types: dict[str, GGUFValueType] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in keys:
                raise _Damaged(f"key {shown(key)} occurs twice")
            start = self.at
            keys[key], types[key] = self.value()
            self.spans[key] = start, self.at

        entries = [self.entry() for _ in range(n_tensors)]
        alignment = keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment is {alignment}, no power of two")
        self.alignment = alignment
        start = -(-self.at // alignment) * alignment

        tensors: dict[str, Tensor] = {}
        expected: int | None = 0  # llama.cpp wants tensors directly one after the other
        for name, shape, kind, offset in entries:
            tensor = Tensor(name, shape, kind, start + offset, self.path)
            if name in tensors:
                raise _Damaged(f"tensor {shown(name)} occurs twice")
            if tensor.offset + tensor.n_bytes > len(self.data):
                raise _Damaged(f"it is truncated, tensor {shown(name)} reaches past its end")
            if offset % alignment or expected not in (None, offset):
                raise _Damaged(f"tensor {shown(name)} is at {offset}, llama.cpp wants it at {expected}")
            expected = -(-(offset + tensor.n_bytes) // alignment) * alignment if tensor.block_bytes else None
            tensors[name] = tensor
        return keys, types, tensors

    def take(self, n_bytes: int) -> int:
        """Skips n_bytes. Returns the position where they begin."""
        self.expect(n_bytes)
        self.at += n_bytes
        return self.at - n_bytes

    def expect(self, n_bytes: int) -> None:
        """Raises _Damaged if the header cannot go on for that long."""
        if n_bytes > len(self.data) - self.at:
            raise _Damaged("it is truncated")
        if self.at + n_bytes > MAX_HEADER:
            raise _Damaged(f"its header has more than {MAX_HEADER >> 20} MiB")

    def scalar(self, kind: GGUFValueType) -> Any:
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: GGUFValueType, n: int) -> list[Any]:
        dtype = np.dtype(_SCALARS[kind])
        at = self.take(n * dtype.itemsize)
        return list(np.frombuffer(self.data[at : self.at], dtype).tolist())

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.take(8))
        at = self.take(length)
        return self.data[at : self.at].decode("utf-8", errors="surrogateescape")

    def value(self) -> tuple[Any, GGUFValueType]:
        """A value, and its type or that of a list's elements."""
        kind = self.value_type()
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.scalar(kind), kind
        kind, n = self.value_type(), self.scalar(GGUFValueType.UINT64)
        if kind == GGUFValueType.ARRAY:
            raise _Damaged("it has an array of arrays")
        if kind != GGUFValueType.STRING:
            return self.scalars(kind, n), kind
        self.expect(8 * n)  # their lengths alone
        return [self.string() for _ in range(n)], kind

    def value_type(self) -> GGUFValueType:
        kind = self.scalar(GGUFValueType.UINT32)
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise _Damaged(f"it has a value of unknown type {kind}") from None

    def entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType | int, int]:
        name, n_dims = self.string(), self.scalar(GGUFValueType.UINT32)
        if not 1 <= n_dims <= MAX_DIMS:
            raise _Damaged(f"tensor {shown(name)} has {n_dims} dimensions")
        shape = tuple(self.scalars(GGUFValueType.UINT64, n_dims)[::-1])
        kind: GGMLQuantizationType | int = self.scalar(GGUFValueType.UINT32)
        offset = self.scalar(GGUFValueType.UINT64)
        with contextlib.suppress(ValueError):
            kind = GGMLQuantizationType(kind)
        if isinstance(kind, GGMLQuantizationType) and shape[-1] % _block(kind)[0]:
            raise _Damaged(f"tensor {shown(name)} has rows of {shape[-1]}, no multiple of the blocks of {kind.name}")
        return name, shape, kind, offset
