"""Memory files: the state of one conversation as safetensors, bound to the adapter that wrote it.

docs/reference/formats.md has the tensor and the metadata. Nothing here needs llama.cpp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ..errors import InputError, MemoryFileError, named, no_file, shown
from .atomic import is_stream, replacing, target_of
from .disk_errors import save_errors
from .kinds import MEMORY, MEMORY_JSON, MEMORY_NPZ, Kind
from .kinds import MEMORY_FORMAT as FORMAT
from .memory_lock import not_kept_elsewhere

FORMAT_VERSION = 1
MAX_WRITTEN = 2**53  # tokens; a larger number is none that was counted, and stores could not hold it


@dataclasses.dataclass(frozen=True, eq=False)
class MemorySnapshot:
    """A memory without a model: a state, and where it comes from. `Memory.copy()` makes one, `Memory.restore` takes it.

    Attributes:
        state: float32 [L, H, r, r], read-only.
        metadata: of the memory file (docs/reference/formats.md).

    Raises InputError if the state has another shape or is not finite.
    """

    state: npt.NDArray[np.float32]
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        state = np.array(self.state, dtype=np.float32, order="C")
        if not _is_shape_of_state(state.shape):
            raise InputError(f"a memory has a state [L, H, r, r], not one of shape {state.shape}")
        if not np.isfinite(state).all():
            raise InputError("a state must be finite: the array holds NaN or infinite values")
        state.flags.writeable = False
        object.__setattr__(self, "state", state)
        object.__setattr__(self, "metadata", dict(self.metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MemorySnapshot:
        """Reads a memory file. Raises MemoryFileError."""
        return cls(*read_memory_file(path))

    @classmethod
    def from_bytes(cls, data: bytes) -> MemorySnapshot:
        """Reads the content of a memory file. Raises MemoryFileError."""
        name = "the memory file"
        with _read_errors(name):
            if data[:4] == b"GGUF":
                raise _is_gguf(name)
            stored = dict(safetensors.deserialize(data)).get("state")  # type: ignore[no-untyped-call]
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        _check_kind(name, metadata)
        if stored is None:
            raise _holds_no_state(name)
        _check_shape(name, stored["dtype"], stored["shape"])
        state = np.frombuffer(stored["data"], dtype="<f4").reshape(stored["shape"])
        _check_finite(name, state)
        return cls(state, metadata)

    def to_bytes(self) -> bytes:
        """The content of a memory file."""
        return _memory_file(self.state, dict(self.metadata))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a memory file, in one step. Raises MemoryFileError; MemoryFileInUse if another process holds it."""
        with not_kept_elsewhere(path):
            write_memory_file(path, self.state, dict(self.metadata))

    @property
    def layers(self) -> list[int]:
        """The model layers that the states belong to."""
        named = self.metadata.get("layers", "").split(",")
        known = len(named) == len(self.state) and all(text.isdecimal() and len(text) < 10 for text in named)
        return list(map(int, named)) if known else list(range(len(self.state)))

    @property
    def tokens_written(self) -> int:
        """Tokens written to the memory so far; 0 if unknown."""
        text = self.metadata.get("tokens_written", "")
        n = int(text) if text.isdecimal() and len(text) < 20 else 0
        return n if n <= MAX_WRITTEN else 0

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """Frobenius norms of the states, float64 [L, H]: that of a float32 state may exceed float32."""
        norms: npt.NDArray[np.float64] = np.linalg.norm(self.state.astype(np.float64), axis=(2, 3))
        return norms

    @property
    def singular_values(self) -> npt.NDArray[np.float64]:
        """Singular values of each state, descending, float64 [L, H, r]."""
        return np.linalg.svd(self.state.astype(np.float64), compute_uv=False)

    def to_npz(self, path: str | os.PathLike[str]) -> None:
        """Exports a NumPy archive of the arrays `state` and `metadata`, JSON in a string. Raises MemoryFileError."""

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, state=self.state, metadata=np.array(json.dumps(self.metadata)))

        _write(path, MEMORY_NPZ, write)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Exports a JSON object with `metadata` and `state`, nested lists of its shape. Raises MemoryFileError."""
        text = json.dumps({"metadata": self.metadata, "state": self.state.tolist()})
        _write(path, MEMORY_JSON, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_memory_file(path: str | os.PathLike[str], state: np.ndarray, metadata: dict[str, str]) -> None:
    """Writes a memory file in one step: a crash leaves the old file or the new one, never a part.

    `metadata` holds layers, adapter, adapter_name and architecture, and what else is known. The format and the dates
    are added here. Raises MemoryFileError.
    """
    data = _memory_file(state, metadata)
    _write(path, MEMORY, lambda temporary: temporary.write_bytes(data))


def _memory_file(state: np.ndarray, metadata: dict[str, str]) -> bytes:
    saved = now()
    metadata = {
        "created": saved,
        **metadata,
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "saved": saved,
    }
    return safetensors.numpy.save({"state": np.ascontiguousarray(state, dtype=np.float32)}, metadata)


def read_memory_file(path: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, str]]:
    """Reads a memory file: the state, float32 [L, H, r, r], and its metadata.

    Raises MemoryFileError if the file is missing, cannot be read, is cut off, not a memory file, of a newer version or
    not finite.
    """
    name = os.fsdecode(path)
    if os.path.exists(name) and not os.path.isfile(name):  # a pipe might keep us waiting
        raise MemoryFileError(no_file(name, "memory file"))
    try:
        with open(name, "rb") as opened:  # safetensors does not say what is wrong
            is_gguf = opened.read(4) == b"GGUF"
    except FileNotFoundError:
        raise MemoryFileError(no_file(name, "memory file")) from None
    except OSError as error:
        raise MemoryFileError(f"{named(name)}: the memory file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MemoryFileError(f"{named(name)}: no file can have this name ({error})") from error
    if is_gguf:
        raise _is_gguf(name)
    # not read as a whole: a file of another kind may be large
    with _read_errors(name), safetensors.safe_open(name, framework="numpy") as file:
        metadata = file.metadata() or {}
        _check_kind(name, metadata)
        if "state" not in file.keys():  # noqa: SIM118 - safe_open is no mapping
            raise _holds_no_state(name)
        stored = file.get_slice("state")
        _check_shape(name, stored.get_dtype(), stored.get_shape())
        state = file.get_tensor("state")
    _check_finite(name, state)
    return state, metadata


@contextlib.contextmanager
def _read_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise MemoryFileError(f"{name}: cut off or not a memory file ({shown(error)})") from error


def _is_gguf(name: str) -> MemoryFileError:
    return MemoryFileError(f"{name}: is a GGUF file, an adapter or a model, not a memory file")


def _holds_no_state(name: str) -> MemoryFileError:
    return MemoryFileError(f"{name}: the memory file holds no state")


def _check_kind(name: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise MemoryFileError(f"{name}: a safetensors file but not a memory file")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise MemoryFileError(
            f"{name}: format version {shown(version or 'unknown')}, this release reads {FORMAT_VERSION}: "
            "upgrade pydeltamem"
        )


def _check_shape(name: str, dtype: str, shape: Sequence[int]) -> None:
    if dtype != "F32" or not _is_shape_of_state(shape):
        raise MemoryFileError(f"{name}: the state is {dtype} {shape}, a memory file holds F32 [L, H, r, r]")


def _check_finite(name: str, state: np.ndarray) -> None:
    if not np.isfinite(state).all():
        raise MemoryFileError(f"{name}: the state holds values that are not finite")


def owner(metadata: Mapping[str, str]) -> str:
    """The adapter that a memory belongs to, for messages: name, architecture and the beginning of the checksum."""
    name, checksum = metadata.get("adapter_name") or "unnamed", metadata.get("adapter", "")[:12] or "no checksum"
    return shown(f"{name} for {metadata.get('architecture') or 'an unknown architecture'} ({checksum})")


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises MemoryFileError if a memory cannot be saved at `path` later: its folder is missing, it is a file of
    another kind, or another process holds it.
    """
    name = os.fsdecode(path)
    with save_errors(path):
        target = target_of(path)
    if is_stream(target):
        return
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise MemoryFileError(f"{name}: the memory cannot be saved: no folder {folder}")
    if os.path.isdir(name):
        raise MemoryFileError(f"{name}: the memory cannot be saved: it is a folder")
    if not os.access(folder, os.W_OK):
        raise MemoryFileError(f"{name}: the memory cannot be saved: not a writable file")
    with save_errors(path):
        MEMORY.check(path)
    with not_kept_elsewhere(path):
        pass


def _is_shape_of_state(shape: Sequence[int]) -> bool:
    """[L, H, r, r], none of them 0."""
    return len(shape) == 4 and shape[2] == shape[3] and 0 not in shape


def _write(path: str | os.PathLike[str], kind: Kind, write: Callable[[Path], object]) -> None:
    with save_errors(path), replacing(path, kind) as temporary:
        write(temporary)
