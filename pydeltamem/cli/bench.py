"""`deltamem bench`: what a memory costs. Time with the adapter over time without, in alternating runs; bytes.

Two contexts of one loaded model, one with the adapter and one without, take turns in one process. The runs of a pair
follow each other directly and their order alternates, so that a drift of the machine falls on both. Another llama
library needs a process of its own; it takes turns with this one, without the adapter, in a process that is just alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from ..bench.models import cache_folder, synthetic_files
from ..bench.synthetic import SHAPES
from ..errors import DeltaMemError, InputError, LibraryError, ModelError
from ..formats.gguf_header import Header
from ..formats.kinds import json_of
from ..formats.outputs import output
from ..hub import adapter_file, model_file
from ..runtime.cpus import usable
from ..version import __version__
from .model_options import ADAPTER_HELP, MODEL_HELP, add_context_arguments
from .parser import count, integers, positive

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.nodes import Nodes
    from ..bench.runs import Session, Worker

CONFIDENCE = 0.95
REPORT = json_of("a report of deltamem bench", {"version", "setup"}, {"version", "op"})

ON, OFF, PLAIN, OTHER = "on", "off", "plain", "against"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", metavar="FILE", help=MODEL_HELP)
    source.add_argument(
        "--synthetic", choices=tuple(SHAPES), metavar="SHAPE",
        help=f"random weights of this shape, model and adapter, kept in {cache_folder()}: {', '.join(SHAPES)}",
    )  # fmt: skip
    model.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    model.add_argument("--ftype", metavar="TYPE", help="type of --synthetic, any of llama.cpp's (q4_k_m)")
    model.add_argument("--outtype", choices=("f32", "f16", "bf16", "q8_0"), help="type of its adapter (f16)")
    model.add_argument("--vocab", metavar="FILE", help="GGUF whose vocabulary --synthetic takes")
    model.add_argument("--rank", type=positive, metavar="R", help="rank of --synthetic (8) and of --op (8 and 16)")
    model.add_argument("--heads", type=positive, metavar="H", help="state heads of both (1)")

    what = parser.add_argument_group("what is timed (the first of several is the one that the JSON names first)")
    what.add_argument(
        "-p",
        "--n-prompt",
        type=integers,
        default=[512],
        metavar="N,...",
        help="tokens of a prompt (512; 0: no prefill)",
    )
    what.add_argument("-n", "--n-gen", type=count, default=32, metavar="N", help="tokens of decode (32; 0: no decode)")
    what.add_argument(
        "-d", "--n-depth", type=integers, default=[0], metavar="N,...", help="tokens before those of decode (0)"
    )
    what.add_argument("--pairs", type=positive, default=10, metavar="N", help="pairs of runs (%(default)s)")
    what.add_argument(
        "--renew", type=count, default=1, metavar="N",
        help="new contexts, and processes of --against, after every N pairs (%(default)s; 0: never)",
    )  # fmt: skip
    what.add_argument(
        "--against", metavar="DIR", help="folder of another llama library, a build of the same llama.cpp: also timed"
    )
    what.add_argument(
        "--control", action="store_true", help="no adapter: what the measurement can tell, or --against alone"
    )
    what.add_argument(
        "--rss", type=count, metavar="N", help="prompt after which resident memory is read (the longest; 0: do not)"
    )
    what.add_argument(
        "--nodes", action="store_true", help="the least time of each kind of node of the graphs, instead of whole runs"
    )
    what.add_argument("--op", action="store_true", help="the operator alone, one thread, and its floor; no model")
    what.add_argument(
        "--op-tokens", type=integers, default=[1, 512], metavar="N,...", help="tokens of a call of --op (1,512)"
    )

    context = parser.add_argument_group("context")
    context.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (all CPUs)")
    add_context_arguments(context)

    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")
    parser.add_argument("--json", metavar="FILE", help="write the results there too (-: standard output)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    _check(args)
    err = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    out = err if args.json == "-" else Console(width=None if sys.stdout.isatty() else 120)
    with output(args.json, REPORT) as write:
        results = _bench_op(args, out, err) if args.op else _bench(args, out, err)
        write(json.dumps({"version": __version__, **results}, indent=2) + "\n")
    return 0


def _check(args: argparse.Namespace) -> None:
    made = {"--ftype": args.ftype, "--outtype": args.outtype, "--vocab": args.vocab}  # by --synthetic
    if args.op:
        others = {"-m": args.model, "--synthetic": args.synthetic, "--deltamem": args.deltamem, **made}
        others.update({"--against": args.against, "--nodes": args.nodes})
        if given := [name for name, value in others.items() if value]:
            raise InputError(f"--op runs without a model: drop {', '.join(given)}, or --op")
        if not all(args.op_tokens):
            raise InputError("--op-tokens: a call has one token at least")
        if args.rank and args.rank > 64:
            raise InputError(f"--rank {args.rank}: the operator takes ranks up to 64")
        return
    if args.nodes and args.against:
        raise InputError("--nodes looks into the graphs of one library: drop --against or --nodes")
    if not args.model and not args.synthetic:
        raise InputError("no model: give one by -m FILE or --synthetic SHAPE, or measure the operator alone by --op")
    if args.model:
        made.update({"--rank": args.rank, "--heads": args.heads})
        if given := [name for name, value in made.items() if value]:
            raise InputError(f"{', '.join(given)}: of --synthetic alone, {args.model} is as it is: drop it, or -m")
    if args.synthetic and args.deltamem:
        raise InputError("--synthetic makes an adapter of its own: drop --deltamem, or name a model by -m")
    if args.control and args.deltamem:
        raise InputError("--control is without an adapter: drop it or --deltamem")
    if args.cache_type_v not in ("f32", "f16", "bf16") and args.flash_attn == "off":
        raise InputError(f"-ctv {args.cache_type_v}: llama.cpp needs flash attention for it: add -fa on")
    if not _timed(args) and (not args.rss or args.control or args.nodes):
        raise InputError("-p 0 and -n 0 leave nothing to time")


def _timed(args: argparse.Namespace) -> bool:
    return bool(_prompts(args) or args.n_gen)


def _prompts(args: argparse.Namespace) -> list[int]:
    return [n for n in args.n_prompt if n]


#
# models and adapters
#


def _bench(args: argparse.Namespace, out: Console, err: Console) -> dict[str, Any]:
    from ..bench.nodes import Nodes
    from ..bench.nodes import measure as measure_nodes
    from ..bench.runs import Options, Worker
    from ..runtime import library
    from ..runtime.ggml import can_be_mapped

    library.logger.setLevel("DEBUG" if args.verbose else "ERROR")
    folder = _library_folder(args.against) if args.against else None
    with _progress(err) as progress:
        model, adapter = _synthetic(args, progress) if args.synthetic else _files(args)
    if args.control:
        adapter = None
    elif adapter is None and folder is None:
        raise InputError(f"{model}: nothing to compare: name an adapter by --deltamem or a library by --against")
    elif adapter is None and not _timed(args):
        raise InputError(f"{model}: nothing to measure: -p 0 and -n 0 time nothing, --rss is for an adapter's memory")

    n_rss = max([*_prompts(args), 1]) if args.rss is None else args.rss
    longest = max([*_prompts(args), n_rss + 1, max(args.n_depth) + args.n_gen])
    options = Options(
        model=model,
        n_ctx=-(-longest // 256) * 256,  # llama.cpp pads it likewise
        n_batch=args.batch_size,
        n_ubatch=min(args.ubatch_size, args.batch_size),
        n_threads=args.threads or usable(),
        n_gpu_layers=args.gpu_layers,
        flash_attn=args.flash_attn == "on",
        type_k=args.cache_type_k,
        type_v=args.cache_type_v,
        use_mmap=can_be_mapped(model),
    )
    results: dict[str, Any] = {
        "setup": {
            **asdict(options), "deltamem": adapter, "control": args.control, "cpu": _cpu(),
            "pairs": args.pairs, "renew": args.renew,
        }
    }  # fmt: skip

    lib_dir = library.library_folder()
    memory: dict[str, Any] = {}
    if n_rss and adapter is not None and not args.nodes:
        memory = {"prompt": n_rss, **_resident(lib_dir, options, adapter, n_rss, err)}

    with contextlib.ExitStack() as stack:
        nodes = {name: Nodes() for name in (ON, OFF)} if args.nodes else {}
        sides: dict[str, Session | Worker] = {}
        if folder is None or adapter is not None:
            sides |= _open(stack, options, adapter, nodes)
            results["setup"].update(sides[OFF].model.describe())
        if folder is not None:
            for name, of in ((PLAIN, lib_dir), (OTHER, folder)):
                sides[name] = Worker(of, options)
                stack.callback(sides[name].close)
            results["setup"].update(sides[PLAIN].description)
            results["setup"]["against"] = {"folder": folder, "system": sides[OTHER].description["system"]}
        if adapter is not None:
            memory = {**{f"{key}_bytes": n for key, n in sides[ON].n_bytes.items()}, **memory}
            memory["adapter_file_bytes"] = os.path.getsize(adapter) if adapter != model else None
        results["memory"] = memory

        tests: list[tuple[str, tuple[int, ...]]] = [("prefill", (n,)) for n in _prompts(args)]
        tests += [("decode", (depth, args.n_gen)) for depth in args.n_depth if args.n_gen]
        with _progress(err) as progress:
            task = progress.add_task("", total=len(tests) * (args.pairs + 1) * len(sides))
            for kind, arguments in tests:

                def advance(label: str = _label(kind, arguments)) -> None:
                    progress.update(task, advance=1, description=label)
                    progress.refresh()  # by hand: no thread that draws while a run is timed

                if nodes:
                    both = {name: (sides[name], nodes[name]) for name in nodes}
                    found = measure_nodes(both, kind, arguments, args.pairs, args.renew, advance)
                    results.setdefault("nodes", []).append({"test": _label(kind, arguments), **found})
                    continue
                runs = results.setdefault(kind, {"runs": []})["runs"]
                runs.append(_measure(sides, kind, arguments, args.pairs, advance, args.renew))

    for kind in ("prefill", "decode"):
        if kind in results:
            first = results[kind]["runs"][0]
            results[kind] = {**{key: value for key, value in first.items() if key != "ns"}, **results[kind]}
    _print(out, results)
    return results


def _open(
    stack: contextlib.ExitStack, options: Any, adapter: str | None, nodes: dict[str, Nodes]
) -> dict[str, Session]:
    """The two sides of this process; without an adapter they are alike."""
    from ..bench.runs import Model, Session
    from ..runtime import library

    with library.errors_held() as log:
        try:
            model = Model(library.llama_cpp, options)
            stack.callback(model.close)
            sides = {}
            for name in (ON, OFF):
                observer = nodes[name].callback if nodes else None
                sides[name] = Session(model, adapter if name == ON else None, observer)
                stack.callback(sides[name].close)
        except ModelError as error:
            reason = library.reason(log)
            log.clear()
            raise ModelError(f"{error}{reason}") from error
        except DeltaMemError:
            log.clear()
            raise
    return sides


def _files(args: argparse.Namespace) -> tuple[str, str | None]:
    """The files of the model and of the adapter: the given one, or the model if it is packed."""
    model = model_file(args.model)
    header = Header(model)
    if args.deltamem is not None:
        return model, adapter_file(args.deltamem, model)
    return model, model if "deltamem.version" in header.keys else None


def _synthetic(args: argparse.Namespace, progress: Progress) -> tuple[str, str]:
    task = progress.add_task(f"making {args.synthetic} {args.ftype}", total=None)

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        progress.refresh()

    ftype, outtype, rank, n_head = args.ftype or "q4_k_m", args.outtype or "f16", args.rank or 8, args.heads or 1
    return synthetic_files(args.synthetic, ftype, outtype, rank, n_head, args.vocab, show)


def _library_folder(path: str) -> str:
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not any((folder / name).is_file() for name in ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")):
        raise LibraryError(f"{path}: holds no llama library: name the folder of a build's libllama")
    return str(folder.resolve())


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


#
# measuring
#


def _measure(
    sides: dict[str, Session | Worker],
    kind: str,
    arguments: tuple[int, ...],
    n_pairs: int,
    advance: Callable[[], None],
    n_renew: int = 0,
) -> dict[str, Any]:
    """One setting: every side once untimed, then n_pairs rounds in which each runs once, forth and back in turn.

    After every n_renew rounds the sides get new contexts, a worker a new process: where their buffers lie in physical
    memory makes one or the other some percent slower for as long as they live. So rounds between two renewals depend
    on each other.
    """
    times: dict[str, list[int]] = {name: [] for name in sides}
    n_graphs = 0
    forth, back = list(sides), list(reversed(sides))
    for i in range(n_pairs + 1):
        if n_renew and i > 1 and (i - 1) % n_renew == 0:
            in_turn = forth if (i - 1) // n_renew % 2 else back
            for name in in_turn:
                sides[name].renew()
            for name in in_turn:
                getattr(sides[name], kind)(*arguments)
        for name in forth if i % 2 else back:
            nanoseconds, built = getattr(sides[name], kind)(*arguments)
            advance()
            if i > 0:
                times[name].append(nanoseconds)
                n_graphs += built
    n_tokens = arguments[-1]
    result: dict[str, Any] = {"n_tokens": n_tokens}
    if kind == "decode":
        result["depth"] = arguments[0]
    result.update({name: n_tokens * 1e9 / median(ns) for name, ns in times.items()})
    if ON in sides:
        result.update(_compare(times[ON], times[OFF], n_renew))
        result["graphs_built"] = n_graphs
    if OTHER in sides:
        pairs = ((PLAIN, OTHER), (OTHER, PLAIN))
        result["ratios"] = {f"{a}/{b}": _compare(times[a], times[b], n_renew) for a, b in pairs}
    result["ns"] = times
    return result


def _compare(a: Sequence[int], b: Sequence[int], n_shared: int) -> dict[str, Any]:
    """Time a ÷ time b, pair by pair: the median, and the interval of the median.

    n_shared pairs in a row share contexts and so an error of their own: their median counts, as one value. 0: all do,
    and what is found holds for these contexts.
    """
    ratios = [x / y for x, y in zip(a, b)]
    step = n_shared or 1
    values = [median(ratios[i : i + step]) for i in range(0, len(ratios), step)]
    low, high, confidence = median_interval(values)
    found = {"ratio": median(values), "low": low, "high": high, "confidence": confidence}
    return {**found, "pairs": len(ratios), "groups": len(values)}


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Confidence interval of the median by order statistics, which asks nothing of the distribution.

    The number of values below the true median is binomial with p = 1/2. Returns (low, high, confidence reached): at
    least `confidence`, or with fewer than six values what their least and greatest give.
    """
    ordered, n = sorted(values), len(values)
    rank, outside = 1, 2 * 0.5**n
    while 2 * (rank + 1) <= n:
        wider = outside + 2 * math.comb(n, rank) * 0.5**n
        if wider > 1 - confidence:
            break
        rank, outside = rank + 1, wider
    return ordered[rank - 1], ordered[n - rank], max(0.0, 1 - outside)


