"""Averages adapters' PyTorch checkpoints: what SmolLM2's adapter is. Averages of runs were better than each of them.

    python recipes/blend.py build/blend recipes/smollm2/msw=2 run-b=1 run-c=1

Each folder is followed by its weight, of which the sum need not be one. They must have one configuration. The result is
in float16, as delta_mem_adapter.safetensors: `deltamem convert` and `deltamem train --init` take its folder.

--outputs and --write-bias change the average without training: how far the memory moves the model, and how strong a
write is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors

from pydeltamem.errors import DeltaMemError, InputError, OutputError
from pydeltamem.formats import kinds
from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint, write_weights
from pydeltamem.formats.outputs import check_target, make_folder, refuse_inputs, writing

OUTPUTS = re.compile(r"delta_[qkvo]_proj$")


def blend(shares: Sequence[tuple[Path, float]], out: Path, *, outputs: float = 1.0, write_bias: float = 0.0) -> None:
    """Writes Σ share · weights / Σ share.

    Args:
        outputs: a factor of the projections that make corrections of what is read.
        write_bias: is added to each bias of β, whose sigmoid is how strong a write is.

    Raises:
        CheckpointError, InputError, OutputError
    """
    total = sum(share for _, share in shares)
    if not shares or min(share for _, share in shares) < 0 or not np.isfinite(total) or total == 0:
        raise InputError("shares must be numbers of at least 0, and not all 0")
    if not (np.isfinite(outputs) and np.isfinite(write_bias)):
        raise InputError(f"--outputs and --write-bias must be finite, not {outputs} and {write_bias}")
    refuse_inputs(out, [folder for folder, _ in shares])
    if (out / WEIGHTS[0]).exists():
        raise InputError(f"{out / WEIGHTS[0]}: would be read instead of the blend beside it: name another folder")
    first: Checkpoint | None = None
    sums: dict[str, np.ndarray] = {}
    for folder, share in shares:
        one = Checkpoint(folder)
        shapes = {name: tensor.shape for name, tensor in one.tensors.items()}
        if first is None:
            first = one
            sums = {name: np.zeros(shape) for name, shape in shapes.items()}
        elif one.config != first.config or shapes != {name: tensor.shape for name, tensor in first.tensors.items()}:
            raise InputError(f"{folder}: its configuration is not that of {first.directory}")
        for name, tensor in one.tensors.items():
            sums[name] += share / total * tensor
    assert first is not None  # there is a share
    halves: dict[str, np.ndarray] = {}
    for name, tensor in sums.items():
        if OUTPUTS.search(name):
            tensor *= outputs
        if name.endswith("beta_bias"):
            tensor += write_bias
        with np.errstate(over="ignore", invalid="ignore"):
            halves[name] = tensor.astype(np.float16)
        if not np.isfinite(halves[name]).all():
            raise InputError(
                f"{out}: {name} would hold values that are no finite float16: lower --outputs, or look for"
                " such values in what is averaged"
            )
    try:
        make_folder(out)
        check_target(out / WEIGHTS[1], kinds.WEIGHTS)
        with writing(out / CONFIG, kinds.CONFIG) as temporary:
            temporary.write_bytes((first.directory / CONFIG).read_bytes())
        write_weights(out, halves)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{out}: cannot be written: {error}") from error


def _share(text: str) -> tuple[Path, float]:
    folder, equals, share = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: name its share: {text}=1")
    return Path(folder), float(share)


def main() -> None:
    parser = argparse.ArgumentParser(description="Average PyTorch checkpoints of adapters.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("shares", type=_share, nargs="+", metavar="DIR=SHARE")
    parser.add_argument("--outputs", type=float, default=1.0, metavar="F", help="a factor of all corrections (1)")
    parser.add_argument("--write-bias", type=float, default=0.0, metavar="X", help="is added to the biases of β (0)")
    args = parser.parse_args()
    try:
        blend(args.shares, args.out, outputs=args.outputs, write_bias=args.write_bias)
    except DeltaMemError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
