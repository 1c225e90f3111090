"""Writes files as a whole or not at all: under a temporary name, then synced and renamed."""

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

from .ending import ending_in_order
from .kinds import Kind


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], kind: Kind) -> Iterator[Path]:
    """Yields the temporary name to write to. At the end that file replaces `path`, following links, and takes the old
    file's permissions, and its owner and group as far as the system lets us. After an error, SIGTERM or SIGHUP
    (`ending_in_order`) it is removed and the old file stays. A device or a pipe is written to instead. Raises OSError,
    also if `path` is a file of another kind.
    """
    target = target_of(path)
    with ending_in_order(), _sent(target) if is_stream(target) else _put(target, kind) as temporary:
        yield temporary


@contextlib.contextmanager
def _sent(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "written")
        yield temporary
        with open(temporary, "rb") as file, open(target, "wb") as stream:
            shutil.copyfileobj(file, stream)


@contextlib.contextmanager
def _put(target: Path, kind: Kind) -> Iterator[Path]:
    kind.check(target)
    temporary = _temporary(target, secrets.token_hex(4))
    mode = 0o600 if target.is_file() else 0o666  # meanwhile nobody may read it who may not read the old one
    try:
        temporary.touch(mode, exist_ok=False)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        kind.check(target)  # a file may have appeared meanwhile
        if target.is_file():
            _copy_permissions(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        try:
            descriptor = os.open(target.parent, os.O_RDONLY)
        except OSError:  # a folder that may be written but not read; the file is whole
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _copy_permissions(source: Path, target: Path) -> None:
    """So that those who may read and write the old file may do so with the new one, whoever writes it."""
    if hasattr(os, "chown"):
        status = source.stat()
        for owner, group in ((-1, status.st_gid), (status.st_uid, -1)):
            with contextlib.suppress(OSError):
                os.chown(target, owner, group)
    shutil.copymode(source, target)


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that `path` names, following links. Raises OSError if no file can have that name, or the temporary one
    that `replacing` makes of it: it is empty, ends like a folder's, is too long or cannot be encoded.
    """
    name = os.fsdecode(path)
    if not os.path.basename(name):
        raise IsADirectoryError(errno.EISDIR, "a file needs a name" if not name else "it is a folder")
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
    """Whether `path` exists and is a device or a pipe, not a file or a folder. A file must not replace it."""
    return path.exists() and not path.is_file() and not path.is_dir()


def leftovers(path: str | os.PathLike[str]) -> list[Path]:
    """Temporary files that killed processes left for `path`."""
    target = Path(os.path.realpath(path))
    return list(target.parent.glob(f".{glob.escape(target.name)}.????????.tmp"))
