"""The command `deltamem`: finds the subcommand, turns errors of the package into one sentence and an exit code.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`. Only the one that is called is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import DeltaMemError
from ..runtime.names import as_on_the_command_line
from ..version import __version__
from .parser import Parser, sentence

SUBCOMMANDS = {
    "pull": ("pydeltamem.cli.pull", "get a model or an adapter by name"),
    "convert": ("pydeltamem.cli.convert", "convert a PyTorch checkpoint of an adapter to GGUF"),
    "convert-base": ("pydeltamem.cli.convert_base", "convert a Hugging Face model to GGUF"),
    "pack": ("pydeltamem.cli.pack", "put base and adapter in one file that loads as one model"),
    "unpack": ("pydeltamem.cli.unpack", "get base and adapter back from a packed model"),
    "quantize": ("pydeltamem.cli.quantize", "write a model in a smaller type"),
    "architectures": (
        "pydeltamem.cli.architectures",
        "list the architectures that take an adapter, with the evidence",
    ),
    "inspect": ("pydeltamem.cli.inspect", "show what an adapter, model or memory file holds"),
    "generate": ("pydeltamem.cli.generate", "continue a prompt"),
    "chat": ("pydeltamem.cli.chat", "talk to a model that remembers"),
    "demo": ("pydeltamem.cli.demo", "tell a model some facts and ask for them later"),
    "memory": ("pydeltamem.cli.memory", "show, compare, copy and export memories"),
    "train": ("pydeltamem.cli.train", "train an adapter for a frozen model"),
    "eval": ("pydeltamem.cli.eval", "measure models with a memory by benchmarks"),
    "serve": ("pydeltamem.cli.serve", "serve OpenAI's API with a memory for each session"),
    "sessions": ("pydeltamem.cli.sessions", "list, export, import and delete what a server remembers"),
    "rpc-server": ("pydeltamem.cli.rpc_server", "run layers for other machines, which name this one with --rpc"),
    "tune": ("pydeltamem.cli.tune", "find the settings by which a model is fastest on this machine"),
    "bench": ("pydeltamem.cli.bench", "time a model with and without its adapter"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, 1 after an error of the package, 130 after Ctrl-C, 141 if the output's reader is
    gone; wrong usage exits with 2, SIGTERM while files are made with 143 (`formats.ending`).
    """
    try:
        _open_missing()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except DeltaMemError as error:
        print(f"deltamem: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        broken = isinstance(error, BrokenPipeError)
        if broken or error.filename is None:  # Python flushes the rest once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if broken:  # the reader of our output is gone: leave quietly, as a program that SIGPIPE ends
            return 141
        print(f"deltamem: error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich, whose status says nothing
            return 141
        raise


def _run(argv: list[str]) -> int:
    if argv[:1] == ["help"]:  # of the program, or of the command that follows
        argv = [*argv[1:], "--help"]
    parser = Parser(
        prog="deltamem",
        description="δ-mem for llama.cpp: language models with a memory that learns from every token.",
        epilog="deltamem help COMMAND says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"deltamem {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module: Any = None  # the subcommand's: argparse requires a command
    for name, (module_name, summary) in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=summary, description=sentence(summary))
        if argv[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)

    args = parser.parse_args(argv)
    with as_on_the_command_line():
        status: int = module.run(args)
    return status


def _open_missing() -> None:
    """Opens the null device for a standard stream that was closed when the process began. The next file would get its
    number, and what C code prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # by processes that we start
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
