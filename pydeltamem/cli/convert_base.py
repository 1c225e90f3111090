"""`deltamem convert-base`: a Hugging Face model directory to GGUF."""

from __future__ import annotations

import argparse
import os

from ..convert.hf import OUTTYPES, convert_base


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="HF_DIR", help="directory with config.json, weights and tokenizer")
    parser.add_argument("-o", "--outfile", metavar="FILE", required=True, help="the model to write")
    parser.add_argument(
        "--outtype", choices=OUTTYPES, default="auto", help="type of the weights (auto: the 16-bit type that they have)"
    )
    parser.add_argument("--name", help="name to record in the file")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the converter's log")


def run(args: argparse.Namespace) -> int:
    convert_base(args.model, args.outfile, args.outtype, args.name, args.verbose)
    print(f"{args.outfile}: {os.path.getsize(args.outfile) / 1e6:,.2f} MB")
    return 0
