"""`deltamem convert`: a PyTorch checkpoint of an adapter, as published, to GGUF."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from ..convert.adapter import OUTTYPES, layers_of, write_adapter
from ..convert.hf import convert_base
from ..errors import InputError
from ..formats.base_model import Base
from ..formats.checkpoint import Checkpoint
from ..formats.description import writes_of
from ..formats.ending import ending_in_order
from ..formats.kinds import ADAPTER
from ..formats.outputs import check_target, files_of, refuse_inputs
from ..hub import fetch, is_name, model_path, repository
from .model_options import DEFER_HELP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory with delta_mem_config.json and its weights, or hf:REPO"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        required=True,
        help="the base model: a GGUF of any quantisation, a Hugging Face directory, or a name (deltamem pull)",
    )
    parser.add_argument("-o", "--outfile", metavar="FILE", required=True, help="the adapter to write")
    parser.add_argument("--outtype", choices=sorted(OUTTYPES), default="f32", help="type of the weights (default: f32)")
    parser.add_argument("--defer-replies", action="store_true", help=DEFER_HELP)
    parser.add_argument("--name", help="name to record in the file (default: that of the directory)")


def _base(path: str, outfile: str) -> Base:
    """The model that the adapter must fit. A Hugging Face directory is converted to a temporary GGUF."""
    path = model_path(path)
    refuse_inputs(outfile, files_of(path) if os.path.isdir(path) else [path])
    check_target(outfile, ADAPTER)  # before a conversion, which may take long
    if not os.path.isdir(path):
        return Base(path)
    with ending_in_order(), tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, "base.gguf")
        convert_base(path, made, "q8_0")
        base = Base(made)
    base.path = Path(path)
    return base


def run(args: argparse.Namespace) -> int:
    name = args.name
    if is_name(args.checkpoint):
        name = name or repository(args.checkpoint).rpartition("/")[2]
        args.checkpoint = fetch(args.checkpoint)
    checkpoint, base = Checkpoint(args.checkpoint), _base(args.base, args.outfile)
    if args.defer_replies:
        if checkpoint.config.memory_write_granularity not in ("token", "reply_deferred"):
            raise InputError(
                f"--defer-replies: {checkpoint.directory} writes "
                f"{writes_of(checkpoint.config.memory_write_granularity)}: leave it out"
            )
        checkpoint.config = replace(checkpoint.config, memory_write_granularity="reply_deferred")
    write_adapter(checkpoint, base, args.outfile, args.outtype, name)

    config, n_layer = checkpoint.config, len(layers_of(checkpoint, base))
    heads = f"{config.num_state_heads} head{'s' if config.num_state_heads > 1 else ''}"
    print(
        f"{args.outfile}: {base.architecture}, {n_layer} of {base.n_layer} layers, {heads} of rank {config.rank}, "
        f"corrects {', '.join(config.delta_heads)}, writes {writes_of(config.memory_write_granularity)}, "
        f"{args.outtype}, {os.path.getsize(args.outfile) / 1e6:.2f} MB"
    )
    return 0
