"""Memory files: the state of one conversation as safetensors, bound to the adapter that wrote it.

One tensor `state`, F32 [L, H, r, r] with S[i, j] = [row (value), column (key)], and the metadata

    format           deltamem-memory
    format_version   1
    layers           model layers that carry memory, comma-separated
    adapter          sha256 of the checkpoint that the adapter was converted from
    adapter_name     its name
    architecture     of the base model, e.g. qwen3
    created          ISO 8601, UTC

Nothing here needs llama.cpp.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from .errors import MemoryFileError

FORMAT = "deltamem-memory"
FORMAT_VERSION = 1


def write_memory_file(path: str | os.PathLike[str], state: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes a memory file in one step: a crash leaves the old file or the new one, never a part.

    `metadata` holds layers, adapter, adapter_name and architecture; format and date are added. Raises MemoryFileError.
    """
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        **metadata,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    data = safetensors.numpy.save({"state": np.ascontiguousarray(state, dtype=np.float32)}, metadata)
    try:
        _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise MemoryFileError(f"{os.fspath(path)}: the memory cannot be saved: {error.strerror}") from error


def read_memory_file(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, str]]:
    """Reads a memory file: the state, float32 [L, H, r, r], and its metadata.

    Raises MemoryFileError if the file is missing, cut off, not a memory file, of a newer version or not finite.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise MemoryFileError(f"{name}: no such memory file")
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MemoryFileError(f"{name}: a safetensors file but not a memory file")
            version = metadata.get("format_version", "")
            if version != str(FORMAT_VERSION):
                raise MemoryFileError(
                    f"{name}: format version {version or 'unknown'}, this release reads {FORMAT_VERSION}: "
                    "upgrade pydeltamem"
                )
            if "state" not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                raise MemoryFileError(f"{name}: the memory file holds no state")
            stored = file.get_slice("state")
            shape = stored.get_shape()
            if stored.get_dtype() != "F32" or len(shape) != 4 or shape[2] != shape[3]:
                raise MemoryFileError(
                    f"{name}: the state is {stored.get_dtype()} {shape}, a memory file holds F32 [L, H, r, r]"
                )
            state = file.get_tensor("state")
    except (OSError, safetensors.SafetensorError) as error:
        raise MemoryFileError(f"{name}: cut off or not a memory file ({error})") from error
    if not np.isfinite(state).all():
        raise MemoryFileError(f"{name}: the state holds values that are not finite")
    return state, metadata


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises MemoryFileError if a memory cannot be saved at `path` later, e.g. because its folder is missing."""
    name = os.fspath(path)
    folder = os.path.dirname(os.path.realpath(name))
    if not os.path.isdir(folder):
        raise MemoryFileError(f"{name}: the memory cannot be saved: no folder {folder}")
    if os.path.isdir(name) or not os.access(folder, os.W_OK):
        raise MemoryFileError(f"{name}: the memory cannot be saved: not a writable file")


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
