"""`deltamem pack`: base and adapter in one GGUF that loads as one model."""

from __future__ import annotations

import argparse
import os
import re

from ..formats.packed import pack
from ..hub import adapter_file, model_file
from .parser import positive
from .progress import writing_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="base model as GGUF, of any quantisation, or a name")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter for that model: GGUF, PyTorch directory or name")
    parser.add_argument("-o", "--outfile", metavar="FILE", required=True, help="the packed model to write")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--split-max-size", type=_size, metavar="N(M|G)", help="write shards of at most N bytes of tensors"
    )
    split.add_argument("--split-max-tensors", type=positive, metavar="N", help="write shards of at most N tensors")


def run(args: argparse.Namespace) -> int:
    base = model_file(args.base)
    adapter = adapter_file(args.adapter, base)
    with writing_bar() as advance:
        files = pack(base, adapter, args.outfile, advance, args.split_max_size, args.split_max_tensors)
    size = sum(map(os.path.getsize, files)) / 1e6
    shards = "" if len(files) == 1 else f" in {len(files)} shards"
    print(f"{files[0]}: {size:,.2f} MB{shards}, loads as one model")
    return 0


def _size(text: str) -> int:
    """A number of bytes as llama-gguf-split takes it: 300M, 2G."""
    match = re.fullmatch(r"([1-9]\d*)([MG])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size like 300M or 2G")
    return int(match[1]) * {"M": 1000**2, "G": 1000**3}[match[2]]
