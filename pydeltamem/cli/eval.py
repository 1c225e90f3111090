"""`deltamem eval recall`: what a model with a memory still knows once the text is gone, and other ways to remember."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

from rich.console import Console

from ..errors import InputError
from ..evals.methods import PLAIN, answer_all, bm25s_module
from ..evals.plot import matplotlib_figure, plot
from ..evals.reader import NativeReader
from ..evals.recall import TASKS, make_cases
from ..evals.report import REPORT, print_tables, show
from ..evals.statistics import ratios_of, table_of
from ..evals.world import FACTS
from ..formats.kinds import PNG
from ..formats.outputs import output
from ..models import default_files
from .parser import count, integers, positive

MAX_QUESTION = 64  # tokens, and its answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "facts that were told before the text was thrown away"
    recall = what.add_parser("recall", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    recall.add_argument("-m", "--model", metavar="FILE", help="model GGUF or a name (the model of the package)")
    recall.add_argument(
        "--memories", metavar="NAME=FILE", nargs="+", help="adapters, each under the name that the table gives it"
    )
    recall.add_argument("-n", type=positive, default=200, metavar="N", help="questions of each kind (%(default)s)")
    recall.add_argument(
        "--facts", type=integers, default=[1, 2, 4, 8, 16], metavar="N,...", help="facts told (1,2,4,8,16)"
    )
    recall.add_argument(
        "--distance", type=integers, default=[64, 128, 256], metavar="N,...",
        help="tokens of small talk after four facts (64,128,256)",
    )  # fmt: skip
    recall.add_argument("--window", type=positive, default=64, metavar="N", help="tokens of a window (%(default)s)")
    recall.add_argument("--tasks", default=",".join(TASKS), help="(%(default)s)")
    recall.add_argument("--methods", metavar="NAME,...", help="only these")
    recall.add_argument("--seed", type=count, default=1, help="(%(default)s)")
    recall.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (half the CPUs)")
    recall.add_argument("--json", metavar="FILE", help="write the rows and the ratios")
    recall.add_argument("--plot", metavar="FILE.png", help="draw accuracy by facts and by distance (needs matplotlib)")
    recall.add_argument("--show", type=count, default=0, metavar="N", help="print N conversations with each answer")


def run(args: argparse.Namespace) -> int:
    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError(f"--tasks: there is no task {unknown[0]}: {', '.join(TASKS)}")
    model, memories = args.model, dict(item.partition("=")[::2] for item in args.memories or ())
    if model is None:
        model, shipped = default_files()
        memories = memories or {name: os.fspath(path) for name, path in shipped.items()}
    if not memories or not all(memories.values()):
        raise InputError("--memories: name the adapters of -m MODEL, as in --memories tsw=memory.gguf")
    taken = {name for name in memories if name in PLAIN or "+" in name}
    if taken or len(memories) < len(args.memories or memories):
        raise InputError(f"--memories: two methods would be called {min(taken, default=min(memories))}")
    most = len(FACTS["new_pair"])
    if not 1 <= min(args.facts) <= max(args.facts) <= most:
        raise InputError(f"--facts: the world holds 1 to {most} facts of one person")
    methods = args.methods.split(",") if args.methods else None
    if methods is None or "bm25" in methods:
        bm25s_module()
    if args.plot:
        matplotlib_figure()
    console = Console(stderr=True)
    with output(args.json, REPORT) as write, output(args.plot, PNG) as write_plot:
        readers = {name: NativeReader(model, path, args.threads) for name, path in memories.items()}
        plain = next(iter(readers.values()))
        cases = list(make_cases(tasks, args.n, args.facts, args.distance, args.seed, plain))
        longest = max(plain.n_tokens(case.turns) for case in cases)
        if longest + MAX_QUESTION > plain.llm.n_ctx():
            raise InputError(
                f"--distance, --facts: a conversation of {longest} tokens and a question do not fit into the"
                f" {plain.llm.n_ctx()} that {model} reads: take less"
            )
        answers = answer_all(cases, readers, args.window, console, methods)
        rows = table_of(cases, answers)
        ratios = ratios_of(rows, list(readers))
        print_tables(Console(width=None if sys.stdout.isatty() else 160), rows, ratios)
        for i in range(min(args.show, len(cases))):
            show(cases[i], {method: given[i] for method, given in answers.items()})
        setup = {"model": os.path.basename(os.fspath(model)), "n": args.n, "window": args.window, "seed": args.seed}
        results = {"setup": setup, "rows": [asdict(row) for row in rows], "ratios": ratios}
        write(json.dumps(results, indent=1) + "\n")
        if args.plot:
            write_plot(plot(rows))
    return 0
