"""δ-mem for llama.cpp: `DeltaMemLlama` is `llama_cpp.Llama` with a memory that learns from every token.

The names below load llama.cpp when they are first used, so `deltamem convert` and `deltamem inspect` start without it.
Once this package is imported, llama-cpp-python loads the package's own library (_pydeltamem_startup.py).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import _pydeltamem_startup  # noqa: F401 - for a checkout that is not installed, where no .pth file imports it

from .errors import (
    AdapterError,
    CheckpointError,
    DecodeError,
    DeltaMemError,
    FetchError,
    InputError,
    LibraryError,
    MemoryFileError,
    MemoryFileInUse,
    ModelError,
    NotFiniteError,
    OutputError,
    TrainingError,
)
from .version import __version__

if TYPE_CHECKING:
    from .conversation import Conversation, say_together, stream_together
    from .formats.memory_file import MemorySnapshot
    from .llama import DeltaMemLlama
    from .memory import Memory

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Conversation",
    "DecodeError",
    "DeltaMemError",
    "DeltaMemLlama",
    "FetchError",
    "InputError",
    "LibraryError",
    "Memory",
    "MemoryFileError",
    "MemoryFileInUse",
    "MemorySnapshot",
    "ModelError",
    "NotFiniteError",
    "OutputError",
    "TrainingError",
    "__version__",
    "say_together",
    "stream_together",
]

_LAZY = {
    "Conversation": ".conversation",
    "DeltaMemLlama": ".llama",
    "Memory": ".memory",
    "MemorySnapshot": ".formats.memory_file",
    "say_together": ".conversation",
    "stream_together": ".conversation",
}

if "llama_cpp" in sys.modules:
    importlib.import_module(".runtime.library", __name__)  # raises if llama_cpp has loaded another library


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
