"""Files that are there as a whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the temporary name to write to. At the end the file takes the place of `path`, following links, with the
    permissions of what was there; after an error it is gone and what was there stays. Into a device or a pipe it is
    written. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    if is_stream(target):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "written")
            yield temporary
            with open(temporary, "rb") as file, open(target, "wb") as stream:
                shutil.copyfileobj(file, stream)
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_file():
            temporary.touch(0o600)  # nobody reads it meanwhile who may not read what is there
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if target.is_file():
            shutil.copymode(target, temporary)
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


def is_stream(path: Path) -> bool:
    """Whether it is there, and neither a file nor a folder: a device, a pipe. A file must not take its place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files that killed processes left behind for `path`."""
    target = Path(os.path.realpath(path))
    return list(target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"))
