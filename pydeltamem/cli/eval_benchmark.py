"""`deltamem eval locomo` and the other benchmarks of the publication: one line of JSON for every answer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InputError, MemoryFileError, no_file
from ..evals.asker import Asker
from ..evals.benchmarks import BENCHMARKS
from ..evals.items import DATA, Item, chosen, digest_of_file, digest_of_model, file_of, items_of
from ..evals.results import markdown, results_of
from ..evals.run import BESIDE, PLAIN, PROTOCOLS, methods_of
from ..evals.run import run as run_benchmark
from ..evals.views import NEEDS
from ..formats.gguf_header import Header
from ..formats.memory_file import MemorySnapshot, owner
from ..hub import adapter_file, model_file
from ..models import default_files
from ..runtime.cpus import cpu_name
from ..runtime.devices import gpu_names
from ..version import __version__
from .model_options import (
    ADAPTER_HELP,
    DEFER_HELP,
    MODEL_HELP,
    add_context_arguments,
    add_eval_arguments,
    context_options,
    ended_by_ctrl_c,
    named_adapters,
    packed_adapter,
    padded,
)
from .parser import at_least, count, names, positive

N_CTX = 4096  # default with -m
WRITES = {"published": {"context": True, "memory": False}, "on": dict.fromkeys(PROTOCOLS, True)}
WRITES["off"] = dict.fromkeys(PROTOCOLS, False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="FILE", help=f"{MODEL_HELP}; else the small model of the package")
    parser.add_argument("--deltamem", metavar="FILE", help=f"{ADAPTER_HELP}; the tables call it deltamem")
    parser.add_argument("--adapters", metavar="NAME=FILE", nargs="+", help="several adapters, each under its name")
    parser.add_argument("--lora", metavar="FILE", help="LoRA adapter GGUF, for the method lora")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder of the answers; the same command continues a run"
    )
    parser.add_argument("--data", metavar="FILE", help=f"questions as published, or the folder of all data ({DATA})")
    parser.add_argument(
        "--methods", type=names, metavar="NAME,...",
        help=f"only these: {', '.join(PLAIN)}, lora, and with an adapter's name NAME/context, NAME/memory,"
        f" NAME/memory+VIEW with VIEW of {', '.join(BESIDE)} (all but dense, summary and +VIEW)",
    )  # fmt: skip
    parser.add_argument(
        "--protocol", type=names, metavar="NAME,...", default="context,memory",
        help="context: the text stays, and is written while it is decoded; memory: it is dropped before the question"
        " (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--answer-writes", choices=tuple(WRITES), default="published",
        help="whether question and answer write (%(default)s: on in context, off in memory)",
    )  # fmt: skip
    parser.add_argument("--defer-replies", action="store_true", help=DEFER_HELP)
    parser.add_argument(
        "--rehearse", action="store_true",
        help="protocol memory: the text is decoded and written twice before it is dropped",
    )  # fmt: skip
    parser.add_argument(
        "--load-memory", metavar="FILE",
        help="each question begins with a copy of this memory, not with an empty one: what one full of other things"
        " does to the answers",
    )  # fmt: skip
    parser.add_argument("--kinds", type=names, metavar="NAME,...", help="only questions of these kinds")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N questions, drawn by the seed")
    parser.add_argument(
        "--seed", type=count, default=42, metavar="N", help="seed of sampling, and of what is drawn (%(default)s)"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="the I-th of N parts of the questions"
    )
    parser.add_argument(
        "--window", type=positive, default=512, metavar="N",
        help="tokens that searches, last turns and summaries may show (%(default)s)",
    )  # fmt: skip
    add_eval_arguments(parser, N_CTX)
    parser.add_argument(
        "--parallel", type=at_least(2), default=8, metavar="N", help="texts that are decoded together (%(default)s)"
    )
    parser.add_argument(
        "--no-sharing", action="store_true",
        help="decode a context again for each of its questions: the same answers, later",
    )  # fmt: skip
    add_context_arguments(parser.add_argument_group("context"))


def _shard(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/4")
    return int(first), int(second)


def run(args: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[args.what]
    name, named = _model_and_adapters(args)
    _check(args)
    benchmark.check()
    every = items_of(benchmark, args.data)
    items = chosen(_of_kinds(every, args.kinds), args.limit, args.seed, args.shard)
    if not items:
        raise InputError(f"--shard {args.shard[0]}/{args.shard[1]}: has no question: there are fewer contexts")
    model = model_file(name)
    if not named and (packed := packed_adapter(model)):
        named = {"deltamem": packed}
    adapters = {adapter: adapter_file(file, model) for adapter, file in named.items()}
    memory = _memory(args.load_memory, adapters)
    has_contexts = any(item.context for item in items)
    methods = methods_of(
        adapters, args.protocol, WRITES[args.answer_writes], bool(args.lora), args.methods, has_contexts, args.rehearse
    )
    for method in methods:
        if method.view in NEEDS:
            NEEDS[method.view]()
    n_ctx = padded(args.ctx_size) if args.ctx_size is not None else 0 if args.model is None else N_CTX
    setup = {
        "version": __version__,
        "benchmark": benchmark.name,
        "model": os.path.basename(name),
        "adapters": {adapter: os.path.basename(file) for adapter, file in named.items()},
        "lora": args.lora and os.path.basename(args.lora),
        "load_memory": args.load_memory and os.path.basename(args.load_memory),
        "methods": [method.name for method in methods],
        "data": os.path.basename(args.data or "") or benchmark.file,
        "questions": len(items),
        "n_ctx": n_ctx,
        **_options_in_setup(args),
        "sha256": {
            "model": digest_of_model(model),
            "data": digest_of_file(file_of(benchmark, args.data)),
            "adapters": {adapter: digest_of_file(file) for adapter, file in adapters.items()},
            "lora": args.lora and digest_of_file(args.lora),
            **({"load_memory": digest_of_file(args.load_memory)} if args.load_memory else {}),
        },
    }

    part = "" if args.shard[1] == 1 else f"-{args.shard[0]}of{args.shard[1]}"
    path = Path(args.output) / f"{benchmark.name}{part}.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("answers", total=None)
        try:
            run_benchmark(
                benchmark, items, methods, _opening(args, model, memory, n_ctx, bar), path, setup,
                every=every, window=args.window, seed=args.seed, parallel=args.parallel,
                progress=lambda n, total: bar.update(task, completed=n, total=total),
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"{path}: has the answers so far: the same command goes on", file=sys.stderr)
            raise
    print(f"{path}: every prompt, answer and score", file=sys.stderr)
    print(markdown(results_of([path])), end="")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for an option that is wrong whatever the questions are."""
    for protocol in args.protocol:
        if protocol not in PROTOCOLS:
            raise InputError(f"--protocol: there is no protocol {protocol}: {', '.join(PROTOCOLS)}")
    if args.lora and not os.path.isfile(args.lora):
        raise InputError(no_file(args.lora, "LoRA file"))


