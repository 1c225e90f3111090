"""`deltamem eval`: benchmarks of what a model with a memory knows, and the report of their results."""

from __future__ import annotations

import argparse
from typing import Any

from ..evals.benchmarks import BENCHMARKS
from . import eval_benchmark, eval_recall, eval_report
from .parser import sentence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        sub: Any = what.add_parser(name, help=summary, description=sentence(summary))
        return sub

    eval_recall.add_arguments(add("recall", "ask for facts that were told before the text was thrown away"))
    for name, benchmark in BENCHMARKS.items():
        eval_benchmark.add_arguments(add(name, benchmark.summary))
    eval_report.add_arguments(add("report", "join the results of benchmarks and print their tables"))


def run(args: argparse.Namespace) -> int:
    if args.what == "recall":
        return eval_recall.run(args)
    return eval_report.run(args) if args.what == "report" else eval_benchmark.run(args)
