"""The memory does not change how llama.cpp's tensors are aligned to the CPU's cache lines.

The blocks of a product are one line wide. If they are shifted by half a line, two threads write to each line, and K·Q
of a prompt took up to 1.6 times as long.
"""

from __future__ import annotations

import ctypes

import pytest

from native_context import llama, open_context
from pydeltamem.models import default_files

CACHE_LINE = 64


def product_offsets(adapter, n_tokens: int) -> list[int]:
    """Where in their cache lines the results of llama.cpp's products begin, in a batch of n_tokens."""
    ggml = ctypes.CDLL(llama.llama_cpp._lib._name)  # also finds functions of the libraries that it links to
    for name, kind in (
        ("ggml_get_data", ctypes.c_void_p),
        ("ggml_get_name", ctypes.c_char_p),
        ("ggml_op_desc", ctypes.c_char_p),
    ):
        function = getattr(ggml, name)
        function.argtypes, function.restype = [ctypes.c_void_p], kind
    offsets: list[int] = []

    @llama.ggml_backend_sched_eval_callback
    def observe(tensor, ask, _):
        name = ggml.ggml_get_name(tensor).decode()
        if not ask and ggml.ggml_op_desc(tensor) == b"MUL_MAT" and not name.startswith("deltamem"):
            offsets.append(ggml.ggml_get_data(tensor) % CACHE_LINE)
        return True

    with open_context(default_files()[0], adapter, eval_callback=observe) as context:
        context.decode([(i, 0) for i in range(1, n_tokens + 1)])
    return offsets


@pytest.mark.parametrize("strategy", ["tsw", "msw"])
@pytest.mark.parametrize("n_tokens", [1, 7, 33, 64])
def test_products_begin_where_they_began(strategy, n_tokens):
    without = product_offsets(None, n_tokens)
    assert len(without) > 4 * 7 and set(without) == {0}
    assert product_offsets(default_files()[1][strategy], n_tokens) == without