def _resident(folder: str, options: Any, adapter: str, n_tokens: int, err: Console) -> dict[str, Any]:
    """Resident bytes with and without the adapter, each in a process of its own, after a prompt and one token more."""
    from ..bench.runs import Worker

    result: dict[str, Any] = {}
    for name, path in ((OFF, None), (ON, adapter)):
        with err.status(f"resident memory, adapter {name}") if err.is_terminal else contextlib.nullcontext():
            worker = Worker(folder, options, path)
            try:
                worker.prefill(n_tokens)
                worker.decode(n_tokens, 1)
                result[name] = worker.resident()
            finally:
                worker.close()
    result["extra"] = {key: result[ON][key] - result[OFF][key] for key in result[ON]}
    return result


def _bench_op(args: argparse.Namespace, out: Console, err: Console) -> dict[str, Any]:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..bench import operator

    n_runs, n_head = max(args.pairs, 10), args.heads or 1
    ranks = [args.rank] if args.rank else [8, 16]
    rows = []
    with _progress(err) as progress:
        task = progress.add_task("operator", total=len(ranks) * len(args.op_tokens) + 1)
        cycle, node = operator.cycle_ns(n_runs), operator.node_ns(n_runs)
        per_cycle = operator.per_cycle(n_runs, cycle)
        floors = [operator.floor(rank, n_head, cycle, per_cycle) for rank in ranks]
        for rank in ranks:
            for n_tokens in args.op_tokens:
                progress.advance(task)
                progress.refresh()
                rows.append(operator.measure(rank, n_head, n_tokens, n_runs))
        progress.advance(task)

    _say(out, f"The operator alone, one thread, {operator.simd_name()}, per token and layer; {_cpu()}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "heads", "tokens per call", "median ns", "least ns", "instructions", "floor ns"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        count, floor = row["instructions"], floors[ranks.index(row["rank"])]["ns"]
        table.add_row(
            str(row["rank"]), str(row["heads"]), str(row["tokens"]), f"{row['ns']:.1f}", f"{row['ns_min']:.1f}",
            "not available" if count is None else f"{count:.0f}", "unknown" if floor is None else f"{floor:.1f}",
        )  # fmt: skip
    out.print(table)
    _say(out, f"A node that scales one value takes {node:.0f} ns: what ggml spends on any, and on each call above.")
    if cycle is not None:
        _say(
            out,
            f"A cycle: {cycle:.3f} ns, from a chain of multiply-adds of {operator.LATENCY} cycles each; "
            f"of independent ones at least {per_cycle:.2f} vectors in a cycle.",
        )
    for floor in floors:
        _say(out, f"Floor, {floor['text']}")
    return {
        "op": rows,
        "floor": {str(rank): floor for rank, floor in zip(ranks, floors)},
        "node_ns": node,
        "simd": operator.simd_name(),
        "cpu": _cpu(),
    }


#
# printing
#


def _print(out: Console, results: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    setup, info = results["setup"], results["setup"]["model_info"]
    _say(
        out,
        f"{info['description'].replace(' ?B', '')}, {_amount(info['n_params'])} parameters, "
        f"{_amount(info['n_bytes'])}B; {setup['cpu']}, {setup['n_threads']} threads; "
        f"batch {setup['n_batch']}, micro-batch {setup['n_ubatch']}; "
        f"flash attention {'on' if setup['flash_attn'] else 'off'}; KV cache {setup['type_k']}, {setup['type_v']}",
    )
    if "against" in setup:
        folder = setup["against"]["folder"]
        _say(out, f"against: {folder}; plain: this library, no adapter; each in a process of its own")
    elif setup["control"]:
        _say(out, "control: the side 'on' has no adapter either")

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("test", "compared", "tokens/s of the first", "of the second", "ratio", "interval"):
        table.add_column(column, justify="left" if column in ("test", "compared") else "right", no_wrap=True)
    confidence = None
    for kind in ("prefill", "decode"):
        for run in results.get(kind, {}).get("runs", []):
            arguments = (run["depth"], run["n_tokens"]) if kind == "decode" else (run["n_tokens"],)
            compared = {f"{ON}/{OFF}": run} if ON in run else {}
            for name, ratio in {**compared, **run.get("ratios", {})}.items():
                a, b = name.split("/")
                speeds = [_speed(run["n_tokens"], run["ns"][side]) for side in (a, b)]
                interval = f"{ratio['low']:.4f}–{ratio['high']:.4f}"
                table.add_row(_label(kind, arguments), f"{a} ÷ {b}", *speeds, f"{ratio['ratio']:.4f}", interval)
                confidence = ratio["confidence"]
    if confidence is not None:
        out.print(table)
        _say(
            out,
            f"tokens/s: median ± half the distance of the quartiles. Ratio: of times, {_sample(setup)}; "
            f"interval of the median by order statistics, {100 * confidence:.1f} %.",
        )
    for test in results.get("nodes", []):
        _print_nodes(out, test)
    built = [run["graphs_built"] for run in results.get("decode", {}).get("runs", []) if "graphs_built" in run]
    if built and not setup["control"]:
        _say(out, f"Graphs built in the timed decode runs: {', '.join(map(str, built))}.")

    memory = results["memory"]
    if memory:
        size = memory["adapter_file_bytes"]
        _say(
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
        _say(out, f"Resident bytes after a prompt of {memory['prompt']} tokens, adapter: {'; '.join(parts)}.")


def _amount(n: int) -> str:
    """A number in thousands, millions or billions (of bytes: kB, MB, GB)."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} "


def _sample(setup: dict[str, Any]) -> str:
    """What a ratio is the median of."""
    n_pairs, n_renew = setup["pairs"], setup["renew"]
    if n_renew == 0:
        return f"median over {n_pairs} pairs, which all share contexts"
    return f"median over {n_pairs} pairs" + (f", by the medians of each {n_renew} that share contexts" * (n_renew > 1))


def _print_nodes(out: Console, test: dict[str, Any], least: float = 0.005) -> None:
    """One line per kind of node, of those that make up more than `least` of the time or are the memory's own."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..bench.nodes import OURS

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("node", "operator", "nodes", "ms on", "ms off", "difference"):
        table.add_column(column, justify="left" if column in ("node", "operator") else "right", no_wrap=True)
    for row in test["rows"]:
        if row["name"].startswith(OURS) or max(row["on"], row["off"]) > least * test["off"]:
            times = (f"{row['on']:.3f}", f"{row['off']:.3f}", f"{row['on'] - row['off']:+.3f}")
            table.add_row(row["name"], row["op"], str(max(row["n_on"], row["n_off"])), *times)
    _say(out, f"\n{test['test']}: the least of {test['times']} times of each node, computed alone")
    out.print(table)
    _say(
        out,
        f"All nodes: {test['on']:.2f} ms with, {test['off']:.2f} without, ratio {test['ratio']:.4f}; "
        f"the memory's own: {test['own']:.2f} ms, {test['own'] / test['off']:.2%} of those without.",
    )


def _say(out: Console, text: str) -> None:
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _label(kind: str, arguments: tuple[int, ...]) -> str:
    return f"prefill {arguments[0]}" if kind == "prefill" else f"decode {arguments[1]} at {arguments[0]}"


def _speed(n_tokens: int, nanoseconds: Sequence[int]) -> str:
    speeds = [n_tokens * 1e9 / ns for ns in nanoseconds]
    low, _, high = quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    spread = (high - low) / 2
    decimals = 0 if high >= 1000 else 1 if high >= 100 else 2
    return f"{median(speeds):.{decimals}f} ± {spread:.{decimals}f}"


def _progress(err: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    percent = TextColumn("{task.percentage:.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    return Progress(*columns, console=err, auto_refresh=False, transient=True, disable=not err.is_terminal)
