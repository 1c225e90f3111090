"""Which weights prompts multiply in BF16: llama.cpp gets them in a buffer type of ours (deltamem-bf16.h).

Where the processor multiplies BF16 that is up to seven times as fast as ggml's products of weights in Q4_0 to Q8_0.
Replies are computed as ever, from the weights as they are in the file. What llama.cpp repacks into a layout of its own
cannot be taken from there, and its replies are faster so: REST leaves it out. `deltamem tune` measures what is faster.

Nothing is unpacked unless asked for, or chosen by `deltamem tune`. A product of eight tokens or more rounds otherwise
than one of fewer, so what is decoded in the same batch decides the last bits of a text. The weights are a copy in
memory of the process: a file is not mapped to a buffer type of ours.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import Any

from gguf import GGMLQuantizationType as Type

from ..errors import ModelError
from ..formats.gguf_header import Header, Tensor
from . import library
from .devices import gpu_names
from .ggml import ctypes_function

NONE, REST, ALL = UNPACK = ("none", "rest", "all")

# of least_tokens in deltamem-bf16.cpp
_TYPES = {
    NONE: set[Type](),
    REST: {Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q6_K},
    ALL: {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q6_K, Type.BF16},
}
_REPACKED = {Type.Q4_0, Type.Q4_K, Type.Q2_K, Type.IQ4_NL, Type.MXFP4}  # by llama.cpp on x86: repack.cpp
_WEIGHT = re.compile(r"blk\.(\d+)\.(\w+\.weight)")  # of a layer: a prompt asks for the logits of one token


# ggml_backend_buffer_type_t ggml_backend_deltamem_bf16_buffer_type(void);
@ctypes_function("ggml_backend_deltamem_bf16_buffer_type", [], ctypes.c_void_p)
def ggml_backend_deltamem_bf16_buffer_type() -> int: ...


# struct llama_model_tensor_buft_override { const char * pattern; ggml_backend_buffer_type_t buft; };
class llama_model_tensor_buft_override(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def multiplies_bf16() -> bool:
    """Whether products in BF16 are faster here: the processor has AVX512-BF16 and no tiles of integers, and no GPU
    would take a prompt's products from it.
    """
    info = library.llama_cpp.llama_print_system_info().decode()
    return "AVX512_BF16 = 1" in info and "AMX_INT8 = 1" not in info and not gpu_names()


def patterns(tensors: dict[str, Tensor], unpack: str) -> list[str]:
    """Regular expressions for the names of the weights that are unpacked: one for each kind of weight in a layer."""
    layers: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        weight = _WEIGHT.fullmatch(name)
        if weight and len(tensor.shape) == 2 and tensor.type in _TYPES[unpack]:
            layers.setdefault(weight[2], []).append(weight[1])
    return [rf"^blk\.({'|'.join(numbers)})\.{re.escape(kind)}$" for kind, numbers in layers.items()]


def layouts(model: str | os.PathLike[str]) -> list[tuple[bool, str]]:
    """In which ways a model may be loaded that differ, as (repack, unpack): as by default, as in the file, and with
    weights that prompts multiply in BF16. Raises ModelError.
    """
    found = [(True, NONE), (False, NONE)]
    if not multiplies_bf16():
        return found
    tensors = Header.of_model(model).tensors
    rest, all_of = (patterns(tensors, unpack) for unpack in (REST, ALL))
    if rest:
        found.append((True, REST))
    if all_of != rest or any(_WEIGHT.fullmatch(name) and t.type in _REPACKED for name, t in tensors.items()):
        found.append((False, ALL))
    return found


def overrides(model: str | os.PathLike[str], unpack: str) -> Any:
    """llama_model_params.tensor_buft_overrides for a model, an array that must live until it is loaded; None: no
    weight is unpacked, or the processor does not multiply BF16.
    """
    if unpack == NONE or not multiplies_bf16():
        return None
    try:
        found = patterns(Header.of_model(model).tensors, unpack)
    except ModelError:  # loading it says what is wrong
        return None
    if not found:
        return None
    array = (llama_model_tensor_buft_override * (len(found) + 1))()
    for entry, pattern in zip(array, found):
        entry.pattern, entry.buft = pattern.encode(), ggml_backend_deltamem_bf16_buffer_type()
    return array
