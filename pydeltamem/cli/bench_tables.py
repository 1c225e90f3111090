"""The tables of `deltamem bench`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from ..bench.pairs import OFF, ON

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHARE = 0.005  # of the time of all nodes, from which on a kind of node has a line of its own


def print_operator(out: Console, results: dict[str, Any]) -> None:
    from ..bench.floor import LATENCY

    say(out, f"The operator alone, one thread, {results['simd']}, per token and layer; {results['cpu']}")
    table = _table("rank", "heads", "tokens per call", "median ns", "least ns", "instructions", "floor ns")
    floors = results["floor"]
    for row in results["op"]:
        count, floor = row["instructions"], floors[str(row["rank"])]["ns"]
        table.add_row(
            str(row["rank"]), str(row["heads"]), str(row["tokens"]), f"{row['ns']:.1f}", f"{row['ns_min']:.1f}",
            "not available" if count is None else f"{count:.0f}", "unknown" if floor is None else f"{floor:.1f}",
        )  # fmt: skip
    out.print(table)
    say(out, f"A node that scales one value takes {results['node_ns']:.0f} ns: ggml's share of each call above.")
    floor = next(iter(floors.values()))
    if floor["cycle_ns"] is not None:
        say(
            out,
            f"A cycle: {floor['cycle_ns']:.3f} ns, from a chain of multiply-adds of {LATENCY} cycles each; "
            f"of independent ones at least {floor['per_cycle']:.2f} vectors in a cycle.",
        )
    for floor in floors.values():
        say(out, f"Floor, {floor['text']}")


def print_returns(out: Console, results: dict[str, Any]) -> None:
    from ..bench.returning import MEMORY, TEXT, WINDOW, sooner

    report = results["return"]
    names = {MEMORY: "memory", WINDOW: f"memory, last {report['window']} tokens", TEXT: "whole text"}
    table = _table(
        "history", "restored", "seconds to the first token", "interval", "as soon as by the text", "bytes",
        left=("restored",),
    )  # fmt: skip
    for run in report["runs"]:
        for way, one in run["ways"].items():
            table.add_row(
                f"{run['history']:,}", names.get(way, "memory and KV cache"), f"{one['seconds']:.3f}",
                f"{one['low']:.3f}–{one['high']:.3f}" if len(one["times"]) > 1 else "one run",
                f"{sooner(run, way):.1f} ×", f"{one['bytes']:,}",
            )  # fmt: skip
    out.print(table)
    say(out, f"What is said next has {report['said']} tokens. Medians, and their intervals by order statistics.")


def print_costs(out: Console, results: dict[str, Any]) -> None:
    setup, info = results["setup"], results["setup"]["model_info"]
    say(
        out,
        f"{info['description'].replace(' ?B', '')}, {_amount(info['n_params'])} parameters, "
        f"{_amount(info['n_bytes'])}B; {setup['cpu']}, {setup['n_threads']} thread{'s' * (setup['n_threads'] != 1)}; "
        f"batch {setup['n_batch']}, micro-batch {setup['n_ubatch']}; "
        f"flash attention {'on' if setup['flash_attn'] else 'off'}; KV cache {setup['type_k']}, {setup['type_v']}",
    )
    if "against" in setup:
        folder = setup["against"]["folder"]
        say(out, f"against: {folder}; plain: this library, no adapter; each in a process of its own")
    elif setup["control"]:
        say(out, "control: the side 'on' has no adapter either")

    _print_ratios(out, results)
    for test in results.get("nodes", []):
        _print_nodes(out, test)
    built = [run["graphs_built"] for run in results.get("decode", {}).get("runs", []) if "graphs_built" in run]
    if built and not setup["control"]:
        say(out, f"Graphs built in the timed decode runs: {', '.join(map(str, built))}.")

    _print_memory(out, results["memory"])


def _print_ratios(out: Console, results: dict[str, Any]) -> None:
    from ..bench.comparison import label

    table = _table(
        "test", "compared", "tokens/s of the first", "of the second", "ratio", "interval", left=("test", "compared")
    )
    confidence = None
    for kind in ("prompt", "decode"):
        for run in results.get(kind, {}).get("runs", []):
            arguments = (run["depth"], run["n_tokens"]) if kind == "decode" else (run["n_tokens"],)
            compared = {f"{ON}/{OFF}": run} if ON in run else {}
            for name, ratio in {**compared, **run.get("ratios", {})}.items():
                a, b = name.split("/")
                speeds = [_speed(run["n_tokens"], run["ns"][side]) for side in (a, b)]
                interval = f"{ratio['low']:.4f}–{ratio['high']:.4f}"
                table.add_row(label(kind, arguments), f"{a} ÷ {b}", *speeds, f"{ratio['ratio']:.4f}", interval)
                confidence = ratio["confidence"]
    if confidence is not None:
        out.print(table)
        say(
            out,
            f"tokens/s: median ± half the distance of the quartiles. Ratio: of times, {_sample(results['setup'])}; "
            f"interval of the median by order statistics, {100 * confidence:.1f} %.",
        )


def _print_memory(out: Console, memory: dict[str, Any]) -> None:
    if memory:
        size = memory["adapter_file_bytes"]
        say(
            out,
            f"Adapter: {memory['weights_bytes']:,} bytes of weights"
            + (f" (file: {size:,})" if size is not None else "")
            + f", {memory['states_bytes']:,} bytes of states and checkpoints.",
        )
    if "extra" in memory:
        names = {"peak": "peak", "now": "now", "anonymous": "of that not backed by a file"}
        parts = [
            f"{names[key]} {memory[ON][key]:,} with, {memory[OFF][key]:,} without: {extra:+,}"
            for key, extra in memory["extra"].items()
        ]
        say(out, f"Resident bytes after a prompt of {memory['prompt']} tokens, adapter: {'; '.join(parts)}.")


def _print_nodes(out: Console, test: dict[str, Any]) -> None:
    """One line per kind of node: those that take a share of the time, and the adapter's own."""
    from ..bench.nodes import OURS

    table = _table("node", "operator", "nodes", "ms on", "ms off", "difference", left=("node", "operator"))
    for row in test["rows"]:
        if row["name"].startswith(OURS) or max(row["on"], row["off"]) > _SHARE * test["off"]:
            times = (f"{row['on']:.3f}", f"{row['off']:.3f}", f"{row['on'] - row['off']:+.3f}")
            table.add_row(row["name"], row["op"], str(max(row["n_on"], row["n_off"])), *times)
    say(out, f"\n{test['test']}: the least of {test['times']} times of each node, computed alone")
    out.print(table)
    say(
        out,
        f"All nodes: {test['on']:.2f} ms with, {test['off']:.2f} without, ratio {test['ratio']:.4f}; "
        f"the adapter's own: {test['own']:.2f} ms, {test['own'] / test['off']:.2%} of those without.",
    )


