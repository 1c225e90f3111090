"""`deltamem eval report`: joins the results of benchmarks, also of several machines, and prints their tables."""

from __future__ import annotations

import argparse
import sys

from ..evals.plot import matplotlib_figure
from ..evals.results import RESULTS, as_json, markdown, plot, results_of
from ..formats.kinds import PNG
from ..formats.outputs import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders that --output of the benchmarks named")
    parser.add_argument("--json", metavar="FILE", help="write means, ratios and setups (-: standard output)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the means (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        matplotlib_figure()
    with output(args.json, RESULTS) as write, output(args.plot, PNG) as write_plot:
        results = results_of(args.folders)
        write(as_json(results) + "\n")
        if args.plot:
            write_plot(plot(results))
    print(markdown(results), end="", file=sys.stderr if args.json == "-" else sys.stdout)
    return 0
