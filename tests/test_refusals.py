"""The helpers of refusals.py: they fail if the wrong error comes."""

from __future__ import annotations

import pytest

from pydeltamem.errors import MemoryFileError, MemoryFileInUse
from refusals import check_names, refuses


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (MemoryFileInUse("a.memory: in use by process 7"), ["a.memory"]),  # of another class
        (MemoryFileError("b.memory: no such memory file"), ["a.memory"]),
        (MemoryFileError("a.memory: holds 32 layers"), ["a.memory", 2]),
        (MemoryFileError("data.memory: no such memory file"), ["a.memory"]),
        (MemoryFileError("a.memory:\nno such memory file"), ["a.memory"]),
    ],
)
def test_the_wrong_error(error, names):
    with pytest.raises(AssertionError), refuses(MemoryFileError, *names):
        raise error


def test_the_right_error():
    with refuses(MemoryFileError, "/tmp/a.memory", "a.memory", "(2, 1)", -1) as info:
        raise MemoryFileError("/tmp/a.memory: holds a state of shape (2, 1), not -1.")
    assert isinstance(info.value, MemoryFileError)


def test_no_error():
    with pytest.raises(pytest.fail.Exception), refuses(MemoryFileError):
        pass


def test_a_name_is_whole():
    check_names("a/model.gguf: has 2 layers", ["model.gguf", "a/model.gguf", "2 layers"])
    for name in ("model", "odel.gguf", "a/model", "layer"):
        with pytest.raises(AssertionError):
            check_names("a/model.gguf: has 2 layers", [name])
