"""A Hugging Face model directory to GGUF, by the converter of the llama.cpp that we build.

The converter is installed with the package, next to the libraries. It runs in its own process, because it imports its
own version of gguf.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import safetensors

from pydeltamem import errors
from pydeltamem.errors import LibraryError, ModelError, named
from pydeltamem.formats.kinds import MODEL
from pydeltamem.formats.model_numbers import check_numbers
from pydeltamem.formats.outputs import as_text, check_disk, files_of, refuse_inputs, writing
from pydeltamem.formats.pointer import refuse_pointer

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
    if not os.path.exists(directory):
        raise ModelError(f"{named(directory)}: no such directory: name that of a Hugging Face model")
    if not os.path.isfile(directory / "config.json"):
        raise ModelError(f"{named(directory)}: is no Hugging Face model directory: it has no config.json")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"{directory}: converting it needs {' and '.join(missing)}: pip install 'pydeltamem[convert]'")
    refuse_inputs(path, files_of(directory))
    _check_parts(directory, names_in(directory))
    with writing(path, MODEL) as temporary:
        out = temporary.with_name(re.sub(r"[{}]", r"\g<0>\g<0>", temporary.name))  # the converter fills in its name
        source = os.path.abspath(directory)  # the model gets its last name: "." has none, and "-x" would be an option
        command = [sys.executable, str(converter()), source, "--outfile", str(out)]
        command += ["--outtype", outtype, *([f"--model-name={as_text(name)}"] if name else [])]
        done = subprocess.run(command, stderr=None if verbose else subprocess.PIPE, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            check_disk(path, temporary)
            if done.returncode < 0:
                signal = -done.returncode  # 9 of a system that has no memory left
                raise ModelError(
                    f"{directory}: signal {signal} ended llama.cpp's converter: has the machine enough memory?"
                )
            _check_files(directory)
            raise ModelError(f"{directory}: llama.cpp's converter refuses it{_reason(done.stderr)}")
        _check_whole(directory, temporary)


def names_in(directory: str | os.PathLike[str]) -> list[str]:
    """The files of a model's directory. Raises ModelError if it may not be read."""
    try:
        return os.listdir(directory)
    except OSError as error:
        raise ModelError(f"{named(directory)}: cannot be read: {error.strerror}") from error


def _check_parts(directory: Path, there: list[str]) -> None:
    """Raises ModelError if one of model-0000I-of-0000N files is missing. With an index the converter checks it."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        names = [name for name in there if name.startswith(stem) and name.endswith(suffix)]
        parts = [re.fullmatch(r"(.+-)\d{5}(-of-(\d{5})\..+)", name) for name in names]
        for part in parts:
            wanted = [f"{part[1]}{i:05d}{part[2]}" for i in range(1, int(part[3]) + 1)] if part else []
            missing = [name for name in wanted if name not in names]
            if missing and not os.path.isfile(directory / f"{stem}{suffix}.index.json"):
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise ModelError(f"{directory}: is incomplete: {missing[0]}{more} of {len(wanted)} parts is missing")
        if names:
            return


def _check_files(directory: Path) -> None:
    """Raises ModelError if a file is not there as a whole. The converter fails then, but does not name the file."""
    for path in sorted(directory.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".json", ".model"):
            refuse_pointer(path, ModelError)
    for path in sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("pytorch_model*.bin")):
        if path.is_file() and not _is_weights(path):
            raise ModelError(f"{path}: is cut off, or in a format that the converter does not read: download it again")


def _is_weights(path: Path) -> bool:
    if path.suffix == ".bin":
        return zipfile.is_zipfile(path)
    try:
        with safetensors.safe_open(path, framework="numpy"):
            return True
    except safetensors.SafetensorError:
        return False


def _check_whole(directory: Path, path: Path) -> None:
    """Raises ModelError if the file lacks weights that llama.cpp asks for, which the converter does not check."""
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
    check_numbers(directory, header.keys)
    if missing := _missing_tensor(path):
        raise ModelError(f"{directory}: is incomplete, no weights for {missing}: are files missing?")


def _missing_tensor(path: Path) -> str | None:
    """The first tensor that llama.cpp misses in a model; None if it misses none. Loads no weights."""
    from llama_cpp._utils import suppress_stdout_stderr

    from pydeltamem.runtime import library

    params = library.llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    # asked first when all tensors are known and none is read: it ends the load
    params.progress_callback = library.llama_cpp.llama_progress_callback(lambda progress, data: False)
    level = library.logger.level
    library.logger.setLevel("ERROR")  # llama_cpp prints everything until the first model is loaded
    with library.silencing, library.errors_held() as log, suppress_stdout_stderr(disable=False):
        model = library.llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        said = " ".join(log)
        log.clear()  # whatever else it does not like, the file is what the converter makes of the model
    library.logger.setLevel(level)
    if model:
        library.llama_cpp.llama_model_free(model)
    missing = re.search(r"missing tensor '(.+?)'|tensor '(.+?)' not found", said)
    return missing and (missing[1] or missing[2])


def _reason(log: bytes | None) -> str:
    """The last line, which names the error, without the logger's prefix. None: the log was shown."""
    if log is None:
        return ""
    lines = [line.strip() for line in log.decode("utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and "%|" not in line]  # a progress bar
    return f": {lines[-1].removeprefix('ERROR:hf-to-gguf:').strip()}" if lines else ": see --verbose"
