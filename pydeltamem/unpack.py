"""`deltamem unpack`: base and adapter out of a packed model (`pydeltamem.pack`)."""

from __future__ import annotations

import argparse

from .pack import progress, unpack


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("packed", metavar="MODEL", help="packed model")
    parser.add_argument("--base", metavar="FILE", required=True, help="the base model to write")
    parser.add_argument("--adapter", metavar="FILE", required=True, help="the adapter to write")


def run(args: argparse.Namespace) -> int:
    with progress() as advance:
        unpack(args.packed, args.base, args.adapter, advance)
    print(f"{args.base}, {args.adapter}")
    return 0
