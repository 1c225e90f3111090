"""A Hugging Face model directory to GGUF, by the converter of the llama.cpp that we build.

The converter is installed with the package, next to the libraries. It runs in its own process, because it imports its
own version of gguf.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from pydeltamem import errors
from pydeltamem.errors import LibraryError, ModelError, named
from pydeltamem.formats.kinds import MODEL
from pydeltamem.formats.outputs import check_disk, files_of, refuse_inputs, writing

# a draft model uses another model's embeddings; an audio decoder names its layers differently
OTHERWISE = frozenset({"gemma4-assistant", "wavtokenizer-dec"})

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py. Raises LibraryError if it was not installed."""
    script = Path(errors.__file__).parent / "lib" / "converter" / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise LibraryError(f"{script}: llama.cpp's converter is missing: reinstall pydeltamem")
    return script


def convert_base(
    directory: str | os.PathLike[str],
    path: str | os.PathLike[str],
    outtype: str = "auto",
    name: str | None = None,
    verbose: bool = False,
) -> None:
    """Writes the model of a Hugging Face directory as GGUF, in one step.

    Raises ModelError, InputError if `path` is a file of that directory, OutputError if it cannot be written.
    """
    directory = Path(directory)
    if not os.path.isfile(directory / "config.json"):
        raise ModelError(f"{named(directory)}: is no Hugging Face model directory: it has no config.json")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"{directory}: converting it needs {' and '.join(missing)}: pip install 'pydeltamem[convert]'")
    refuse_inputs(path, files_of(directory))
    with writing(path, MODEL) as temporary:
        command = [sys.executable, str(converter()), str(directory), "--outfile", str(temporary)]
        command += ["--outtype", outtype, *(["--model-name", name] if name else [])]
        done = subprocess.run(command, stderr=None if verbose else subprocess.PIPE, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            check_disk(path, temporary)
            raise ModelError(f"{directory}: llama.cpp's converter refuses it{_reason(done.stderr)}")
        _check_whole(directory, temporary)


def _check_whole(directory: Path, path: Path) -> None:
    """Raises ModelError if the file lacks weights, which the converter does not check, or does not load."""
    from pydeltamem.runtime.ggml import written

    header = written(path, directory)
    if not header.tensors:
        raise ModelError(f"{directory}: has no weights")
    architecture = header.keys.get("general.architecture")
    if architecture in OTHERWISE:
        return
    n_layer, n_nextn = (header.keys.get(f"{architecture}.{key}", 0) for key in ("block_count", "nextn_predict_layers"))
    for name in ("token_embd.", f"blk.{n_layer - n_nextn - 1}."):
        if not any(name in tensor for tensor in header.tensors):
            raise ModelError(f"{directory}: is incomplete, no weights for {name}*: are files missing?")


def _reason(log: bytes | None) -> str:
    """The last line, which names the error, without the logger's prefix."""
    lines = [line.strip() for line in (log or b"").decode("utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and "%|" not in line]  # a progress bar
    return f": {lines[-1].removeprefix('ERROR:hf-to-gguf:').strip()}" if lines else ": see --verbose"
