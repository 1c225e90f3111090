"""Which architectures take an adapter, asked of the library itself.

For each architecture that the built llama.cpp knows, another process makes a tiny model with the hyperparameters of
llama.cpp's own tests. It attaches an adapter to each layer, as with any model. The tiny models come from a library that
nothing else loads (native/deltamem_architectures). architectures.json says what was compared with PyTorch;
`make architectures` writes it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, LibraryError
from ..formats.base_model import converts
from ..version import __version__
from . import library
from .children import environment

HEADS = "qkvo"
RESULTS = Path(__file__).with_name("architectures.json")

# each status, and the evidence for it
STATUSES = {
    "verified": "every layer of a tiny model takes an adapter, and the models that are named have PyTorch's numbers",
    "supported": "every layer of a tiny model takes an adapter",
    "in part": "some layers of a tiny model take an adapter, or some corrections",
    "refused": "no layer of a tiny model takes an adapter, or llama.cpp runs no such model",
    "unknown": "llama.cpp's tests make no tiny model to ask; attaching an adapter to a real one tells",
}


@functools.cache
def tiny_models() -> ctypes.CDLL:
    """The functions of deltamem-architectures.h. Raises LibraryError."""
    from llama_cpp._ctypes_extensions import load_shared_library

    folder = library.library_folder()
    try:
        loaded: ctypes.CDLL = load_shared_library("deltamem-architectures", Path(folder))
    except (FileNotFoundError, RuntimeError) as error:
        raise LibraryError(f"{folder} has no library of tiny models ({error}): reinstall pydeltamem") from error

    # const char * deltamem_architecture_name(int32_t i);
    loaded.deltamem_architecture_name.argtypes = [ctypes.c_int32]
    loaded.deltamem_architecture_name.restype = ctypes.c_char_p
    # struct llama_model * deltamem_tiny_model(const char * architecture);
    loaded.deltamem_tiny_model.argtypes = [ctypes.c_char_p]
    loaded.deltamem_tiny_model.restype = library.llama_model_p_ctypes
    # int32_t deltamem_tiny_adapter(
    #     const struct llama_model * model, int32_t il, const char * heads, const char * path);
    loaded.deltamem_tiny_adapter.argtypes = [
        library.llama_model_p_ctypes,
        ctypes.c_int32,
        ctypes.c_char_p,
        ctypes.c_char_p,
    ]
    loaded.deltamem_tiny_adapter.restype = ctypes.c_int32
    return loaded


def names() -> list[str]:
    """Every architecture that the built llama.cpp knows."""
    found = (tiny_models().deltamem_architecture_name(i) for i in itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, found)]


def describe(wanted: Sequence[str] = ()) -> dict[str, Any]:
    """How far the library supports these architectures, or all, as values that JSON can hold. Raises InputError."""
    known = names()
    for name in wanted:
        if name not in known:
            raise InputError(f"'{name}' is no architecture that llama.cpp knows: `deltamem architectures` lists them")
    verified = [
        {key: model[key] for key in ("model", "layers", "backbone", "logits", "state")} | {"of": model["architecture"]}
        for model in _results(library.LLAMA_CPP_VERSION)
    ]
    rows = []
    for name, answer in _answers(list(dict.fromkeys(wanted)) or known):
        models = [{key: model[key] for key in model if key != "of"} for model in verified if model["of"] == name]
        rows.append({
            "architecture": name,
            "status": _status(answer, models),
            "converts": converts(name),
            **answer,
            "verified": models,
        })  # fmt: skip
    return {
        "version": __version__,
        "llama_cpp_python": library.LLAMA_CPP_VERSION,
        "statuses": STATUSES,
        "architectures": sorted(rows, key=lambda row: (list(STATUSES).index(row["status"]), row["architecture"])),
    }


def _results(version: str) -> list[dict[str, Any]]:
    """The comparisons with PyTorch, if they were made with this version of llama.cpp."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results["models"] if results["llama_cpp_python"] == version else []


def _status(answer: dict[str, Any], verified: list[Any]) -> str:
    if answer["problem"]:
        return "refused" if answer["refused"] else "unknown"
    takes = [layer["corrects"] for layer in answer["layers"]]
    if all(heads == HEADS for heads in takes):
        return "verified" if verified else "supported"
    return "in part" if any(takes) else "refused"


#
# asking
#


def _answers(wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each name with the answer of `_ask`. A failed assertion of llama.cpp ends the process that asks; a new process
    asks about the rest.
    """
    while wanted:
        command = [sys.executable, "-m", "pydeltamem.runtime.architectures", *wanted]
        with subprocess.Popen(
            command,
            env=environment(GGML_NO_BACKTRACE="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            for line in process.stdout or ():
                yield wanted.pop(0), json.loads(line)
        if wanted:
            yield wanted.pop(0), _problem("the hyperparameters of llama.cpp's tests do not make a model of it")


def _problem(text: str, refused: bool = False) -> dict[str, Any]:
    return {"problem": text, "refused": refused, "layers": []}


def _ask(name: str, scratch: str) -> dict[str, Any]:
    """The corrections that each layer of a tiny model takes, and why it refuses others."""
    llama = library.llama_cpp
    with library.errors_held() as log:
        model = tiny_models().deltamem_tiny_model(name.encode())
        reasons, log[:] = library.reason(log), []
    if not model:
        if "is not supported" in library.last_error():
            return _problem(library.last_error(), True)
        refused = any(says in reasons for says in ("unsupported model architecture", "cannot be used as main model"))
        return _problem(reasons.removeprefix(": ") or library.last_error(), refused)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    with library.errors_held() as log:
        context = llama.llama_init_from_model(model, params)
        reasons, log[:] = library.reason(log), []
    if not context:
        return _problem(reasons.removeprefix(": ") or "llama.cpp makes no context for it")

    def refusal(layer: int, heads: str) -> str:
        """Why attaching is refused; empty if it is not."""
        with library.errors_held() as log:
            status = tiny_models().deltamem_tiny_adapter(model, layer, heads.encode(), scratch.encode())
            adapter = None if status else library.llama_deltamem_adapter_load(model, scratch.encode())
            status = library.llama_deltamem_attach(context, adapter) if adapter else -1
            if adapter:
                library.llama_deltamem_detach(context)
                library.llama_deltamem_adapter_free(adapter)
            log.clear()
        return library.last_error() if status else ""

    layers = []
    for layer in range(llama.llama_model_n_layer(model)):
        reason = refusal(layer, HEADS)
        corrects = "".join(head for head in HEADS if not refusal(layer, head)) if reason else HEADS
        layers.append({"corrects": corrects, "reason": reason})
    llama.llama_free(context)
    llama.llama_model_free(model)
    return {"problem": "", "refused": False, "layers": layers}


def _worker(wanted: Sequence[str]) -> None:
    from llama_cpp._logger import set_verbose

    set_verbose(False)  # only errors, which _ask holds
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            print(json.dumps(_ask(name, os.path.join(folder, "adapter.gguf"))), flush=True)


if __name__ == "__main__":
    _worker(sys.argv[1:])
