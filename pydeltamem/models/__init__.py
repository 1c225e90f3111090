"""The small model that the package ships, with its adapters, and the adapter of a real model that hub.py fetches.

models/README.md says what the small one can and cannot do.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError

FOLDER = Path(__file__).parent
MEMORIES = ("tsw", "ssw", "msw")
REAL_MODEL = "smollm2"  # its name in hub.py
ADAPTERS = {REAL_MODEL: "smollm2-msw.gguf", "smollm2-tsw": "smollm2-tsw.gguf"}  # of it, by name


def default_files() -> tuple[Path, dict[str, Path]]:
    """The model and, by write strategy, its adapters. Raises ModelError if they were not installed."""
    model = FOLDER / "default.gguf"
    memories = {name: FOLDER / f"default-{name}.gguf" for name in MEMORIES}
    for path in (model, *memories.values()):
        if not path.is_file():
            raise ModelError(f"{path}: the model of the package is missing: reinstall pydeltamem")
    return model, memories


def shipped_adapter(name: str) -> Path | None:
    """The adapter that this package ships by this name; None if it ships none."""
    path = FOLDER / ADAPTERS[name] if name in ADAPTERS else None
    return path if path is not None and path.is_file() else None


def real_adapter() -> Path | None:
    """The adapter of the real model; None if this package has none."""
    return shipped_adapter(REAL_MODEL)
