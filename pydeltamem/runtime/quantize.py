"""Quantises a model with llama.cpp's own quantiser. A packed adapter keeps its type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from gguf import GGUF_DEFAULT_ALIGNMENT as DEFAULT

from ..errors import InputError, ModelError
from ..formats.gguf_header import Header
from ..formats.kinds import MODEL
from ..formats.model_numbers import check_numbers
from ..formats.outputs import check_disk, refuse_inputs, writing
from .children import environment
from .cpus import MAX_THREADS
from .names import option

_PREFIXES = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")


def grown(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> str:
    """Which tensors became larger, by their types: "2 tensors Q6_K that were Q4_1 (+0.24 MB)"."""
    old = Header.of_model(before).tensors
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, tensor in Header.of_model(after).tensors.items():
        if name in old and tensor.n_bytes > old[name].n_bytes:
            sizes = kinds.setdefault((tensor.type_name, old[name].type_name), [])
            sizes.append(tensor.n_bytes - old[name].n_bytes)
    parts = [f"{len(n)} tensors {new} that were {was} (+{sum(n) / 1e6:,.2f} MB)" for (new, was), n in kinds.items()]
    return ", ".join(parts) or "its header longer"


def file_type(name: str) -> int:
    """llama.cpp's number of a type, by llama-quantize's name for it. Raises InputError if there is none."""
    from . import library

    known: dict[str, int] = {
        key.removeprefix(prefix).lower(): value
        for key, value in vars(library.llama_cpp).items()
        for prefix in _PREFIXES
        if key.startswith(prefix)
    }
    if name.lower() not in known:
        raise InputError(f"'{name}' is no type of llama.cpp: name one of {', '.join(sorted(known))}")
    return known[name.lower()]


def quantize(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    type: str,
    n_threads: int = 0,
    allow_requantize: bool = False,
    verbose: bool = False,
) -> None:
    """Writes `model` in another type, in one step.

    n_threads 0: as many as there are CPUs.

    Raises ModelError, InputError if there is no such type, there are too many threads or `path` is a file of the model,
    OutputError if it cannot be written.
    """
    from .ggml import written

    if not 0 <= n_threads <= MAX_THREADS:
        raise InputError(f"{option('n_threads')} is 0 to {MAX_THREADS}, not {n_threads}")
    ftype = file_type(type)
    header = Header.of_model(model)
    if header.keys.get("general.type") == "adapter":
        raise ModelError(f"{header.path}: this is an adapter: convert it again with --outtype, or pack it first")
    check_numbers(header.path, header.keys)
    refuse_inputs(path, header.files)
    aligns = header.keys.get("general.alignment", DEFAULT) != DEFAULT
    with writing(path, MODEL) as temporary:
        work = [os.fsdecode(header.path), os.fsdecode(temporary), ftype, n_threads, allow_requantize, aligns, verbose]
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, json.dumps(work)],
            env=environment(PYTHONIOENCODING="utf-8:surrogateescape"),
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            encoding="utf-8",
            errors="surrogateescape",
        )
        if done.returncode != 0:
            check_disk(path, temporary)
            reason = done.stdout or f": llama.cpp ended the process ({done.returncode})"
            hint = ": pass --allow-requantize to do it anyway" if "requantizing" in reason else ""
            if "validation failed" in reason:
                hint = f": a value is not finite as {type}: use bf16 or f32, unless the model itself is damaged"
            raise ModelError(f"{header.path}: cannot be quantised{reason}{hint}")
        written(temporary, header.path)


def _work(
    model: str, path: str, ftype: int, n_threads: int, allow_requantize: bool, aligns: bool, verbose: bool
) -> int:
    """What another process does, which can be ended at any time: llama.cpp's call takes minutes, and Python handles no
    signal meanwhile. Prints why it failed.
    """
    from llama_cpp._logger import set_verbose

    from . import library

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    params = library.llama_cpp.llama_model_quantize_default_params()
    # llama.cpp aligns tensors by its default, but copies the key that may say otherwise
    overrides = (library.llama_cpp.llama_model_kv_override * 2)()  # the second one ends the list
    if aligns:
        overrides[0].tag = library.llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].key = b"general.alignment"
        overrides[0].value.val_i64 = DEFAULT
        params.kv_overrides = overrides
    params.ftype = ftype
    params.nthread = n_threads
    params.allow_requantize = allow_requantize
    set_verbose(verbose)
    with library.errors_held() as log:
        status: int = library.llama_cpp.llama_model_quantize(os.fsencode(model), os.fsencode(path), params)
        if status != 0:
            print(library.reason(log), end="")
    return status


if __name__ == "__main__":
    sys.exit(_work(*json.loads(sys.argv[1])))
