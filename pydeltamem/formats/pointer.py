"""Pointers of Git LFS: a clone that was made without it has them in place of the large files."""

from __future__ import annotations

import contextlib
import os

_BEGINNING = b"version https://git-lfs.github.com/spec/"

POINTER = "is a pointer of Git LFS, not the file itself: get that with git lfs pull, or download it"


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether the file is one; False if it cannot be read, of which its reader says why."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING
    return False
