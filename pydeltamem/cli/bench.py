"""`deltamem bench`: what an adapter costs. Its options; bench_tables.py prints what bench/ measures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..bench.models import synthetic_files
from ..bench.synthetic import SHAPES
from ..errors import InputError
from ..formats.kinds import PNG, json_of
from ..formats.model_numbers import MAX_CONTEXT
from ..formats.outputs import output
from ..runtime.cpus import usable
from ..version import __version__
from .bench_tables import print_costs, print_operator, print_returns, say
from .model_options import ADAPTER_HELP, MODEL_HELP, add_context_arguments, context_options, model_and_adapter
from .parser import count, integers, positive
from .progress import timing_bar

if TYPE_CHECKING:
    from rich.console import Console

REPORT = json_of("a report of deltamem bench", {"version", "setup"}, {"version", "op"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser.add_argument_group("model"))
    _add_what(parser.add_argument_group("what is timed (of several lengths, the JSON repeats the first at its top)"))
    _add_context(parser.add_argument_group("context"))
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")
    parser.add_argument("--json", metavar="FILE", help="also write the results as JSON (-: standard output)")


def _add_model(model: argparse._ArgumentGroup) -> None:
    source = model.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", metavar="FILE", help=MODEL_HELP)
    source.add_argument(
        "--synthetic", choices=tuple(SHAPES), metavar="SHAPE",
        help=f"model and adapter of this shape with random weights, kept in the user's cache: {', '.join(SHAPES)}",
    )  # fmt: skip
    model.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    model.add_argument("--ftype", metavar="TYPE", help="type of the --synthetic model, any of llama.cpp's (q4_k_m)")
    model.add_argument(
        "--outtype", choices=("f32", "f16", "bf16", "q8_0"), help="type of the --synthetic adapter (f16)"
    )
    model.add_argument("--vocab", metavar="FILE", help="GGUF with the vocabulary for --synthetic")
    model.add_argument("--rank", type=positive, metavar="R", help="rank of --synthetic (8) and of --op (8 and 16)")
    model.add_argument("--heads", type=positive, metavar="H", help="state heads of --synthetic and --op (1)")


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "-p",
        "--n-prompt",
        type=integers,
        default=[512],
        metavar="N,...",
        help="tokens of the prompt (512; 0: none)",
    )
    what.add_argument("-n", "--n-gen", type=count, default=32, metavar="N", help="tokens of decode (32; 0: none)")
    what.add_argument(
        "-d", "--n-depth", type=integers, default=[0], metavar="N,...", help="tokens of text before decode (0)"
    )
    what.add_argument("--pairs", type=positive, default=10, metavar="N", help="pairs of runs (%(default)s)")
    what.add_argument(
        "--renew", type=count, default=1, metavar="N",
        help="make new contexts, and new processes for --against, after every N pairs (%(default)s; 0: never)",
    )  # fmt: skip
    what.add_argument(
        "--against", metavar="DIR", help="also time the llama library in this folder, a build of the same llama.cpp"
    )
    what.add_argument(
        "--control", action="store_true", help="no adapter: shows the measurement's noise, or times --against alone"
    )
    what.add_argument(
        "--rss", type=count, metavar="N", help="measure RAM after a prompt of N tokens (the longest prompt; 0: do not)"
    )
    what.add_argument(
        "--nodes", action="store_true",
        help="instead of whole runs, time each kind of graph node: the least time of many runs",
    )  # fmt: skip
    what.add_argument(
        "--return", dest="returning", type=integers, metavar="N,...",
        help="time the return to conversations of N tokens, by what is restored, and nothing else",
    )  # fmt: skip
    what.add_argument(
        "--rereads", type=positive, default=1, metavar="N", help="how often --return decodes the text (%(default)s)"
    )
    what.add_argument("--plot", metavar="FILE.png", help="draw what --return finds (needs matplotlib)")
    what.add_argument("--op", action="store_true", help="time the operator on one thread, with its floor and no model")
    what.add_argument(
        "--op-tokens", type=integers, default=[1, 512], metavar="N,...", help="tokens per call of --op (1,512)"
    )


def _add_context(context: argparse._ArgumentGroup) -> None:
    context.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (all CPUs)")
    context.add_argument("-tb", "--threads-batch", type=positive, metavar="N", help="threads for prompts (as -t)")
    add_context_arguments(context)
    context.add_argument("--no-repack", action="store_true", help="leave weights in the layout of the file")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    _check(args)
    err = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    out = err if args.json == "-" else Console(width=None if sys.stdout.isatty() else 120)
    if args.plot:
        from ..evals.plot import matplotlib_figure

        figure_of = matplotlib_figure()
    with output(args.json, REPORT) as write, output(args.plot, PNG) as write_plot:
        bench, show = _bench, print_costs
        if args.op:
            bench, show = _bench_op, print_operator
        elif args.returning:
            bench, show = _bench_return, print_returns
        results = bench(args, err)
        if args.plot:
            from ..bench.returning import picture

            write_plot(picture(results["return"], figure_of))
        write(json.dumps({"version": __version__, **results}, indent=2) + "\n")
    show(out, results)  # at last: the reader of a table may be gone
    return 0


def _check(args: argparse.Namespace) -> None:
    made = {"--ftype": args.ftype, "--outtype": args.outtype, "--vocab": args.vocab}  # by --synthetic
    if args.plot and not args.returning:
        raise InputError("--plot draws what --return finds: add --return, or drop --plot")
    if args.op:
        others = {"-m": args.model, "--synthetic": args.synthetic, "--deltamem": args.deltamem, **made}
        others.update({"--against": args.against, "--nodes": args.nodes, "--return": args.returning})
        if given := [name for name, value in others.items() if value]:
            raise InputError(f"--op runs without a model: drop {', '.join(given)}, or --op")
        if not all(args.op_tokens):
            raise InputError("--op-tokens: a call needs at least one token")
        if args.rank and args.rank > 64:
            raise InputError(f"--rank {args.rank}: the operator takes ranks up to 64")
        return
    if args.returning:
        others = {"--against": args.against, "--nodes": args.nodes, "--control": args.control}
        if given := [name for name, value in others.items() if value]:
            raise InputError(f"--return times one model with its memory: drop {', '.join(given)}, or --return")
        if not all(args.returning):
            raise InputError("--return: a conversation needs at least one token")
    if args.nodes and args.against:
        raise InputError("--nodes times the graphs of one library only: drop --against or --nodes")
    if not args.model and not args.synthetic:
        raise InputError("no model: name one with -m FILE or --synthetic SHAPE, or time the operator alone with --op")
    if args.model:
        made.update({"--rank": args.rank, "--heads": args.heads})
        if given := [name for name, value in made.items() if value]:
            raise InputError(f"{', '.join(given)}: applies only to --synthetic: drop it, or -m {args.model}")
    if args.synthetic and args.deltamem:
        raise InputError("--synthetic makes its own adapter: drop --deltamem, or name a model with -m")
    if args.control and args.deltamem:
        raise InputError("--control runs without an adapter: drop --control or --deltamem")
    if args.cache_type_v not in ("f32", "f16", "bf16") and args.flash_attn == "off":
        raise InputError(f"-ctv {args.cache_type_v}: llama.cpp needs flash attention for it: add -fa on")
    if not (any(args.n_prompt) or args.n_gen or args.returning) and (not args.rss or args.control or args.nodes):
        raise InputError("-p 0 and -n 0 leave nothing to time")
    longest = max([*args.n_prompt, args.rss or 0, max(args.n_depth, default=0) + args.n_gen, *(args.returning or ())])
    if longest > MAX_CONTEXT:
        raise InputError(f"-p, -n, -d, --rss or --return: {longest} tokens, a context has {MAX_CONTEXT}: lower them")


def _bench(args: argparse.Namespace, err: Console) -> dict[str, Any]:
    from ..bench import comparison
    from ..bench.runs import Options
    from ..runtime import library
    from ..runtime.ggml import can_be_mapped

    library.logger.setLevel("DEBUG" if args.verbose else "ERROR")
    against = comparison.library_in(args.against) if args.against else None
    if against and args.unpack != "none" and not comparison.unpacks(against):
        raise InputError(f"--unpack: the library in {against} has no such products: drop --against or --unpack")
    prompts = tuple(n for n in args.n_prompt if n)
    with timing_bar(err) as show:
        model, adapter = _synthetic(args, show) if args.synthetic else model_and_adapter(args)
        if args.control:
            adapter = None
        elif adapter is None and against is None:
            raise InputError(f"{model}: nothing to compare: add --deltamem ADAPTER or --against LIBRARY")
        elif adapter is None and not prompts and not args.n_gen:
            raise InputError(f"{model}: nothing to measure: -p 0 and -n 0 time nothing, and --rss needs an adapter")
        _check_unpack(args, model, err)
        plan = comparison.Plan(
            prompts=prompts,
            depths=tuple(args.n_depth),
            n_decode=args.n_gen,
            n_pairs=args.pairs,
            n_renew=args.renew,
            n_resident=max([*prompts, 1]) if args.rss is None else args.rss,
            by_node=args.nodes,
        )
        options = Options(
            model=model,
            n_ctx=plan.n_ctx,
            n_batch=args.batch_size,
            n_ubatch=min(args.ubatch_size, args.batch_size),
            n_threads=args.threads or usable(),
            n_gpu_layers=args.gpu_layers,
            flash_attn=args.flash_attn == "on",
            type_k=args.cache_type_k,
            type_v=args.cache_type_v,
            use_mmap=can_be_mapped(model),
            n_threads_batch=args.threads_batch,
            repack=not args.no_repack,
            unpack=args.unpack,
        )
        return comparison.run(options, adapter, plan, against, show)


def _bench_return(args: argparse.Namespace, err: Console) -> dict[str, Any]:
    from ..bench import returning
    from ..llama import DeltaMemLlama
    from ..runtime import library
    from ..runtime.interrupt import uninterrupted

    library.logger.setLevel("DEBUG" if args.verbose else "ERROR")
    with timing_bar(err) as show:
        model, adapter = _synthetic(args, show) if args.synthetic else model_and_adapter(args)
        if adapter is None:
            raise InputError(f"{model}: has no memory to return to: add --deltamem ADAPTER")
        _check_unpack(args, model, err)
        options = {
            **context_options(args),
            "n_threads": args.threads or usable(),
            "n_threads_batch": args.threads_batch or args.threads or usable(),
            "repack": not args.no_repack,
        }

        def load(n_ctx: int) -> DeltaMemLlama:
            with uninterrupted():
                return DeltaMemLlama(model, deltamem_path=None if adapter == model else adapter, n_ctx=n_ctx, **options)

        report = returning.run(load, args.returning, args.pairs, args.rereads, show)
    return {"setup": {"model": model, "deltamem": adapter, **options}, "return": report}


def _check_unpack(args: argparse.Namespace, model: str, err: Console) -> None:
    """Says so if --unpack changes nothing: figures would pass for others."""
    from ..runtime.unpacking import NONE, overrides

    if args.unpack != NONE and overrides(model, args.unpack) is None:
        say(err, f"--unpack {args.unpack}: no weight of {model} is multiplied in BF16 on this machine")


def _synthetic(args: argparse.Namespace, show: Callable[[str, int, int], None]) -> tuple[str, str]:
    ftype, outtype, rank, n_head = args.ftype or "q4_k_m", args.outtype or "f16", args.rank or 8, args.heads or 1
    what = f"making {args.synthetic} {ftype}"
    return synthetic_files(
        args.synthetic, ftype, outtype, rank, n_head, args.vocab, lambda done, total: show(what, done, total)
    )


def _bench_op(args: argparse.Namespace, err: Console) -> dict[str, Any]:
    from ..bench import operator

    ranks = [args.rank] if args.rank else [8, 16]
    with timing_bar(err) as show:
        return operator.run(ranks, args.heads or 1, args.op_tokens, max(args.pairs, 10), show)
