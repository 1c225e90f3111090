"""The small model that the package brings, with its memories: see models/README.md for what it can and cannot do."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError

FOLDER = Path(__file__).parent
MEMORIES = ("tsw", "ssw", "msw")


def default_files() -> tuple[Path, dict[str, Path]]:
    """The model and, by write strategy, its memory adapters. Raises ModelError if they were not installed."""
    model = FOLDER / "default.gguf"
    memories = {name: FOLDER / f"default-{name}.gguf" for name in MEMORIES}
    for path in (model, *memories.values()):
        if not path.is_file():
            raise ModelError(f"{path}: the model of the package is missing: reinstall pydeltamem")
    return model, memories
