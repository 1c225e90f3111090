"""Locks of files and folders. The system releases them when it ends the process, however that ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ..errors import InputError, named

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def take_lock(file: int) -> bool:
    """Takes the lock of an open file; False if it is not free. Raises OSError if the file system has no locks."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    return True


@contextlib.contextmanager
def held(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it nobody else comes as far as this with the same existing file or folder. Raises InputError if somebody
    is there. Nobody is kept out where there are no such locks: on Windows, on some network file systems.
    """
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDONLY)
                stack.callback(os.close, file)
                if not take_lock(file):
                    raise InputError(f"{named(path)}: another run writes it: wait for its end, or name another output")
        yield