def _options_in_setup(args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on and the options say, with what the machine makes of them."""
    gpus = gpu_names()
    return {
        "answer_writes": args.answer_writes,
        "rehearse": args.rehearse,
        "defer_replies": args.defer_replies,
        "kinds": args.kinds and ",".join(args.kinds),
        "limit": args.limit,
        "shard": "/".join(map(str, args.shard)),
        "seed": args.seed,
        "window": args.window,
        "parallel": args.parallel,
        "batch": [args.batch_size, args.ubatch_size],
        "flash_attn": args.flash_attn,
        "cache": [args.cache_type_k, args.cache_type_v],
        "unpack": args.unpack,
        "processor": [cpu_name(), *gpus],
        "gpu_layers": args.gpu_layers if gpus else 0,
    }


def _opening(
    args: argparse.Namespace, model: str, memory: MemorySnapshot | None, n_ctx: int, bar: Progress
) -> Callable[[bool], Asker]:
    """What opens the model, with or without the LoRA adapter, while the bar is away."""

    def open_model(lora: bool) -> Asker:
        bar.stop()  # Ctrl-C would leave the terminal without its cursor
        with ended_by_ctrl_c():
            asker = Asker(
                model, lora=args.lora if lora else None, n_ctx=n_ctx, threads=args.threads, parallel=args.parallel,
                shares=not args.no_sharing, memory=memory, defer_replies=args.defer_replies, **context_options(args),
            )  # fmt: skip
        bar.start()
        return asker

    return open_model


def _memory(path: str | None, adapters: Mapping[str, str]) -> MemorySnapshot | None:
    """The memory that questions begin with. Raises MemoryFileError if another adapter than one of these wrote it: when
    an adapter is attached, the methods without one may have run for hours.
    """
    if path is None:
        return None
    if not adapters:
        raise InputError("--load-memory needs an adapter: --deltamem, --adapters or a packed model")
    memory = MemorySnapshot.load(path)
    for name, file in adapters.items():
        if memory.metadata.get("adapter", "") != Header(file).keys.get("deltamem.source.sha256", ""):
            raise MemoryFileError(f"{path}: the memory of {owner(memory.metadata)}, not of adapter {name}")
    return memory


def _of_kinds(items: list[Item], kinds: list[str] | None) -> list[Item]:
    """The items of these kinds; None: all. Raises InputError if there is no such kind."""
    if kinds is None:
        return items
    known = {item.kind for item in items}
    for kind in kinds:
        if kind not in known:
            raise InputError(f"--kinds: there is no question of {kind}: {', '.join(sorted(known))}")
    return [item for item in items if item.kind in kinds]


def _model_and_adapters(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The model, and its adapters by name."""
    adapters = named_adapters(args, "deltamem")
    if args.model is None:
        model, shipped = default_files()
        return os.fspath(model), adapters or {name: os.fspath(path) for name, path in shipped.items()}
    return args.model, adapters
