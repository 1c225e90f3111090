"""What the operating system says of a file that cannot be written, as an error of the package that names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import DeltaMemError, MemoryFileError, OutputError, named


def disk_errors(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Turns an OSError of writing `path` into an OutputError."""
    return _turned(OutputError, path, "cannot be written")


def save_errors(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Turns an OSError of saving a memory into a MemoryFileError."""
    return _turned(MemoryFileError, path, "the memory cannot be saved")


@contextlib.contextmanager
def _turned(kind: type[DeltaMemError], path: str | os.PathLike[str], what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(f"{named(path)}: {what}: {error.strerror or error}") from error
