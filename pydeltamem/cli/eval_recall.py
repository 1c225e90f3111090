"""`deltamem eval recall`: what a model with a memory still knows once the text is gone, compared with other ways."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..errors import InputError
from ..evals.case import Case
from ..evals.corpora import CORPORA, MAX_QUESTION, missing
from ..evals.items import DATA, digest_of_file, digest_of_model
from ..evals.methods import PLAIN, answer_all, chosen
from ..evals.plot import matplotlib_figure, plot
from ..evals.reader import MAX_ANSWER, NativeReader
from ..evals.recall import ALIASES, FOR_ANY_MODEL, MOST_FACTS, TASKS, WORLD, make_cases
from ..evals.report import REPORT, as_json, print_tables, show
from ..evals.search import bm25s_module
from ..evals.statistics import ratios_of, right_of, table_of
from ..formats.kinds import PNG
from ..formats.outputs import output
from ..hub import adapter_file, model_file
from ..models import default_files
from ..runtime.cpus import cpu_name
from ..version import __version__
from .model_options import (
    ADAPTER_HELP,
    DEFER_HELP,
    MODEL_HELP,
    add_eval_arguments,
    add_unpack,
    ended_by_ctrl_c,
    named_adapters,
    packed_adapter,
    padded,
)
from .parser import count, integers, names, positive

N_CTX = 2048  # default with -m


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="FILE", help=f"{MODEL_HELP}; else the small model of the package")
    parser.add_argument("--deltamem", metavar="FILE", help=f"{ADAPTER_HELP}; the tables call it memory")
    parser.add_argument(
        "--adapters",
        metavar="NAME=FILE",
        nargs="+",
        help="several adapters, each under the name that the tables give it",
    )
    parser.add_argument(
        "--tasks", type=names, metavar="NAME,...",
        help=f"of {', '.join([*ALIASES, *TASKS])} ({','.join(FOR_ANY_MODEL)}; for the small model {','.join(WORLD)})",
    )  # fmt: skip
    parser.add_argument(
        "--methods", type=names, metavar="NAME,...",
        help=f"only these: {', '.join(PLAIN)}, and with the name of an adapter NAME, NAME+window, NAME+full",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="DIR", help=f"folder of the published conversations ({DATA})"
    )  # fmt: skip
    parser.add_argument("-n", type=positive, default=200, metavar="N", help="questions of each kind (%(default)s)")
    parser.add_argument(
        "--facts", type=integers, metavar="N,...", help="facts told (1,4,8; for the small model 1,2,4,8,16)"
    )
    parser.add_argument(
        "--distance", type=integers, default=[64, 128, 256], metavar="N,...",
        help="tokens of small talk after four facts (64,128,256)",
    )  # fmt: skip
    parser.add_argument("--window", type=positive, default=64, metavar="N", help="tokens of a window (%(default)s)")
    parser.add_argument("--seed", type=count, default=1, metavar="N", help="seed of the questions (%(default)s)")
    add_eval_arguments(parser, N_CTX)
    parser.add_argument(
        "--answer-writes", choices=("on", "off"), default="on",
        help="whether a question and its answer write their copy of the memory, as in a chat (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--defer-replies", action="store_true", help=DEFER_HELP)
    parser.add_argument(
        "--rehearse", action="store_true", help="decode and write each conversation twice before its text goes"
    )
    add_unpack(parser, "none")
    parser.add_argument(
        "--json", metavar="FILE", help="write the rows, the ratios and all answers (-: standard output)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw the accuracies (needs matplotlib)")
    parser.add_argument("--show", type=count, default=0, metavar="N", help="print N conversations with each answer")


def run(args: argparse.Namespace) -> int:
    model, adapters = _model_and_adapters(args)
    is_small = args.model is None
    tasks, data = _tasks(args, is_small)
    facts = args.facts or ([1, 2, 4, 8, 16] if is_small else [1, 4, 8])
    if not 1 <= min(facts) <= max(facts) <= MOST_FACTS:
        raise InputError(f"--facts: the world holds 1 to {MOST_FACTS} facts of one person")
    methods = chosen(adapters, args.methods)
    if "bm25" in methods:
        bm25s_module()
    if args.plot:
        matplotlib_figure()
    n_ctx = padded(args.ctx_size) if args.ctx_size is not None else 0 if is_small else N_CTX
    with output(args.json, REPORT) as write, output(args.plot, PNG) as write_plot:
        path = model_file(model)
        files = {name: adapter_file(file, path) for name, file in adapters.items()}
        with ended_by_ctrl_c():
            reader = NativeReader(
                path, n_ctx=n_ctx, threads=args.threads, answer_writes=args.answer_writes == "on",
                rehearses=args.rehearse, unpack=args.unpack, defer_replies=args.defer_replies,
            )  # fmt: skip
        try:
            n_ctx = reader.n_ctx
            cases, answers = _ask(args, reader, tasks, data, facts, files, methods)
        finally:
            reader.close()
        right = right_of(cases, answers)
        rows, ratios = table_of(cases, right), ratios_of(cases, right, list(adapters))
        setup = {
            "version": __version__,
            "model": os.path.basename(os.fspath(model)),
            "adapters": {name: os.path.basename(file) for name, file in adapters.items()},
            "tasks": tasks, "facts": facts, "n_ctx": n_ctx, **_options_in_setup(args),
            "sha256": {
                "model": digest_of_model(path),
                "adapters": {name: digest_of_file(file) for name, file in files.items()},
            },
        }  # fmt: skip
        write(as_json(setup, rows, ratios, cases, answers))
        if args.plot:
            write_plot(plot(rows))
    out = sys.stderr if args.json == "-" else sys.stdout
    console = Console(file=out, width=None if out.isatty() else 160)
    print_tables(console, rows, ratios)
    for i in range(min(args.show, len(cases))):
        show(cases[i], {method: given[i] for method, given in answers.items()}, out)
    return 0


def _ask(
    args: argparse.Namespace,
    reader: NativeReader,
    tasks: Sequence[str],
    data: Path | None,
    facts: Sequence[int],
    files: Mapping[str, str],
    methods: Sequence[str],
) -> tuple[list[Case], dict[str, list[str]]]:
    """The questions, and each method's answers. Raises InputError if a question does not fit into the context."""
    for adapter in files.values():  # raises now if one does not fit
        reader.attach(adapter)
    cases = list(make_cases(tasks, args.n, facts, args.distance, args.seed, reader, data))
    longest = max((reader.n_tokens(case.turns) for case in cases), default=0)
    if longest + MAX_QUESTION + MAX_ANSWER > reader.n_ctx:
        raise InputError(
            f"--distance, --facts: a conversation of {longest} tokens and a question do not fit into the"
            f" context of {reader.n_ctx} tokens of {args.model or reader.llm.model_path}: lower them"
        )
    err = Console(stderr=True)  # if this is no terminal, a bar leaves an empty line
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("asking", total=len(cases) * len(methods))
        return cases, answer_all(cases, reader, files, args.window, methods, lambda n: progress.advance(bar, n))


