"""Locks of memory files, so that no two conversations save into one."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from ..errors import MemoryFileError, MemoryFileInUse
from .atomic import is_stream, leftovers, target_of
from .disk_errors import save_errors
from .lock import take_lock


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
    # Threads of a process take a lock, and save, one after the other: a thread that begins must not take for a leftover
    # what another one is writing.
    _turn: ClassVar[Any] = threading.RLock()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fsdecode(path)
        with save_errors(path):
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
        with save_errors(self.path), self._turn:
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
        except PermissionError as error:  # that another user left
            raise PermissionError(error.errno, f"{self._lock}: {error.strerror}") from error

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
        cls._turn = threading.RLock()  # the thread that had it is not here

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
def not_kept_elsewhere(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a memory file while it is saved, if there are locks. Raises MemoryFileError if another process
    holds it. A process that holds it already may save; its threads do so one after the other.
    """
    lock = MemoryFileLock(path)
    if is_stream(Path(os.path.realpath(lock.path))):
        yield
        return
    with lock._turn:
        if not lock.is_held_here(path):
            with contextlib.suppress(OSError):
                lock._acquire()
        try:
            yield
        finally:
            lock.release()
