"""`deltamem tune`: finds the settings by which a model is fastest on this machine, and keeps them for later runs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..runtime.cpus import usable
from .model_options import ADAPTER_HELP, CACHE_TYPES, MODEL_HELP, model_and_adapter
from .parser import gpu_layers, names, positive_number
from .progress import timing_bar

if TYPE_CHECKING:
    from pathlib import Path

    from ..tuned import Record, Settings

NAMES = {
    "n_threads": "threads for a reply",
    "n_threads_batch": "threads for prompts",
    "n_ubatch": "micro-batch",
    "weights": "weights and attention",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help=MODEL_HELP)
    parser.add_argument("--deltamem", metavar="FILE", help=ADAPTER_HELP)
    parser.add_argument(
        "--for", dest="counts", choices=("both", "prompts", "decode"), default="both",
        help="what counts, and must not become slower (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive_number, default=120.0, metavar="N",
        help="how many seconds to take, about; a busy machine takes longer (120)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-types", type=names, metavar="TYPE,...",
        help=f"also try these types of the KV cache, which change what a model says: {', '.join(CACHE_TYPES)}",
    )  # fmt: skip
    parser.add_argument(
        "-ngl", "--gpu-layers", "--n-gpu-layers", type=gpu_layers, default=-1, metavar="N",
        help="layers on the GPU (all)",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="measure nothing: print what is kept for this model")
    parser.add_argument("-v", "--verbose", action="store_true", help="show llama.cpp's log")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    types = args.kv_types or []
    for name in types:
        if name not in CACHE_TYPES:
            raise InputError(f"--kv-types: {name!a} is no type of a KV cache: {', '.join(CACHE_TYPES)}")
    model, adapter = model_and_adapter(args)

    from .. import tuned
    from ..bench import tune
    from ..runtime import library
    from ..runtime.ggml import can_be_mapped

    library.logger.setLevel("DEBUG" if args.verbose else "ERROR")
    out = Console(width=None if sys.stdout.isatty() else 120)
    if args.show:
        record = tuned.kept(model, args.gpu_layers)
        if record is None:
            raise InputError(
                f"{model}: nothing is kept for it on this machine (CPUs: {usable()}): leave out --show to measure it"
            )
        path = tuned.record_path(tuned.circumstances(model, args.gpu_layers))
        try:
            _print(out, record, path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: is damaged: run deltamem tune -m {args.model} once more") from error
        return 0
    tuned.check_keeping(model, args.gpu_layers)
    with timing_bar(Console(stderr=True)) as show:
        settings, found = tune.run(
            model, adapter, seconds=args.seconds, counts=args.counts, kv_types=types, n_gpu_layers=args.gpu_layers,
            use_mmap=can_be_mapped(model), progress=show,
        )  # fmt: skip
    record = tuned.Record(settings, found)
    _print(out, record, tuned.keep(record, model, args.gpu_layers))
    return 0


def _print(out: Any, record: Record, path: Path) -> None:
    """What was chosen, and why, in one table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..tuned import Settings

    found, settings = record.found, record.settings
    default = Settings.of(found["default"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "default", "chosen", "why"):
        table.add_column(column, no_wrap=not column, overflow="fold")
    for name, title in NAMES.items():
        tried = [(Settings.of(row["settings"]), row["speed"]) for row in found["tried"].get(name, [])]
        why = "; ".join(f"{_value(choice, name)}: {speed:.2f}" for choice, speed in tried)
        table.add_row(title, _value(default, name), _value(settings, name), why or "nothing else to try")
    for kind, speed in found["tokens_per_second"].items():
        gain = "the same settings" if speed["low"] == speed["high"] else _times(speed)
        table.add_row(f"{kind}, tokens/s", f"{speed['default']:.1f}", f"{speed['tuned']:.1f}", gain)
    for other in found["not_taken"]:
        choice = Settings.of(other["settings"])
        differs = [name for name in NAMES if _value(choice, name) != _value(default, name)]
        text = "; ".join(f"{NAMES[name]}: {_value(choice, name)}" for name in differs)
        gains = "; ".join(f"{kind} {_times(gain)}" for kind, gain in other["gains"].items())
        table.add_row("not taken", "", text, f"{gains}: {other['reason'] or 'gains less'}")
    out.print(table)
    text = (
        "Speeds of choices: relative to the best beside which they ran last. × : times as fast as the defaults, median "
        f"and interval over {found['rounds']} rounds; prompts of {found['n_prompt']} tokens, decode of "
        f"{found['n_decode']} after them; what counts: {found['counts']}. Took {found['seconds']:.0f} s. Kept in {path}"
    )
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def _times(gain: Any) -> str:
    return f"{gain['ratio']:.3f} × ({gain['low']:.3f} to {gain['high']:.3f})"


def _value(settings: Settings, name: str) -> str:
    if name != "weights":
        return str(getattr(settings, name))
    parts = ["repacked" if settings.repack else "not repacked"]
    parts += [f"{settings.unpack} in BF16"] * (settings.unpack != "none")
    parts += ["flash attention"] * settings.flash_attn
    parts += [f"KV cache {settings.type_k}"] * (settings.type_k != "f16")
    return " + ".join(parts)
