"""Memory files: the state of one conversation as safetensors, bound to the adapter that wrote it.

The format is in docs/reference/formats.md.

One tensor `state`, F32 [L, H, r, r] with S[i, j] = [row (value), column (key)], and the metadata

    format           deltamem-memory
    format_version   1
    layers           model layers that carry memory, comma-separated
    adapter          sha256 of the checkpoint that the adapter was converted from
    adapter_name     its name
    architecture     of the base model, e.g. qwen3
    base             fingerprint of the base model, equal for all its quantisations (optional)
    base_name        its name (optional)
    tokens_written   tokens written to the memory so far (optional)
    created          when the memory began, ISO 8601, UTC
    saved            when the file was written, ISO 8601, UTC (optional)

Nothing here needs llama.cpp.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from ..errors import InputError, MemoryFileError, MemoryFileInUse, named, shown
from .atomic import is_stream, leftovers, replacing, target_of
from .kinds import MEMORY, MEMORY_JSON, MEMORY_NPZ, Kind
from .kinds import MEMORY_FORMAT as FORMAT
from .lock import take_lock

FORMAT_VERSION = 1
MAX_WRITTEN = 2**53  # tokens; a larger number is none that was counted, and stores could not hold it


@dataclasses.dataclass(frozen=True, eq=False)
class MemorySnapshot:
    """A memory without a model: a state, and where it comes from. `Memory.copy()` makes one, `Memory.restore` takes it.

    Attributes:
        state: float32 [L, H, r, r], read-only.
        metadata: of the memory file, see above.

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
        with tempfile.TemporaryDirectory(prefix="deltamem-") as folder:  # safetensors checks files better than bytes
            path = os.path.join(folder, "memory")
            Path(path).write_bytes(data)
            try:
                return cls.load(path)
            except MemoryFileError as error:
                raise MemoryFileError(str(error).replace(path, "the memory file")) from error

    def to_bytes(self) -> bytes:
        """The content of a memory file."""
        return _memory_file(self.state, dict(self.metadata))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a memory file, in one step. Raises MemoryFileError; MemoryFileInUse if another process holds it."""
        with _not_kept_elsewhere(path):
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
    def norms(self) -> npt.NDArray[np.float32]:
        """Frobenius norms of the states, [L, H]."""
        norms: npt.NDArray[np.float64] = np.linalg.norm(self.state.astype(np.float64), axis=(2, 3))
        return norms.astype(np.float32)

    @property
    def singular_values(self) -> npt.NDArray[np.float32]:
        """Singular values of each state, descending, [L, H, r]."""
        return np.linalg.svd(self.state.astype(np.float64), compute_uv=False).astype(np.float32)

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
    try:
        with open(name, "rb") as opened:  # safetensors does not say what is wrong
            is_gguf = opened.read(4) == b"GGUF"
    except FileNotFoundError:
        raise MemoryFileError(f"{named(name)}: no such memory file") from None
    except OSError as error:
        raise MemoryFileError(f"{named(name)}: the memory file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise MemoryFileError(f"{named(name)}: no file can have this name ({error})") from error
    if is_gguf:
        raise MemoryFileError(f"{name}: is a GGUF file, an adapter or a model, not a memory file")
    try:
        with safetensors.safe_open(name, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MemoryFileError(f"{name}: a safetensors file but not a memory file")
            version = metadata.get("format_version", "")
            if version != str(FORMAT_VERSION):
                raise MemoryFileError(
                    f"{name}: format version {shown(version or 'unknown')}, this release reads {FORMAT_VERSION}: "
                    "upgrade pydeltamem"
                )
            if "state" not in file.keys():  # noqa: SIM118 - safe_open is no mapping
                raise MemoryFileError(f"{name}: the memory file holds no state")
            stored = file.get_slice("state")
            shape = stored.get_shape()
            if stored.get_dtype() != "F32" or not _is_shape_of_state(shape):
                raise MemoryFileError(
                    f"{name}: the state is {stored.get_dtype()} {shape}, a memory file holds F32 [L, H, r, r]"
                )
            state = file.get_tensor("state")
    except (OSError, safetensors.SafetensorError) as error:
        raise MemoryFileError(f"{name}: cut off or not a memory file ({shown(error)})") from error
    if not np.isfinite(state).all():
        raise MemoryFileError(f"{name}: the state holds values that are not finite")
    return state, metadata


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
    with _save_errors(path):
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
    with _save_errors(path):
        MEMORY.check(path)
    with _not_kept_elsewhere(path):
        pass


class MemoryFileLock:
    """Reserves a memory file for one object of one process, which can then save it again and again.

    A lock file next to it, `.NAME.lock`, holds the process id. If the process is killed, the operating system releases
    the lock, and the file that is left does no harm. An object that is deleted releases its lock too. A forked child
    holds nothing: the lock stays with its parent.

        with MemoryFileLock("ada.memory"):
            ...

    Raises MemoryFileInUse if somebody else holds it, MemoryFileError if there can be no lock.
    """

    _held_here: ClassVar[weakref.WeakValueDictionary[Path, MemoryFileLock]] = weakref.WeakValueDictionary()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        with _save_errors(path):
            target = target_of(path)
        self._lock = target.with_name(f".{target.name}.lock")
        self._file: int | None = None
        self._freed: weakref.finalize[[int, Path], MemoryFileLock] | None = None

    @classmethod
    def is_held_here(cls, path: str | os.PathLike[str]) -> bool:
        """Whether an object of this process holds the lock of that file."""
        return cls(path)._lock in cls._held_here

    def acquire(self) -> None:
        """Takes the lock, and removes what processes that were killed while saving have left."""
        with _save_errors(self.path):
            self._acquire()

    def _acquire(self) -> None:
        if self._freed is not None:
            return
        while self._file is None:
            self._file = self._try()
        self._freed = weakref.finalize(self, _free, self._file, self._lock)
        self._held_here[self._lock] = self
        for leftover in leftovers(self.path):
            with contextlib.suppress(OSError):
                leftover.unlink()

    def _try(self) -> int | None:
        """The lock file, locked; None if the last holder removed it while we opened and locked it."""
        opened = self._open()
        if opened is None:
            return None
        file, is_ours = opened
        try:
            if not take_lock(file):
                is_ours = False
                holder = os.pread(file, 32, 1).decode("ascii", "replace").strip() if os.name == "posix" else ""
                if holder == str(os.getpid()):
                    raise MemoryFileInUse(
                        f"{self.path}: in use by a conversation of this process: close it, or use another file"
                    )
                who = f"process {holder}" if holder else "another process"
                raise MemoryFileInUse(f"{self.path}: in use by {who}: end it, or use another file")
            is_ours = False
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.lstat(self._lock)):
                    if not re.fullmatch(rb"( \d*\n?)?", os.read(file, 64)):
                        raise self._no_lock()
                    is_ours = True
                    os.ftruncate(file, 0)
                    os.lseek(file, 0, os.SEEK_SET)
                    os.write(file, f" {os.getpid()}\n".encode("ascii"))  # the first byte is what Windows locks
                    return file
        except BaseException:
            if is_ours and os.name == "posix":
                with contextlib.suppress(OSError):
                    self._lock.unlink()
            os.close(file)
            raise
        os.close(file)
        return None

    def _open(self) -> tuple[int, bool] | None:
        """Opens the lock file, never through a link. Returns it and whether it is new; None if it was just removed."""
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
        with contextlib.suppress(FileExistsError):
            return os.open(self._lock, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        try:
            if not stat.S_ISREG(os.lstat(self._lock).st_mode):
                raise self._no_lock()
            return os.open(self._lock, flags), False
        except FileNotFoundError:
            return None

    def _no_lock(self) -> MemoryFileError:
        return MemoryFileError(
            f"{self._lock}: is no lock of pydeltamem, but has the name of the lock of {self.path}: "
            "remove it, or save to another file"
        )

    def release(self) -> None:
        """Releases the lock. Releasing twice is fine."""
        if self._freed is not None:
            self._held_here.pop(self._lock, None)
            self._freed()
            self._file = self._freed = None

    @classmethod
    def _forget_all(cls) -> None:
        """Drops the locks in a forked child: they are the parent's, and must end with it."""
        for lock in list(cls._held_here.values()):
            if lock._freed is not None and lock._file is not None:
                lock._freed.detach()
                os.close(lock._file)
                lock._file = lock._freed = None
        cls._held_here.clear()

    def __enter__(self) -> MemoryFileLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=MemoryFileLock._forget_all)


def _free(file: int, lock: Path) -> None:
    if os.name == "posix":
        with contextlib.suppress(OSError):
            lock.unlink()  # while we still hold it
    os.close(file)


@contextlib.contextmanager
def _not_kept_elsewhere(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a memory file while it is saved, if there are locks. Raises MemoryFileError if another process
    holds it. A process that holds it already may save.
    """
    lock = MemoryFileLock(path)
    if not is_stream(Path(os.path.realpath(lock.path))) and not lock.is_held_here(path):
        with contextlib.suppress(OSError):
            lock._acquire()
    try:
        yield
    finally:
        lock.release()


def _is_shape_of_state(shape: Sequence[int]) -> bool:
    """[L, H, r, r], none of them 0."""
    return len(shape) == 4 and shape[2] == shape[3] and 0 not in shape


def _write(path: str | os.PathLike[str], kind: Kind, write: Callable[[Path], object]) -> None:
    with _save_errors(path), replacing(path, kind) as temporary:
        write(temporary)


@contextlib.contextmanager
def _save_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MemoryFileError(f"{named(path)}: the memory cannot be saved: {error.strerror or error}") from error