def _amount(n: int) -> str:
    """A number in thousands, millions or billions (of bytes: kB, MB, GB)."""
    unit, size = next((unit, size) for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if n >= size or unit == "k")
    return f"{n / size:.2f} {unit}"


def _sample(setup: dict[str, Any]) -> str:
    """What a ratio is the median of."""
    n_pairs: int = setup["pairs"]
    n_renew: int = setup["renew"]
    if n_renew == 0:
        return f"median over {n_pairs} pairs, which all share contexts"
    return f"median over {n_pairs} pairs" + (f", by the medians of each {n_renew} that share contexts" * (n_renew > 1))


def _table(*columns: str, left: Sequence[str] = ()) -> Table:
    """In a narrow terminal headers and cells are folded, so that no figure is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_whole = column in ("ratio", "interval")  # not within a number
        table.add_column(column, justify="left" if column in left else "right", overflow="fold", no_wrap=is_whole)
    return table


def say(out: Console, text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _speed(n_tokens: int, nanoseconds: Sequence[int]) -> str:
    speeds = [n_tokens * 1e9 / ns for ns in nanoseconds]
    low, _, high = quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    spread = (high - low) / 2
    decimals = 0 if high >= 1000 else 1 if high >= 100 else 2
    return f"{median(speeds):.{decimals}f} ± {spread:.{decimals}f}"
