"""What `deltamem tune` found fastest for a model on this machine, kept as JSON in the user's cache.

A record holds for one model file, one build of the library and one processor with as many CPUs. What was found under
other circumstances is ignored, and so is a damaged record: then there is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import OutputError
from .formats.kinds import Kind
from .formats.outputs import make_folder, writing
from .hub import cache_folder
from .runtime import library
from .runtime.cpus import MAX_THREADS, cpu_name, default_threads, usable
from .runtime.devices import gpu_names
from .runtime.unpacking import NONE, UNPACK
from .version import __version__

FORMAT, VERSION = "deltamem-tuned", 2
PLAIN_TYPES = ("f32", "f16", "bf16")  # of V without flash attention: llama.cpp takes no others

_KIND = Kind("a record of deltamem tune", lambda path: True)  # a damaged one is replaced too


@dataclass(frozen=True)
class Settings:
    """What decides the speed of a model on a machine; names as the keywords of `DeltaMemLlama`."""

    repack: bool  # of the weights, into the layout of the fastest products of this CPU
    unpack: str  # which weights prompts multiply in BF16: of UNPACK
    flash_attn: bool
    type_k: str  # by ggml's name, as "f16"
    type_v: str
    n_threads: int  # for a reply
    n_threads_batch: int  # for prompts
    n_ubatch: int

    @classmethod
    def default(cls) -> Settings:
        """Those of `DeltaMemLlama` on this machine."""
        n_threads, n_threads_batch = default_threads()
        return cls(True, NONE, False, "f16", "f16", n_threads, n_threads_batch, 512)

    @classmethod
    def of(cls, found: Any) -> Settings:
        """Those of a record. Raises ValueError if they are none."""
        kinds = cls.__annotations__
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError("other names")
        if any(type(value).__name__ != kinds[name] for name, value in found.items()):
            raise ValueError("other types")
        settings = cls(**found)
        if settings.unpack not in UNPACK:
            raise ValueError("another choice of weights")
        numbers = (settings.n_threads, settings.n_threads_batch)
        if not all(1 <= n <= MAX_THREADS for n in numbers) or not 1 <= settings.n_ubatch < 2**31:
            raise ValueError("a number out of range")
        if not all(
            hasattr(library.llama_cpp, f"GGML_TYPE_{name.upper()}") for name in (settings.type_k, settings.type_v)
        ):
            raise ValueError("another type")
        return settings

    def keywords(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of `DeltaMemLlama` that are not given; None counts as not given."""
        found = asdict(self)
        for name in ("type_k", "type_v"):
            found[name] = getattr(library.llama_cpp, f"GGML_TYPE_{found[name].upper()}")
        if given.get("flash_attn") is False and self.type_v not in PLAIN_TYPES:
            del found["type_k"], found["type_v"]
        if given.get("embedding"):
            del found["n_ubatch"]  # decides how long a text may be
        return {name: value for name, value in found.items() if given.get(name) is None}


@dataclass(frozen=True)
class Record:
    """Settings, and how they were found (`pydeltamem.bench.tune.run`)."""

    settings: Settings
    found: dict[str, Any]


def circumstances(model: str, n_gpu_layers: int) -> dict[str, Any]:
    """For what a record holds: files of the model and of the library, processor, CPUs that may be used, GPUs, and the
    layers on them. Raises OSError if a file is missing.
    """
    folder = Path(library.library_folder())
    gpus = gpu_names()
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and ("llama" in path.name or "ggml" in path.name)
    )
    return {
        "model": {"name": os.path.basename(model), **_facts(model)},
        "library": {
            "pydeltamem": __version__,
            "llama_cpp": library.llama_cpp.__version__,
            "files": {path.name: _facts(path) for path in files},
        },
        "processor": cpu_name(),
        "cpus": usable(),
        "gpus": gpus,
        "gpu_layers": n_gpu_layers if gpus else 0,
    }


def _facts(path: str | os.PathLike[str]) -> dict[str, int]:
    status = os.stat(path)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def record_path(holds_for: Mapping[str, Any]) -> Path:
    """Where the record for these circumstances is kept."""
    key = hashlib.sha256(json.dumps(holds_for, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "tuned" / f"{Path(holds_for['model']['name']).stem[:60]}-{key}.json"


def check_keeping(model: str, n_gpu_layers: int) -> None:
    """Raises OutputError if a record for this model and machine cannot be kept. Makes no folder."""
    path = record_path(circumstances(model, n_gpu_layers))
    folder = next(folder for folder in path.parents if os.path.exists(folder))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: is no folder that can be written, where {path.name} would be kept")


def keep(record: Record, model: str, n_gpu_layers: int) -> Path:
    """Keeps a record for this model and machine, instead of an earlier one. Returns its path. Raises OutputError."""
    holds_for = circumstances(model, n_gpu_layers)
    path = record_path(holds_for)
    make_folder(path.parent)
    text = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "for": holds_for,
            "settings": asdict(record.settings),
            "found": record.found,
        },
        indent=2,
    )
    with writing(path, _KIND) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def kept(model: str, n_gpu_layers: int) -> Record | None:
    """The record for this model and machine; None if there is none that can be read."""
    try:
        holds_for = circumstances(model, n_gpu_layers)
        data = json.loads(record_path(holds_for).read_bytes())
        if (data["format"], data["version"], data["for"]) != (FORMAT, VERSION, holds_for):
            return None
        return Record(Settings.of(data["settings"]), dict(data["found"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
