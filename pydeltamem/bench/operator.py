"""The operator alone, for `deltamem bench --op`: time and instructions per token and layer, and the floor.

One thread computes a ggml graph of many independent reads (GGML_OP_DELTAMEM), one per layer, over the same projections:
the call from Python is spread over them. What ggml spends on a node is in the figure, as it is in a model.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import struct
import sys
from collections.abc import Iterator
from statistics import median
from time import perf_counter_ns
from typing import Any

from ..errors import LibraryError
from ..runtime import library

F32, I32 = 0, 26  # enum ggml_type
WRITE = 2  # GGML_DELTAMEM_TOKEN_WRITE
NORMALIZE_QK, RANKWISE_GATES = 1, 2  # enum ggml_deltamem_flags
N_PLAN_SEQ, N_PLAN_TOKEN = 3, 2

# Operations per activated value in deltamem-simd.h; a multiply-add counts as one, a division too.
TANH, SIGMOID = 20, 18

# Cycles until the result of a multiply-add is there, on the x86 and Arm cores of servers and desktops since about 2016
# (five on AMD's first two Zens).
LATENCY = 4


class _Params(ctypes.Structure):
    """struct ggml_deltamem_params, with coupled λ."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("rank", "n_head", "n_seqs", "lambda_", "flags"))


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _CorrectArgs(ctypes.Structure):
    """struct deltamem_correct_args."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_size_t),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_size_t),
        ("read", ctypes.c_void_p),
        ("read_stride", ctypes.c_size_t),
        ("added", ctypes.c_void_p),
        ("added_stride", ctypes.c_size_t),
        ("dst", ctypes.c_void_p),
        ("dst_stride", ctypes.c_size_t),
        ("n_out", ctypes.c_int64),
        ("n_read", ctypes.c_int64),
        ("n_tokens", ctypes.c_int64),
        ("half", ctypes.c_bool),
    )


_p, _i, _size, _i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "ggml_init": ([_InitParams], _p),
    "ggml_free": ([_p], None),
    "ggml_new_tensor_1d": ([_p, _i, _i64], _p),
    "ggml_new_tensor_2d": ([_p, _i, _i64, _i64], _p),
    "ggml_scale": ([_p, _p, ctypes.c_float], _p),
    "ggml_deltamem": ([_p, _p, _p, _p, _p, _Params], _p),
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


def _library() -> ctypes.CDLL:
    """ggml's functions through the handle of libllama, which depends on them. Raises LibraryError."""
    lib = library.llama_cpp.llama_cpp._lib
    try:
        for name, (argtypes, restype) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = argtypes, restype
    except AttributeError as error:
        raise LibraryError(f"{lib._name}: {name} cannot be reached through it, so --op cannot run here") from error
    return lib


class _Graph:
    """A context, its tensors and a graph, computed by one thread of the CPU."""

    def __init__(self, n_nodes: int) -> None:
        self.ggml = _library()
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
        """Buffers for all tensors, and what the given ones hold."""
        self.buffer = self.ggml.ggml_backend_alloc_ctx_tensors(self.ctx, self.backend)
        if not self.buffer:
            raise LibraryError("no memory for the tensors of --op: take fewer --op-tokens")
        for tensor, data in values.items():
            self.ggml.ggml_backend_tensor_set(tensor, data, 0, len(data))

    def compute(self) -> None:
        if self.ggml.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            raise LibraryError("ggml could not compute the graph of --op")

    def time(self, n_runs: int) -> list[float]:
        """Nanoseconds per node of each run, after one that is not counted."""
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
def _graph(n_nodes: int) -> Iterator[_Graph]:
    graph = _Graph(n_nodes)
    try:
        yield graph
    finally:
        graph.close()


def _floats(n: int, scale: float = 1.0) -> bytes:
    """n values in (-scale, scale), every one different from its neighbours."""
    return struct.pack(f"{n}f", *(scale * math.sin(1.7 * i + 0.3) for i in range(n)))


