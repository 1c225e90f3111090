"""Names in error sentences: of an option, in Python or on the command line, and of what was probably meant."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

# keywords of `DeltaMemLlama` and of a turn, with their names on the command line
_OPTIONS = {
    "model_path": "--model",
    "deltamem_path": "--deltamem",
    "lora_path": "--lora",
    "rpc_servers": "--rpc",
    "n_gpu_layers": "--gpu-layers",
    "n_ctx": "--ctx-size",
    "n_batch": "--batch-size",
    "n_ubatch": "--ubatch-size",
    "n_seq_max": "--parallel",
    "n_threads": "--threads",
    "n_threads_batch": "--threads-batch",
    "unpack": "--unpack",
    "grammar": "--grammar",
}
_on_the_command_line = False


def option(keyword: str) -> str:
    """A keyword under the name that the reader of the error knows: in Python, or on the command line, if it has one."""
    return _OPTIONS.get(keyword, keyword) if _on_the_command_line else keyword


@contextlib.contextmanager
def as_on_the_command_line() -> Iterator[None]:
    """Makes `option` give the names of the command line."""
    global _on_the_command_line
    before, _on_the_command_line = _on_the_command_line, True
    try:
        yield
    finally:
        _on_the_command_line = before


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as text to end a sentence with; empty if none is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {found[0]}?" if found else ""
