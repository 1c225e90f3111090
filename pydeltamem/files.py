"""Files that are there as a whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the temporary name to write to. At the end the file takes the place of `path`, following links; after an
    error it is gone and what was there stays. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files that killed processes left behind for `path`."""
    target = Path(os.path.realpath(path))
    return list(target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"))
