"""The operator alone, for `deltamem bench --op`: time and instructions per token and layer, and its floor.

One thread computes a ggml graph of many independent reads (GGML_OP_DELTAMEM), one per layer, over the same projections.
They share the cost of the call from Python. The figures include ggml's time per node, as in a model.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from ..runtime.cpus import cpu_name
from .floor import cycle_ns, floor, per_cycle, simd_name
from .ggml_graph import Params, floats, graph_of
from .instructions import count_instructions

F32, I32 = 0, 26  # enum ggml_type
WRITE = 2  # GGML_DELTAMEM_TOKEN_WRITE
NORMALIZE_QK, RANKWISE_GATES = 1, 2  # enum ggml_deltamem_flags
N_PLAN_SEQ, N_PLAN_TOKEN = 3, 2


def run(
    ranks: Sequence[int],
    n_head: int,
    token_counts: Sequence[int],
    n_runs: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Times the operator for each rank and number of tokens per call, with one thread.

    Returns op: what `measure` returns of each; floor: by rank, as `floor` returns it; node_ns, simd and cpu.
    Raises LibraryError.
    """
    total = len(ranks) * len(token_counts) + 1
    progress("operator", 0, total)
    cycle, node = cycle_ns(n_runs), node_ns(n_runs)
    rate = per_cycle(n_runs, cycle)
    rows: list[dict[str, Any]] = []
    for rank in ranks:
        for n_tokens in token_counts:
            progress("operator", len(rows) + 1, total)
            rows.append(measure(rank, n_head, n_tokens, n_runs))
    return {
        "op": rows,
        "floor": {str(rank): floor(rank, n_head, cycle, rate) for rank in ranks},
        "node_ns": node,
        "simd": simd_name(),
        "cpu": cpu_name(),
    }


def measure(rank: int, n_head: int, n_tokens: int, n_runs: int) -> dict[str, Any]:
    """The read of n_tokens tokens that all write, all heads of a layer, one thread.

    Returns per token and layer: `ns` (median over n_runs), `ns_min`, and `instructions` or None; `layers`, the number
    of nodes that a run computes.
    """
    n_read = n_head * rank
    n_layers = max(36, 2048 // n_tokens)
    params = Params(rank, n_head, 1, 0, NORMALIZE_QK | RANKWISE_GATES)
    with graph_of(n_layers) as graph:
        ggml, ctx = graph.ggml, graph.ctx
        proj = ggml.ggml_new_tensor_2d(ctx, F32, 4 * n_read, n_tokens)
        bias = ggml.ggml_new_tensor_1d(ctx, F32, n_read)
        plan = ggml.ggml_new_tensor_1d(ctx, I32, N_PLAN_SEQ + N_PLAN_TOKEN * n_tokens)
        entries = [0, 0, n_tokens, *(number for token in range(n_tokens) for number in (token, WRITE))]
        values = {
            proj: floats(4 * n_read * n_tokens, 2.0),
            bias: floats(n_read),
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
    """ggml's overhead per node: nanoseconds of a node that scales one value."""
    n_nodes = 2048
    with graph_of(n_nodes) as graph:
        one = graph.ggml.ggml_new_tensor_1d(graph.ctx, F32, 1)
        for _ in range(n_nodes):
            graph.add(graph.ggml.ggml_scale(graph.ctx, one, 2.0))
        graph.allocate({one: floats(1)})
        return median(graph.time(n_runs))
