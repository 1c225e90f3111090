"""`deltamem bench --nodes`: where the time of a graph goes, node by node, with and without the adapter.

With an evaluation callback llama.cpp computes every node alone and waits for it. Each node keeps the least of its
times: other load can only lengthen a run, so the sums settle long before the times of whole prompts do. Per-node timing
excludes fusion and cache reuse, and includes a start of the threads for each node.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

from ..errors import LibraryError
from ..runtime import library
from .runs import Runner

OURS = "deltamem"  # prefix of the names of the adapter's nodes
VIEWS = (b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE", b"NONE")  # nothing to compute


def _functions() -> tuple[Callable[[int], bytes], Callable[[int], bytes]]:
    """ggml's name and operator of a tensor, through the handle of libllama. Raises LibraryError."""
    lib = library.llama_cpp.llama_cpp._lib
    try:
        functions = lib.ggml_get_name, lib.ggml_op_desc
    except AttributeError as error:
        raise LibraryError(f"{lib._name}: ggml cannot be reached through it, so --nodes cannot run here") from error
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    return functions


class Nodes:
    """The least time of each node of one side's graphs, over all runs and renewed contexts.

    callback: for Runner.
    least: nanoseconds by (which graph of the run, name, operator, how many of that name and operator came before it in
        the graph), in the graphs' order.
    times: how often each was timed.
    """

    def __init__(self) -> None:
        self.least: dict[tuple[int, str, str, int], int] = {}
        self.times: dict[tuple[int, str, str, int], int] = {}
        self._watching = self._alike = False
        self._graph = -1
        name_of, op_of = _functions()
        seen: dict[tuple[str, str], int] = {}
        first: tuple[str, str] | None = None
        start = 0

        @library.llama_cpp.ggml_backend_sched_eval_callback
        def observe(tensor: int, ask: bool, _: Any) -> bool:
            nonlocal first, start
            if ask:
                if not self._watching or op_of(tensor) in VIEWS:
                    return False
                start = perf_counter_ns()
                return True
            elapsed = perf_counter_ns() - start
            node = (name_of(tensor).decode(), op_of(tensor).decode())
            if first is None or node == first:  # a graph begins
                first = node
                seen.clear()
                self._graph += 1
            i = seen[node] = seen.get(node, -1) + 1
            key = (0 if self._alike else self._graph, *node, i)
            self.least[key] = min(elapsed, self.least.get(key, elapsed))
            self.times[key] = self.times.get(key, 0) + 1
            return True

        self.callback = observe

    @contextlib.contextmanager
    def watch(self, alike: bool) -> Iterator[None]:
        """Times the nodes of one run. alike: its graphs do the same, as in decode; else each is kept apart."""
        self._watching, self._alike, self._graph = True, alike, -1
        yield
        self._watching = False


def rows(on: Nodes, off: Nodes) -> list[dict[str, Any]]:
    """Sums the like nodes of all layers: {name, op, on, off: milliseconds, n_on, n_off}, the longest first."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for side, nodes in (("on", on), ("off", off)):
        for (_, name, op, _), ns in nodes.least.items():
            key = (re.sub(r"[-_ ]?\(?\d.*| \(.*", "", name), op)
            row = groups.setdefault(key, {"name": key[0], "op": op, "on": 0.0, "off": 0.0, "n_on": 0, "n_off": 0})
            row[side] += ns / 1e6
            row[f"n_{side}"] += 1
    return sorted(groups.values(), key=lambda row: -max(row["on"], row["off"]))


def measure(
    sides: dict[str, tuple[Runner, Nodes]],
    kind: str,
    arguments: tuple[int, ...],
    n_rounds: int,
    n_renew: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Runs the sides "on" and "off" in turn, once uncounted and n_rounds times, with new contexts after every n_renew.

    Returns {on, off: milliseconds of a prompt or of a token of decode, own: those of the adapter's nodes, ratio,
    rounds, times: how often each node was timed at least, rows}.
    """
    for runner, nodes in sides.values():
        getattr(runner, kind)(*arguments)
        nodes.least.clear()
        nodes.times.clear()
        advance()
    in_turn = list(sides.values())
    for i in range(n_rounds):
        for runner, nodes in in_turn if i % 2 else reversed(in_turn):
            if n_renew and i and i % n_renew == 0:
                runner.renew()
                getattr(runner, kind)(*arguments)
            with nodes.watch(alike=kind == "decode"):
                getattr(runner, kind)(*arguments)
            advance()
    times = min(n for _, nodes in in_turn for n in nodes.times.values())
    table = rows(sides["on"][1], sides["off"][1])
    total = {side: sum(row[side] for row in table) for side in ("on", "off")}
    own = sum(row["on"] for row in table if row["name"].startswith(OURS))
    return {**total, "own": own, "ratio": total["on"] / total["off"], "rounds": n_rounds, "times": times, "rows": table}
