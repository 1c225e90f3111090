"""Conversations side by side, by hooks on the model: the reference of packed.py, for every model that it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .conversations import Example
from .reference import DeltaMem


@dataclass
class Batch:
    """Examples side by side. Earlier turns and answers are padded at the end, questions at the beginning. Padding
    writes nothing.
    """

    earlier: Tensor  # [B, T]
    segments: Tensor  # [B, T], -1: padding
    again: Tensor  # [B, T], the segments of the texts that are rehearsed, -1: not
    owner: Tensor  # [A]: the example that each question belongs to
    question: Tensor  # [A, Q]
    question_segments: Tensor  # [A, Q], -1: padding
    answer: Tensor  # [A, N]
    answer_mask: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], device: str) -> Batch:
        asks = [(i, ask) for i, example in enumerate(examples) for ask in example.asks]

        def fill(rows: Sequence[list[int]], value: int, left: bool = False) -> Tensor:
            longest = max(map(len, rows))
            space = [[value] * (longest - len(row)) for row in rows]
            return torch.tensor([s + r if left else r + s for r, s in zip(rows, space)], device=device)

        answers = [ask.answer for _, ask in asks]
        return cls(
            fill([example.earlier for example in examples], 0),
            fill([example.segments for example in examples], -1),
            fill([[s if example.rehearsed else -1 for s in example.segments] for example in examples], -1),
            torch.tensor([i for i, _ in asks], device=device),
            fill([ask.question for _, ask in asks], 0, left=True),
            fill([ask.segments for _, ask in asks], -1, left=True),
            fill(answers, 0),
            fill([[1] * len(row) for row in answers], 0).bool(),
        )


def answer_logits(model: Any, memory: DeltaMem, batch: Batch) -> Tensor:
    """Logits of each token of the answers, [A, N, vocab], with the earlier turns in the memory only."""
    memory.reset()
    for segments in (batch.segments, batch.again):
        if segments is batch.segments or (segments >= 0).any():
            with memory.segments(segments):
                model(batch.earlier, use_cache=False, logits_to_keep=1)
    # if nothing was written there is one state for all
    memory.state = memory.state.expand(-1, len(batch.earlier), *memory.state.shape[2:])[:, batch.owner]

    # the question is one ingest, and each token of the answer another; what padding writes is not used
    mask = batch.question_segments >= 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with memory.segments(batch.question_segments):
        asked = model(
            batch.question, attention_mask=mask.long(), position_ids=positions, use_cache=True, logits_to_keep=1
        )
    whole = torch.cat([mask, batch.answer_mask], 1)[:, :-1]
    n_read = batch.answer.shape[1] - 1
    if n_read == 0:
        return asked.logits[:, -1:]
    behind = positions[:, -1:] + 1 + torch.arange(n_read, device=positions.device)
    answered = model(
        batch.answer[:, :-1],
        attention_mask=whole.long(),
        position_ids=behind,
        past_key_values=asked.past_key_values,
    )
    return torch.cat([asked.logits[:, -1:], answered.logits], 1)
