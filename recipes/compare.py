"""PyTorch and the native runtime on the same questions: the texts of their answers in F32, and what quantising costs.

    python recipes/compare.py build/default -n 50

Needs what `make default-model` leaves in build/default. Exits with 1 if an F32 answer differs, or if the recall of the
shipped files is more than 2 points away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from pydeltamem.evals.reader import MAX_ANSWER, NativeReader
from pydeltamem.evals.recall import make_cases
from pydeltamem.evals.world import Turn
from pydeltamem.models import default_files
from pydeltamem.train.reference import DeltaMem


class TorchReader:
    """The reader of evals/reader.py in PyTorch."""

    def __init__(self, model: Path, checkpoint: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.memory = DeltaMem.from_checkpoint(self.model, checkpoint)
        self.cache = None

    def n_tokens(self, turns: list[Turn]) -> int:
        return sum(len(self._message(role, text)) for turn in turns for role, text in zip(("user", "assistant"), turn))

    def begin(self, write: bool) -> None:
        self.cache = None
        self.memory.reset()
        self.memory.write = write

    def read(self, turns: list[Turn]) -> None:
        messages = [self._message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn)]
        with self.memory.segments([i for i, message in enumerate(messages) for _ in message]):
            self._run([token for message in messages for token in message])

    def forget_text(self) -> None:
        self.cache = None

    def answer(self, question: str) -> str:
        asked = [*self._message("user", question), self.tokenizer.convert_tokens_to_ids("<|assistant|>")]
        with self.memory.segments([0] * len(asked)):
            logits = self._run(asked)
        given: list[int] = []
        while len(given) < MAX_ANSWER:
            token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                break
            given.append(token)
            logits = self._run([token])
        return self.tokenizer.decode(given).strip()

    @torch.no_grad()
    def _run(self, ids: list[int]) -> torch.Tensor:
        done = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True)
        self.cache = done.past_key_values
        return done.logits[0, -1]

    def _message(self, role: str, text: str) -> list[int]:
        return self.tokenizer(f"<|{role}|>{text}<|end|>", add_special_tokens=False)["input_ids"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("-n", type=int, default=50)
    args = parser.parse_args()
    shipped, adapters = default_files()
    good = True
    table = Table("memory", "questions", "F32 answers that differ", "PyTorch right", "shipped right", box=None)
    for name, adapter in adapters.items():
        f32 = args.directory / f"{name}-f32.gguf"
        base = args.directory / "base.gguf"
        command = [
            sys.executable,
            "-m",
            "pydeltamem.cli.main",
            "convert",
            args.directory / name,
            "--base",
            base,
            "-o",
            f32,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        readers = {
            "torch": TorchReader(args.directory / "hf", args.directory / name),
            "native": NativeReader(base, f32),
            "shipped": NativeReader(shipped, adapter),
        }
        cases = list(make_cases(["recall", "overwrite"], args.n, [1, 4, 8], [], 1, readers["native"]))
        differ, right = 0, {"torch": 0, "native": 0, "shipped": 0}
        for case in track(cases, description=name, console=Console(stderr=True), transient=True):
            answers = {}
            for kind, reader in readers.items():
                reader.begin(write=True)
                reader.read(list(case.turns))
                reader.forget_text()
                answers[kind] = reader.answer(case.question)
                right[kind] += case.is_right(answers[kind])
            differ += answers["torch"] != answers["native"]
        shares = [100 * right[kind] / len(cases) for kind in ("torch", "shipped")]
        good &= differ == 0 and abs(shares[0] - shares[1]) <= 2
        table.add_row(name, str(len(cases)), str(differ), f"{shares[0]:.1f} %", f"{shares[1]:.1f} %")
    Console().print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
