"""Graphs of ggml from Python, computed by one thread of the CPU: what `deltamem bench --op` times."""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
from collections.abc import Iterator
from time import perf_counter_ns
from typing import Any

from ..errors import LibraryError
from ..runtime import library


class Params(ctypes.Structure):
    """struct ggml_deltamem_params, with coupled λ."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("rank", "n_head", "n_seqs", "lambda_", "flags"))


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_p, _i, _size, _i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([_InitParams], _p),
    "ggml_free": ([_p], None),
    "ggml_new_tensor_1d": ([_p, _i, _i64], _p),
    "ggml_new_tensor_2d": ([_p, _i, _i64, _i64], _p),
    "ggml_scale": ([_p, _p, ctypes.c_float], _p),
    "ggml_deltamem": ([_p, _p, _p, _p, _p, Params], _p),
    "ggml_new_graph_custom": ([_p, _size, ctypes.c_bool], _p),
    "ggml_build_forward_expand": ([_p, _p], None),
    "ggml_backend_dev_by_type": ([_i], _p),
    "ggml_backend_dev_init": ([_p, ctypes.c_char_p], _p),
    "ggml_backend_dev_backend_reg": ([_p], _p),
    "ggml_backend_reg_get_proc_address": ([_p, ctypes.c_char_p], _p),
    "ggml_backend_alloc_ctx_tensors": ([_p, _p], _p),
    "ggml_backend_tensor_set": ([_p, ctypes.c_char_p, _size, _size], None),
    "ggml_backend_graph_compute": ([_p, _p], _i),
    "ggml_backend_buffer_free": ([_p], None),
    "ggml_backend_free": ([_p], None),
}


def ggml_library() -> ctypes.CDLL:
    """ggml's functions through the handle of libllama, which depends on them. Raises LibraryError."""
    lib = library.llama_cpp.llama_cpp._lib
    try:
        for name, (argtypes, restype) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = argtypes, restype
    except AttributeError as error:
        raise LibraryError(f"{lib._name}: {name} cannot be reached through it, so --op cannot run here") from error
    return lib


class Graph:
    """A context, its tensors and a graph, computed by one thread of the CPU."""

    def __init__(self, n_nodes: int) -> None:
        self.ggml = ggml_library()
        self.n_nodes = n_nodes
        device = self.ggml.ggml_backend_dev_by_type(0)  # GGML_BACKEND_DEVICE_TYPE_CPU
        self.backend = device and self.ggml.ggml_backend_dev_init(device, None)
        if not self.backend:
            raise LibraryError("ggml has no CPU backend, so --op cannot run here")
        registry = self.ggml.ggml_backend_dev_backend_reg(device)
        address = self.ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        ctypes.CFUNCTYPE(None, _p, _i)(address)(self.backend, 1)
        self.ctx = self.ggml.ggml_init(_InitParams(1024 * (2 * n_nodes + 64) + (1 << 16), None, True))
        self.graph = self.ggml.ggml_new_graph_custom(self.ctx, 2 * n_nodes + 64, False)
        self.buffer = None

    def add(self, node: int) -> None:
        self.ggml.ggml_build_forward_expand(self.graph, node)

    def allocate(self, values: dict[int, bytes]) -> None:
        """Allocates all tensors, and fills those in `values`."""
        self.buffer = self.ggml.ggml_backend_alloc_ctx_tensors(self.ctx, self.backend)
        if not self.buffer:
            raise LibraryError("no RAM for the tensors of --op: take fewer --op-tokens")
        for tensor, data in values.items():
            self.ggml.ggml_backend_tensor_set(tensor, data, 0, len(data))

    def compute(self) -> None:
        if self.ggml.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise LibraryError("ggml could not compute the graph of --op")

    def time(self, n_runs: int) -> list[float]:
        """Nanoseconds per node of each run, after an uncounted one."""
        self.compute()
        times = []
        for _ in range(n_runs):
            start = perf_counter_ns()
            self.compute()
            times.append((perf_counter_ns() - start) / self.n_nodes)
        return times

    def close(self) -> None:
        if self.buffer:
            self.ggml.ggml_backend_buffer_free(self.buffer)
        self.ggml.ggml_free(self.ctx)
        self.ggml.ggml_backend_free(self.backend)


@contextlib.contextmanager
def graph_of(n_nodes: int) -> Iterator[Graph]:
    graph = Graph(n_nodes)
    try:
        yield graph
    finally:
        graph.close()


def floats(n: int, scale: float = 1.0) -> bytes:
    """n values in (-scale, scale), every one different from its neighbours."""
    return struct.pack(f"{n}f", *(scale * math.sin(1.7 * i + 0.3) for i in range(n)))
