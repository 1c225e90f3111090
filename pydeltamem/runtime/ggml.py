"""Asks ggml about GGUF files: whether it can map one, and whether the stored values are finite."""

from __future__ import annotations

import ctypes
import glob
import os
import re
from pathlib import Path

import numpy as np
from llama_cpp._ctypes_extensions import ctypes_function_for_shared_library, load_shared_library
from llama_cpp._utils import suppress_stdout_stderr

from ..errors import ModelError
from ..formats.gguf_header import Header, Tensor
from . import library

TENSOR_ALIGNMENT = 32  # of ggml-impl.h: a mapped tensor must begin at a multiple of it
_PIECE = 1 << 26  # bytes that are checked at once

ctypes_function: library.Declare = ctypes_function_for_shared_library(
    load_shared_library("ggml-base", Path(library.library_folder()))
)

gguf_context_p = int
gguf_context_p_ctypes = ctypes.c_void_p


# struct gguf_init_params { bool no_alloc; struct ggml_context ** ctx; };
class gguf_init_params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


# struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
@ctypes_function("gguf_init_from_file", [ctypes.c_char_p, gguf_init_params], gguf_context_p_ctypes)
def gguf_init_from_file(fname: bytes, params: gguf_init_params, /) -> gguf_context_p | None: ...


# void gguf_free(struct gguf_context * ctx);
@ctypes_function("gguf_free", [gguf_context_p_ctypes], None)
def gguf_free(ctx: gguf_context_p, /) -> None: ...


# size_t gguf_get_alignment(const struct gguf_context * ctx);
@ctypes_function("gguf_get_alignment", [gguf_context_p_ctypes], ctypes.c_size_t)
def gguf_get_alignment(ctx: gguf_context_p, /) -> int: ...


# bool ggml_validate_row_data(enum ggml_type type, const void * data, size_t nbytes);
@ctypes_function("ggml_validate_row_data", [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_bool)
def ggml_validate_row_data(type: int, data: int, nbytes: int, /) -> bool: ...


def can_be_mapped(path: str | os.PathLike[str]) -> bool:
    """Whether llama.cpp can map the file, and the other shards of its model. It would end the process where a tensor
    does not begin at a multiple of 32 bytes. True for a file that is no GGUF.
    """
    path = Path(path)
    split = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path.name)
    parts = path.parent.glob(f"{glob.escape(split[1])}?????{split[2]}") if split else [path]
    return all(_alignment(part) % TENSOR_ALIGNMENT == 0 for part in parts)


def _alignment(path: Path) -> int:
    level = library.logger.level
    library.logger.setLevel("ERROR")  # llama_cpp prints everything until the first model is loaded
    with library.errors_held() as lines:
        context = gguf_init_from_file(os.fsencode(path), gguf_init_params(True, None))
        lines.clear()  # loading the model reports what is wrong
    library.logger.setLevel(level)
    if not context:
        return TENSOR_ALIGNMENT
    alignment = gguf_get_alignment(context)
    gguf_free(context)
    return alignment


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite as stored in the file."""
    data = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (tensor.n_bytes,))
    piece = _PIECE - _PIECE % tensor.block_bytes
    with library.silencing, suppress_stdout_stderr(disable=False):  # ggml prints the position
        return all(
            ggml_validate_row_data(int(tensor.type), part.ctypes.data, part.nbytes)
            for part in (data[at : at + piece] for at in range(0, tensor.n_bytes, piece))
        )


def written(path: Path, source: str | os.PathLike[str]) -> Header:
    """Checks a model that llama.cpp's own writers made of `source`, and returns its header.

    Raises ModelError, which names `source`, if the model cannot be read or holds values that are not finite.
    """
    try:
        header = Header(path)
    except ModelError as error:
        raise ModelError(f"{os.fspath(source)}: llama.cpp's output {str(error).partition(': ')[2]}") from error
    for tensor in header.tensors.values():
        if tensor.n_bytes and not is_finite(tensor):
            raise ModelError(
                f"{os.fspath(source)}: {tensor.name} holds values that are not finite as {tensor.type_name}: "
                "write it as bf16 or f32, unless they are not finite to begin with"
            )
    return header