def measure(rank: int, n_head: int, n_tokens: int, n_runs: int) -> dict[str, Any]:
    """The read of n_tokens tokens that all write, all heads of a layer, one thread.

    Returns per token and layer: `ns` (median over n_runs), `ns_min`, and `instructions` or None; `layers`, the number
    of nodes that a run computes.
    """
    n_read = n_head * rank
    n_layers = max(36, 2048 // n_tokens)
    params = _Params(rank, n_head, 1, 0, NORMALIZE_QK | RANKWISE_GATES)
    with _graph(n_layers) as graph:
        ggml, ctx = graph.ggml, graph.ctx
        proj = ggml.ggml_new_tensor_2d(ctx, F32, 4 * n_read, n_tokens)
        bias = ggml.ggml_new_tensor_1d(ctx, F32, n_read)
        plan = ggml.ggml_new_tensor_1d(ctx, I32, N_PLAN_SEQ + N_PLAN_TOKEN * n_tokens)
        entries = [0, 0, n_tokens, *(number for token in range(n_tokens) for number in (token, WRITE))]
        values = {
            proj: _floats(4 * n_read * n_tokens, 2.0),
            bias: _floats(n_read),
            plan: struct.pack(f"{len(entries)}i", *entries),
        }
        n_state = n_head * rank * rank
        for _ in range(n_layers):
            state = ggml.ggml_new_tensor_2d(ctx, F32, n_state, 1)
            values[state] = bytes(4 * n_state)
            graph.add(ggml.ggml_deltamem(ctx, proj, bias, state, plan, params))
        graph.allocate(values)
        times = [ns / n_tokens for ns in graph.time(n_runs)]
        count = count_instructions(graph.compute)
    return {
        "rank": rank,
        "heads": n_head,
        "tokens": n_tokens,
        "layers": n_layers,
        "ns": median(times),
        "ns_min": min(times),
        "instructions": None if count is None else count / (n_layers * n_tokens),
    }


def node_ns(n_runs: int) -> float:
    """What ggml spends on a node beside its work: nanoseconds of a node that scales one value."""
    n_nodes = 2048
    with _graph(n_nodes) as graph:
        one = graph.ggml.ggml_new_tensor_1d(graph.ctx, F32, 1)
        for _ in range(n_nodes):
            graph.add(graph.ggml.ggml_scale(graph.ctx, one, 2.0))
        graph.allocate({one: _floats(1)})
        return median(graph.time(n_runs))


def cycle_ns(n_runs: int, length: int = 512) -> float | None:
    """Time of a clock cycle while vectors of float32 are multiplied.

    A correction of one narrow vector of outputs is a chain of multiply-adds, each of which waits for the one before:
    LATENCY cycles each. None where the kernel cannot be called from outside, as in a build with a ggml-cpu per CPU.
    """
    n_chains = 64
    least = _correction_ns(n_runs, min(8, lanes()), length, n_chains)
    return None if least is None else least / (length * n_chains * LATENCY)


def per_cycle(n_runs: int, cycle: float | None) -> float | None:
    """Multiply-adds of full vectors that a cycle of cycle_ns() completes at least where enough are independent.

    In corrections of 16 columns four vectors of outputs are in registers at a time, and no block of four waits for
    another: more are in flight than any core's latency times its rate. Weights come from the first-level cache, and
    outputs go there, which costs some of the rate.
    """
    n_vectors, n_read, n_tokens = 16, 16, 256
    least = _correction_ns(10 * n_runs, n_vectors * lanes(), n_read, n_tokens)
    return None if least is None or cycle is None else n_vectors * n_read * n_tokens * cycle / least


def _correction_ns(n_runs: int, n_out: int, n_read: int, n_tokens: int) -> int | None:
    """The least time of a call of the kernel of corrections, all tokens in one row's place."""
    function = getattr(_library(), "deltamem_correct_forward", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.POINTER(_CorrectArgs)], None
    arrays = [ctypes.create_string_buffer(_floats(n), 4 * n + 64) for n in (n_out, n_read * n_out, n_read)]
    # where cache lines begin: a vector in two lines takes two loads
    out, weight, read = (ctypes.addressof(array) + -ctypes.addressof(array) % 64 for array in arrays)
    for array, start in zip(arrays, (out, weight, read)):
        ctypes.memmove(start, bytes(array), len(array) - 64)
    args = _CorrectArgs(
        out=out, weight=weight, weight_stride=n_out, read=read, dst=out,
        n_out=n_out, n_read=n_read, n_tokens=n_tokens,
    )  # fmt: skip
    times = []
    for _ in range(n_runs + 1):
        start = perf_counter_ns()
        function(args)
        times.append(perf_counter_ns() - start)
    return min(times)


def simd_name() -> str:
    """What the kernel in use was compiled for, "unknown" where it cannot be called from outside."""
    function = getattr(_library(), "deltamem_simd_name", None)
    if function is None:
        return "unknown"
    function.argtypes, function.restype = [], ctypes.c_char_p
    return function().decode()


def lanes() -> int:
    """Floats of its widest vector; where that is unknown, of the widest that any CPU has."""
    return {"AVX2": 8, "NEON": 4, "scalar": 1}.get(simd_name(), 16)


def floor(rank: int, n_head: int, cycle: float | None, rate: float | None) -> dict[str, Any]:
    """Below what no kernel of this arithmetic comes, per token that writes and layer, and how it was computed.

    `cycle` is cycle_ns(); without it the floor has cycles only. `rate` is per_cycle(): cores start whole vectors, so
    the least whole number that it does not exceed, give or take 5 %, counts; two where it is unknown.
    """
    starts = 2 if rate is None else max(1, math.ceil(rate - 0.05))
    # per head: S q, S k, keep S and its update touch each of the r² floats of the state once
    recurrence = 4 * rank**2
    # tanh of q and k; sigmoid of β; bias, 1 - β and β v; squares and factors of the two norms
    activations = (2 * TANH + SIGMOID + 3 + 2 + 2) * rank
    n_vectors = n_head * (recurrence + activations) / lanes()
    # S k as a tree (a product, log2 r sums), then u = β v - β S k, then the update: a token waits for the one before
    steps = 1 + math.ceil(math.log2(rank)) + 2
    issue, chain = n_vectors / starts, LATENCY * steps
    cycles = max(issue, chain)
    ns = None if cycle is None else cycles * cycle
    text = (
        f"rank {rank}: {n_head} × ({recurrence} operations for S q, S k, keep S and its update + {activations} for the "
        f"activations) in vectors of {lanes()} = {n_vectors:.0f} instructions, {starts} per cycle: {issue:.0f} "
        f"cycles; from state to state {steps} dependent steps of {LATENCY}: {chain} cycles. "
        + ("The time of a cycle is unknown." if ns is None else f"{cycles:.0f} cycles × {cycle:.3f} ns = {ns:.1f} ns.")
    )
    return {
        "ns": ns,
        "cycles": cycles,
        "issue_cycles": issue,
        "chain_cycles": chain,
        "cycle_ns": cycle,
        "per_cycle": rate,
        "vector_instructions": n_vectors,
        "bytes": 4 * n_head * 5 * rank,  # q, k, v, β in, the read out; the state stays in registers
        "text": text,
    }


#
# instructions
#

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_IOC_ENABLE, _IOC_DISABLE, _IOC_RESET = 0x2400, 0x2401, 0x2403


def count_instructions(work: Any) -> int | None:
    """Instructions that this thread spends in work(), outside the kernel; None where they cannot be counted."""
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return None
    import fcntl

    # struct perf_event_attr, version 0: hardware event 1 (instructions), disabled, without kernel and hypervisor
    attr = struct.pack("<IIQQQQQ16x", 0, 64, 1, 0, 0, 0, 1 | 1 << 5 | 1 << 6)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    # this thread, any CPU, no group, no flags
    fd = syscall(ctypes.c_long(number), ctypes.c_char_p(attr), *map(ctypes.c_long, (0, -1, -1, 0)))
    if fd < 0:
        return None
    try:
        fcntl.ioctl(fd, _IOC_RESET, 0)
        fcntl.ioctl(fd, _IOC_ENABLE, 0)
        work()
        fcntl.ioctl(fd, _IOC_DISABLE, 0)
        return int.from_bytes(os.read(fd, 8), sys.byteorder) or None
    except OSError:
        return None
    finally:
        os.close(fd)
