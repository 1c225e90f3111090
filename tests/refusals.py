"""Checks of an error: its class, and the files, options and values that it names. Its wording may change."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence

import pytest


@contextlib.contextmanager
def refuses(kind: type[Exception], *names: object) -> Iterator[pytest.ExceptionInfo]:
    """The block raises an error of this very class, in one line, that names these. It is in the value's `.value`."""
    with pytest.raises(kind) as info:
        yield info
    assert type(info.value) is kind, repr(info.value)
    check_names(str(info.value), names)


def refused(result: subprocess.CompletedProcess, *names: object) -> None:
    """A command ended with 1 and one line, which names these."""
    assert result.returncode == 1, result.stderr
    assert re.fullmatch(r"deltamem: error: .+\n", result.stderr), result.stderr
    check_names(result.stderr.rstrip("\n"), names)


def check_names(said: str, names: Sequence[object]) -> None:
    assert "\n" not in said, said
    for name in names:
        # whole names only: 2 is not in 32, nor file.gguf in other-file.gguf
        assert re.search(rf"(?<![\w.-]){re.escape(str(name))}(?![\w-]|\.\w)", said), f"{name} is not in: {said}"