def _options_in_setup(args: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on and the options say as they are."""
    names = ("distance", "n", "window", "seed", "answer_writes", "rehearse", "defer_replies", "unpack")
    return {**{name: getattr(args, name) for name in names}, "processor": [cpu_name()]}


def _model_and_adapters(args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The model, and its adapters by name."""
    adapters = named_adapters(args, "memory", PLAIN)
    if args.model is None:
        model, shipped = default_files()
        return os.fspath(model), adapters or {name: os.fspath(path) for name, path in shipped.items()}
    if not adapters and (packed := packed_adapter(model_file(args.model))):
        adapters = {"memory": packed}
    if not adapters and not args.methods:
        raise InputError("--adapters: name the adapters of -m MODEL, as in --adapters msw=adapter.gguf")
    return args.model, adapters


def _tasks(args: argparse.Namespace, is_small: bool) -> tuple[list[str], Path | None]:
    """The tasks whose questions can be asked, and the folder of the data."""
    chosen = args.tasks or (WORLD if is_small else FOR_ANY_MODEL)
    tasks = list(dict.fromkeys(task for name in chosen for task in ALIASES.get(name, (name,))))
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks: there is no task {task}: {', '.join([*ALIASES, *TASKS])}")
    folder = args.data or os.environ.get(DATA)
    data = Path(folder) if folder else None
    if args.data and data is not None and not data.is_dir():
        raise InputError(f"--data {args.data}: there is no such folder")
    skipped = [reason for task in tasks if task in CORPORA and (reason := missing(task, data))]
    tasks = [task for task in tasks if task not in CORPORA or not missing(task, data)]
    if not tasks:
        raise InputError("; ".join(skipped))
    for reason in skipped:
        print(f"left out: {reason}", file=sys.stderr)
    return tasks, data
