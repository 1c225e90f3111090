"""Kinds of files that we write. An existing file is only replaced by one of its own kind."""

from __future__ import annotations

import codecs
import errno
import json
import os
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name with the article, and whether the file at a path is one. That may raise OSError."""

    name: str
    is_one: Callable[[Path], bool]

    def check(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError if the existing file is of another kind. An empty file is of every kind."""
        if not os.path.isfile(path) or not os.path.getsize(path):
            return
        open(path, "rb").close()  # else what cannot be read would seem to be of another kind
        if not self.is_one(Path(path)):
            raise FileExistsError(
                errno.EEXIST, f"the existing file is not {self.name}: remove it, or name another file"
            )


def _safetensors(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata of a safetensors file and the names of its tensors; empty if it is no such file."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, list(file.keys())
    except safetensors.SafetensorError:
        return {}, []


def _keys(path: Path) -> dict[str, Any] | None:
    """Keys of a GGUF file; None if it is no such file."""
    from .gguf_header import Header

    try:
        return Header(path).keys
    except ModelError:
        return None


def _is_adapter(path: Path) -> bool:
    return (_keys(path) or {}).get("adapter.type") == "deltamem"


def _is_model(path: Path, shard: bool = False) -> bool:
    keys = _keys(path)
    # 1: a part that is the whole; less, which llama-gguf-split leaves when it merges: no part
    n_parts = 0 if keys is None else keys.get("split.count", 0)
    if keys is None or not isinstance(n_parts, int) or (n_parts < 1 if shard else n_parts > 1):
        return False
    if shard and keys.get("split.no") != 0:
        return True  # only the first shard tells its kind
    of_models = keys.get("general.type", "model") == "model" and keys.get("general.architecture") != "controlvector"
    return of_models and "general.architecture" in keys


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it holds none."""
    with open(path, "rb") as file:
        if not file.read(4).removeprefix(codecs.BOM_UTF8).startswith(b"{"):
            return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            return isinstance(json.loads(file.readline()), dict)
        except (ValueError, RecursionError):
            return False


def json_of(name: str, *members: set[str]) -> Kind:
    """A JSON file with an object that has at least one of these sets of members."""
    return Kind(name, lambda path: any(some <= _object(path).keys() for some in members))


def _members(path: Path) -> Collection[str]:
    """Names of the members of a ZIP archive; empty if it is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return ()


def _begins(beginning: bytes) -> Callable[[Path], bool]:
    def is_one(path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(beginning)) == beginning

    return is_one


MEMORY_FORMAT = "deltamem-memory"

MEMORY = Kind("a memory file", lambda path: _safetensors(path)[0].get("format") == MEMORY_FORMAT)
MEMORY_NPZ = Kind("an exported memory", lambda path: set(_members(path)) == {"state.npy", "metadata.npy"})
MEMORY_JSON = json_of("an exported memory", {"metadata", "state"})
MODEL = Kind("a model in one GGUF file", _is_model)
SHARD = Kind("a part of a split model", lambda path: _is_model(path, shard=True))
ADAPTER = Kind("a δ-mem adapter", _is_adapter)
CONFIG = json_of("a δ-mem checkpoint's configuration", {"rank", "alpha"})
WEIGHTS = Kind(
    "a δ-mem checkpoint's weights", lambda path: any(name.endswith(".memory_q_proj") for name in _safetensors(path)[1])
)
PYTORCH = Kind("a PyTorch checkpoint", lambda path: any(name.endswith("/data.pkl") for name in _members(path)))
TOKENIZER = Kind("a tokenizer of sentencepiece", _begins(b"\n"))  # the first field of its message
PNG = Kind("a PNG picture", _begins(b"\x89PNG\r\n\x1a\n"))
CONVERSATIONS = Kind("lines of JSON", _lines)
