"""The floor of the operator's time: what its arithmetic takes at least on this core.

Measures the length of a cycle, and the multiply-adds that the core starts in one, with the kernel of corrections.
"""

from __future__ import annotations

import ctypes
import math
from time import perf_counter_ns
from typing import Any

from .ggml_graph import floats, ggml_library

# Operations per activated value in deltamem-simd.h; a multiply-add counts as one, a division too.
TANH, SIGMOID = 20, 18

# Latency of a multiply-add in cycles, on the x86 and Arm cores of servers and desktops since about 2016
# (five on AMD's first two Zens).
LATENCY = 4


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


def cycle_ns(n_runs: int, length: int = 1 << 15) -> float | None:
    """Time of a clock cycle while vectors of float32 are multiplied.

    A correction of one narrow vector of outputs is a chain of multiply-adds, each of which waits for the one before:
    LATENCY cycles each. Of one token, because the kernel computes several side by side. None where the kernel cannot
    be called from outside, as in a build with a ggml-cpu per CPU.
    """
    least = _correction_ns(n_runs, min(8, lanes()), length, 1)
    return None if least is None else least / (length * LATENCY)


def per_cycle(n_runs: int, cycle: float | None) -> float | None:
    """Multiply-adds of full vectors that a cycle of cycle_ns() completes at least where enough are independent.

    Corrections of 16 columns keep four vectors of outputs in registers, and no block of four waits for another: more
    multiply-adds are in flight than any core's latency times its rate. Weights come from the first-level cache, and
    outputs go there, which costs some of the rate.
    """
    n_vectors, n_read, n_tokens = 16, 16, 256
    least = _correction_ns(10 * n_runs, n_vectors * lanes(), n_read, n_tokens)
    return None if least is None or cycle is None else n_vectors * n_read * n_tokens * cycle / least


def _correction_ns(n_runs: int, n_out: int, n_read: int, n_tokens: int) -> int | None:
    """The least time of a call of the kernel of corrections; all tokens share one row."""
    function = getattr(ggml_library(), "deltamem_correct_forward", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.POINTER(_CorrectArgs)], None
    arrays = [ctypes.create_string_buffer(floats(n), 4 * n + 64) for n in (n_out, n_read * n_out, n_read)]
    # aligned to cache lines: a vector across two lines takes two loads
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
    function = getattr(ggml_library(), "deltamem_simd_name", None)
    if function is None:
        return "unknown"
    function.argtypes, function.restype = [], ctypes.c_char_p
    return function().decode()


def lanes() -> int:
    """Floats of its widest vector; where that is unknown, of the widest that any CPU has."""
    return {"AVX2": 8, "NEON": 4, "scalar": 1}.get(simd_name(), 16)


def floor(rank: int, n_head: int, cycle: float | None, rate: float | None) -> dict[str, Any]:
    """The least time of any kernel with this arithmetic, per writing token and layer, and how it was computed.

    `cycle` is cycle_ns(); without it the floor has cycles only. `rate` is per_cycle(). Cores start whole
    vectors, so it is rounded up, with a tolerance of 5 %; two where it is unknown.
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
