"""Files that commands write. Checks a file before the work, and tells a full disk from a bad model."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import InputError
from .atomic import is_stream, replacing, target_of
from .disk_errors import disk_errors
from .kinds import Kind


def refuse_inputs(path: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raises InputError if `path` is one of the inputs, under whatever name."""
    for source in sources:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise InputError(f"{os.fspath(path)}: is read for the conversion; name another file to write")


def files_of(folder: str | os.PathLike[str]) -> list[Path]:
    """What a conversion must not overwrite in a folder: all files but GGUF, which it writes."""
    return [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".gguf"]


def as_text(name: str) -> str:
    """A name of a file or from the command line as text that a file can hold: what is not UTF-8 becomes �."""
    try:
        return os.fsencode(name).decode("utf-8", "replace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "replace").decode("utf-8")


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and its parents, if they are missing. Raises OutputError."""
    with disk_errors(path):
        try:
            os.makedirs(path, exist_ok=True)
        except ValueError as error:
            raise OSError(errno.EINVAL, f"no folder can have this name ({error})") from error


def check_target(path: str | os.PathLike[str], kind: Kind) -> None:
    """Raises OutputError if no file can be written there, or `path` is a file of another kind."""
    with disk_errors(path):
        target = target_of(path)
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if not is_stream(target):
            kind.check(target)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix="."):
                pass


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], kind: Kind) -> Iterator[Path]:
    """`replacing` with OutputErrors. Checks before the work what it can."""
    check_target(path, kind)
    with disk_errors(path), replacing(path, kind) as temporary:
        yield temporary


@contextlib.contextmanager
def output(path: str | None, kind: Kind) -> Iterator[Callable[[str | bytes], None]]:
    """Yields a function that writes the file of `--json FILE` or `--plot FILE`, as `writing` does. - is standard
    output; None writes nothing. Checks at once that the file can be written. Raises OutputError.
    """
    if path is None or path == "-":
        yield (lambda data: None) if path is None else _to_stdout
        return
    check_target(path, kind)

    def write(data: str | bytes) -> None:
        with writing(path, kind) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)

    yield write


def _to_stdout(data: str | bytes) -> None:
    if isinstance(data, str):
        sys.stdout.write(data)
    else:
        sys.stdout.buffer.write(data)


def check_disk(path: str | os.PathLike[str], temporary: Path) -> None:
    """Finds out why a program failed to write `temporary`: raises OutputError if the disk is full."""
    with disk_errors(path), open(temporary, "ab") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
