"""The exceptions of the package. Each carries one sentence that names the file or value and says what to do."""

from __future__ import annotations

import itertools
import os
import reprlib


def shown(name: object) -> str:
    """A name or value from a file, fit for a sentence: on one line, and not too long."""
    text = _BEGINNING.repr(name) if isinstance(name, (list, tuple, dict)) else str(name)
    return printable(text if len(text) <= 160 else f"{text[:160]}…")


def shown_value(value: object) -> str:
    """A value as Python writes it, fit for a sentence. Of a large list or dict it looks at the beginning only: to write
    all may take a second, in which no other thread goes on.
    """
    return shown(_BEGINNING.repr(value))


class _Beginning(reprlib.Repr):
    def repr_dict(self, x: dict[object, object], level: int) -> str:
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)  # which would sort it


_BEGINNING = _Beginning()
_BEGINNING.maxlevel = 4
_BEGINNING.maxlist = _BEGINNING.maxtuple = _BEGINNING.maxdict = 8
_BEGINNING.maxstring = _BEGINNING.maxlong = _BEGINNING.maxother = 200  # more than is shown


def printable(text: str) -> str:
    """A text from a file on one line, and without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def named(path: str | os.PathLike[str]) -> str:
    """The name of a file, fit for a sentence: as it is, unless it cannot be printed or is too long."""
    name = os.fsdecode(path)
    return name if name.isprintable() and 0 < len(name) <= 160 else f"'{shown(name)}'"


def no_file(path: str | os.PathLike[str], what: str) -> str:
    """Why `path`, which is no file, is not the `what` that was asked for."""
    if not os.path.exists(path):
        return f"{named(path)}: no such {what}"
    return f"{named(path)}: is a {'folder' if os.path.isdir(path) else 'device or a pipe'}, no {what}"


def naming(path: str, reason: str) -> str:
    """A reason that names the file."""
    return reason if path in reason else f"{path}: {reason}"


class DeltaMemError(Exception):
    """Base of every error of this package."""


class InputError(DeltaMemError, ValueError):
    """A value given from Python or on the command line does not fit."""


class LibraryError(DeltaMemError, ImportError):
    """The native library is missing, or another one was loaded before it."""


class AdapterError(DeltaMemError, ValueError):
    """An adapter cannot be read, does not fit the model, or is not attached."""


class CheckpointError(DeltaMemError, ValueError):
    """A PyTorch checkpoint cannot be converted."""


class MemoryFileError(DeltaMemError, ValueError):
    """A memory file cannot be read or written, or belongs to another adapter."""


class MemoryFileInUse(MemoryFileError):
    """The memory file is in use by another process, or by another conversation of this one."""


class ModelError(DeltaMemError, ValueError):
    """A model file is missing or cannot be loaded."""


class NotFiniteError(DeltaMemError, ArithmeticError):
    """A memory, or what the model computes with it, is no longer finite: weights are damaged or far too large."""


class FetchError(DeltaMemError):
    """A model or adapter cannot be fetched by name: no network, no such repository or file, or a wrong checksum."""


class OutputError(DeltaMemError):
    """A file cannot be written: the disk is full, the folder is missing, or a file of another kind has its name."""


class TrainingError(DeltaMemError):
    """A training run cannot go on: its loss is no longer finite."""


class RpcServerAway(InputError):
    """Nobody listens where an RPC server is named."""


class DecodeError(DeltaMemError, RuntimeError):
    """llama.cpp failed to compute a batch of tokens."""
