"""`deltamem quantize`: a model in a smaller type, by llama.cpp's own quantiser."""

from __future__ import annotations

import argparse
import os

from ..formats.gguf_header import Header
from ..hub import model_file
from ..runtime.quantize import grown, quantize
from .parser import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="IN", help="model GGUF or a name, preferably f32, f16 or bf16")
    parser.add_argument("outfile", metavar="OUT", help="the model to write")
    parser.add_argument("type", metavar="TYPE", help="q4_k_m, q8_0, f16, …: named as for llama.cpp's llama-quantize")
    parser.add_argument("-t", "--threads", type=count, default=0, metavar="N", help="threads (all CPUs)")
    parser.add_argument("--allow-requantize", action="store_true", help="accept a model that is already quantised")
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def run(args: argparse.Namespace) -> int:
    model = model_file(args.model)
    quantize(model, args.outfile, args.type, args.threads, args.allow_requantize, args.verbose)
    before, after = Header.of_model(model).n_bytes / 1e6, os.path.getsize(args.outfile) / 1e6
    print(f"{args.outfile}: {args.type}, {after:,.2f} MB of {before:,.2f}")
    if after > before:
        print(f"larger than before: as {args.type}, llama.cpp makes {grown(model, args.outfile)}")
    return 0
