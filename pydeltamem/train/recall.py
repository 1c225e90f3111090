"""Measures during training what the native runtime recalls: it answers held-out questions whose text is gone."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..convert.adapter import packed_tensors, write_adapter
from ..errors import DeltaMemError, InputError
from ..formats.base_model import Base
from ..formats.checkpoint import Checkpoint
from .conversations import Example
from .reference import DeltaMem

LONGEST = 48  # tokens of an answer at most


class NativeRecall:
    """Asks the GGUF itself about held-out conversations, greedily.

    Args:
        base: the GGUF that the adapter is for.
        examples: conversations as tokens. Of those whose text goes, and whose answers are not the frozen model's, the
            first `n` questions that have an answer are asked.

    Raises InputError if there is nothing to ask.
    """

    def __init__(self, base: str | os.PathLike[str], examples: Sequence[Example], n: int):
        gone = [example for example in examples if not (example.visible or example.keep)]
        asked = [(example, ask) for example in gone for ask in example.asks if ask.answer]
        if not asked:
            raise InputError(
                "--eval-every: the first tenth of the conversations has no answer to a text that is gone: give more"
            )
        self.base, self.asked = os.fspath(base), asked[:n]

    def check(self, memory: DeltaMem) -> None:
        """Raises InputError if an adapter like this one cannot be converted for the base."""
        with tempfile.TemporaryDirectory() as folder:
            memory.save_checkpoint(folder)
            try:
                for _ in packed_tensors(Checkpoint(folder), Base(self.base)):
                    pass
            except DeltaMemError as error:
                reason = str(error).replace(folder, "the adapter")
                raise InputError(f"--eval-every: {self.base} takes no adapter like this: {reason}") from error

    def measure(self, checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
        """Returns questions: how many were asked; right: the share whose answer is the file's, apart from case and
        punctuation; f1: the mean overlap of the words.
        """
        from ..llama import DeltaMemLlama

        right, overlap = 0, 0.0
        with tempfile.TemporaryDirectory() as folder:
            adapter = os.path.join(folder, "adapter.gguf")
            write_adapter(Checkpoint(checkpoint), Base(self.base), adapter, "f32")
            n_ctx = max(len(example.earlier) + len(ask.question) for example, ask in self.asked) + LONGEST + 8
            llm = DeltaMemLlama(
                model_path=self.base, deltamem_path=adapter, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False
            )
            ends = llm._engine.slots.is_end
            try:
                for example, ask in self.asked:
                    llm.reset()
                    llm.memory.reset()
                    by_segment = llm.memory.by_segment
                    llm.eval(example.earlier, example.segments if by_segment else None)
                    llm.reset()
                    llm.eval(ask.question, ask.segments if by_segment else None)
                    given: list[int] = []
                    while len(given) < LONGEST and not ends(token := int(np.argmax(llm.logits))):
                        given.append(token)
                        llm.eval([token])
                    expected = [token for token in ask.answer if not ends(token)]
                    said, told = (
                        _words(llm.detokenize(tokens).decode("utf-8", "replace")) for tokens in (given, expected)
                    )
                    right += said == told
                    overlap += _f1(said, told)
            finally:
                llm.close()
        n = len(self.asked)
        return {"questions": n, "right": right / n, "f1": overlap / n}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(said: Sequence[str], told: Sequence[str]) -> float:
    common = sum(min(said.count(word), told.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(told)) if common else 0.0
