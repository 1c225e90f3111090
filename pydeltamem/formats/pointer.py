"""Pointers of Git LFS: a clone that was made without it has them in place of the large files."""

from __future__ import annotations

import contextlib
import os

from ..errors import DeltaMemError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str | os.PathLike[str], error: type[DeltaMemError]) -> None:
    """Raises the error if the file is one. If it cannot be read, its reader says why."""
    start = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(len(_BEGINNING))
    if start == _BEGINNING:
        raise error(f"{path}: is a pointer of Git LFS, not the file itself: get that with git lfs pull, or download it")
