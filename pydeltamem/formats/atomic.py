"""Files that are there as a whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import named
from .kinds import Kind


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], kind: Kind) -> Iterator[Path]:
    """Yields the temporary name to write to. At the end the file takes the place of `path`, following links, with the
    permissions of what was there; after an error it is gone and what was there stays. Into a device or a pipe it is
    written. Raises OSError, also if a file of another kind is there.
    """
    target = target_of(path)
    if is_stream(target):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, "written")
            yield temporary
            with open(temporary, "rb") as file, open(target, "wb") as stream:
                shutil.copyfileobj(file, stream)
        return
    kind.check(target)
    temporary = _temporary(target, secrets.token_hex(4))
    mode = 0o600 if target.is_file() else 0o666  # nobody reads it meanwhile who may not read what is there
    temporary.touch(mode, exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        kind.check(target)  # it may have come meanwhile
        if target.is_file():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def target_of(path: str | os.PathLike[str]) -> Path:
    """What is at `path` or is to be written there, following links. Raises OSError if no file can have that name, or
    the temporary one that `replacing` makes of it: it is empty, ends as a folder's, is too long, or no text of the
    system.
    """
    name = os.fsdecode(path)
    if not os.path.basename(name):
        raise IsADirectoryError(errno.EISDIR, "a file needs a name, and this is none" if not name else "it is a folder")
    try:
        target = Path(os.path.realpath(name))
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target if is_stream(target) else _temporary(target, "0" * 8))
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})") from error
    return target


def _temporary(target: Path, mark: str) -> Path:
    return target.parent / f".{target.name}.{mark}.tmp"


def is_stream(path: Path) -> bool:
    """Whether it is there, and neither a file nor a folder: a device, a pipe. A file must not take its place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files that killed processes left for `path`."""
    target = Path(os.path.realpath(path))
    return list(target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"))


def no_file(path: str | os.PathLike[str], what: str) -> str:
    """Why `path`, which is no file, is not the `what` that was asked for."""
    return f"{os.fspath(path)}: is a folder, not a {what}" if os.path.isdir(path) else f"{named(path)}: no such {what}"
