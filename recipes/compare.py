"""Compares PyTorch with the native runtime on the same questions: their answers in F32, and the cost of quantising.

    python recipes/compare.py build/default -n 50
    python recipes/compare.py --model smollm2 --base f32.gguf --shipped smollm2 --memory CHECKPOINT ADAPTER.gguf

The first form needs what `make default-model` leaves in build/default. In the second, --model is the one that the
adapter was trained on, a directory or a GGUF, and --base the same in F32. Exits with 1 if an F32 answer differs, or if
the recall of the shipped files is more than 2 points away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from llama_cpp import llama_vocab_is_eog
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pydeltamem.evals.case import Case
from pydeltamem.evals.reader import MAX_ANSWER, Asked, NativeReader
from pydeltamem.evals.recall import make_cases
from pydeltamem.formats.checkpoint import Checkpoint
from pydeltamem.hub import model_path
from pydeltamem.models import default_files
from pydeltamem.train.model import load_frozen
from pydeltamem.train.reference import DeltaMem


class TorchReader:
    """Answers in PyTorch as evals/reader.py does, from the same tokens."""

    def __init__(self, model: Path, checkpoint: Path, native: NativeReader):
        self.model, _ = load_frozen(model, "float32")
        self.memory = DeltaMem.from_checkpoint(self.model, checkpoint)
        self.native = native
        self.cache = None

    def answer(self, case: Case, writes: bool) -> str:
        """Answers after the conversation's text is gone. writes: whether question and answer write the memory."""
        self.memory.reset()
        self.memory.write = True
        self._run(*self.native.tokens(case.turns))
        self.cache, self.memory.write = None, writes
        asked = self.native.prompt([], case.question)
        logits = self._run(asked, [0] * len(asked))
        given: list[int] = []
        while len(given) < MAX_ANSWER:
            token = int(logits.argmax())
            if llama_vocab_is_eog(self.native.llm._model.vocab, token):
                break
            given.append(token)
            logits = self._run([token], [0])
        self.cache = None
        return self.native.llm.detokenize(given).decode("utf-8", errors="replace").strip()

    @torch.no_grad()
    def _run(self, ids: list[int], segments: list[int]) -> torch.Tensor:
        with self.memory.segments(segments):
            done = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True)
        self.cache = done.past_key_values
        return done.logits[0, -1]


def native_answers(reader: NativeReader, adapter: Path, cases: Sequence[Case]) -> list[str]:
    reader.attach(adapter)
    asked = [Asked(reader.read(case.turns), (), (case.question,)) for case in cases]
    return [answer for (answer,) in reader.answer(asked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?")
    for option in ("--model", "--base", "--shipped"):
        parser.add_argument(option, type=lambda name: Path(model_path(name)), metavar="MODEL")
    parser.add_argument("--memory", type=Path, nargs=2, action="append", metavar=("CHECKPOINT", "ADAPTER"))
    parser.add_argument("-n", type=int, default=50)
    args = parser.parse_args()
    if args.directory:
        model, base = args.directory / "hf", args.directory / "base.gguf"
        shipped, adapters = default_files()
        memories = [(args.directory / name, adapter) for name, adapter in adapters.items()]
    elif args.model and args.base and args.shipped and args.memory:
        model, base, shipped, memories = args.model, args.base, args.shipped, args.memory
    else:
        parser.error("name a directory, or --model, --base, --shipped and --memory")
    good = True
    table = Table("memory", "questions", "F32 answers that differ", "PyTorch right", "shipped right", box=None)
    for checkpoint, adapter in memories:
        with tempfile.TemporaryDirectory() as folder:
            f32 = Path(folder, "f32.gguf")
            command = [sys.executable, "-m", "pydeltamem.cli", "convert", checkpoint, "--base", base, "-o", f32]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            # a reply of the native runtime is one segment, whose write ends with it
            writes = Checkpoint(checkpoint).config.memory_write_granularity == "token"
            native = NativeReader(base, f32, answer_writes=writes)
            cases = list(make_cases(["recall", "overwrite"], args.n, [1, 4, 8], [], 1, native))
            in_torch = TorchReader(model, checkpoint, native)
            console = Console(stderr=True)
            said = [
                in_torch.answer(case, writes) for case in track(cases, adapter.name, console=console, transient=True)
            ]
            in_f32 = native_answers(native, f32, cases)
            native.close()
            reader = NativeReader(shipped, answer_writes=writes)
            by_shipped = native_answers(reader, adapter, cases)
            reader.close()
        differ = sum(a != b for a, b in zip(said, in_f32))
        right = [sum(map(Case.is_right, cases, given)) / len(cases) * 100 for given in (said, by_shipped)]
        good &= differ == 0 and abs(right[0] - right[1]) <= 2
        table.add_row(adapter.stem, str(len(cases)), str(differ), *(f"{share:.1f} %" for share in right))
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
