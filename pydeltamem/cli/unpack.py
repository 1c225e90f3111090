"""`deltamem unpack`: gets base and adapter back from a packed model (formats/packed.py)."""

from __future__ import annotations

import argparse

from ..formats.packed import unpack
from ..hub import model_path
from .progress import writing_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", metavar="MODEL", help="packed model, or a name")
    parser.add_argument("--base", metavar="FILE", required=True, help="the base model to write")
    parser.add_argument("--adapter", metavar="FILE", required=True, help="the adapter to write")


def run(args: argparse.Namespace) -> int:
    model = model_path(args.packed)
    with writing_bar() as advance:
        unpack(model, args.base, args.adapter, advance)
    print(f"{args.base}, {args.adapter}")
    return 0
