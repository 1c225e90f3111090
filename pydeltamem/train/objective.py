"""The loss of one step: against answers of the file, of a teacher or of the frozen model, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .conversations import Example
from .options import Options
from .packed import PackedBatch, PackedModel
from .padded import Batch, answer_logits
from .reference import DeltaMem

TEACHER_ANSWER = 48  # tokens that a teacher writes at most


class Objective:
    """The loss of an adapter on a frozen model.

    packed: the fast form of a step, if model and adapter have one; None: the padded form runs.

    Raises InputError if an option needs the packed form and there is none.
    """

    def __init__(self, model: Any, tokenizer: Any, memory: DeltaMem, options: Options):
        self.model, self.tokenizer, self.memory, self.options = model, tokenizer, memory, options
        self.packed = self._packed()

    def _packed(self) -> PackedModel | None:
        options = self.options
        reason = PackedModel.refusal(self.model, self.memory)
        if reason is None and options.dropout:
            reason = "--dropout is for the padded form"
        if reason is None and options.form != "padded":
            return PackedModel(self.model, self.memory)
        for option, given in (
            ("--form packed", options.form == "packed"), ("--visible", options.visible), ("--teacher", options.teacher),
            ("--gate-weight", options.gate_weight), ("--ask-writes", options.ask_writes < 1),
            ("--defer without --by-turn 0", self.memory.config.deferred and options.by_turn),
            ("deferred replies", self.memory.config.memory_write_granularity == "reply_deferred"),
        ):  # fmt: skip
            if given:
                raise InputError(f"{option}: needs the packed form of a step: {reason or '--form is padded'}")
        return None

    def backward(self, examples: Sequence[Example]) -> float:
        """Adds the gradient of a batch's loss, --micro-batch conversations at a time, and returns that loss."""
        if self.options.teacher:
            examples = self.answered(examples)
        size, total, loss = self.options.micro_batch or len(examples), self.total(examples), 0.0
        for begin in range(0, len(examples), size):
            part = self.loss(examples[begin : begin + size], total)
            part.backward()
            loss += part.item()
        return loss

    def total(self, examples: Sequence[Example]) -> Tensor:
        """What the sum over the answers' tokens is divided by: their weights. For a teacher all count alike."""
        options = self.options
        wording, first = (1.0, 1.0) if options.teacher else (options.wording, options.first_told)
        return torch.tensor(told_weights(examples, wording, first), device=options.device).sum()

    def loss(self, examples: Sequence[Example], total: Tensor | None = None) -> Tensor:
        """The mean over the answers' tokens, plus the terms that the options add.

        total: of the whole batch if these are a part of it; the losses of all parts add up to the batch's.
        """
        options = self.options
        if not options.teacher:
            logits, targets = self.student(examples)
            each = F.cross_entropy(logits, targets, reduction="none")
            staying = [example for example in examples if example.keep]
            if staying:
                stays = [e.keep for e in examples for ask in e.asks for _ in ask.answer]
                kept = torch.tensor(stays, device=each.device)
                each = each.masked_scatter(kept, self.drift(logits[kept], staying))
            weights = torch.tensor(told_weights(examples, options.wording, options.first_told), device=each.device)
            loss = (each * weights).sum() / (weights.sum() if total is None else total)
        else:
            examples = self.answered(examples)
            logits, targets = self.student(examples)
            taught = self.teacher(examples).log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), taught, reduction="sum", log_target=True)
            if options.teacher_share < 1:
                of_file = F.cross_entropy(logits, targets, reduction="sum")
                loss = options.teacher_share * loss + (1 - options.teacher_share) * of_file
            loss = loss / (len(targets) if total is None else total)
        if options.gate_weight and self.packed:
            means = torch.stack(self.packed.gate_means)
            loss = loss + options.gate_weight * (means - options.gate_mean).pow(2).mean()
        return loss

    def student(self, examples: Sequence[Example], empty: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [K, vocab], float32, that predict the answers' tokens, and these tokens [K]. empty: no earlier turn
        writes.
        """
        if self.packed:
            packed = PackedBatch.of(
                examples, self.options.device, granularity=self.memory.config.memory_write_granularity
            )
            for begin, end in packed.told if empty else ():
                packed.writes[begin:end] = False
            return self.packed.logits(packed).float(), packed.targets
        if any(example.visible for example in examples):
            raise InputError('"visible": true: needs the packed form of a step')
        batch = Batch.of(examples, self.options.device)
        if empty:
            batch = replace(batch, segments=torch.full_like(batch.segments, -1), again=torch.full_like(batch.again, -1))
        return answer_logits(self.model, self.memory, batch)[batch.answer_mask].float(), batch.answer[batch.answer_mask]

    def drift(self, logits: Tensor, examples: Sequence[Example]) -> Tensor:
        """Kullback-Leibler divergence [K] of each answer token's distribution from the frozen model's, which sees what
        stays visible. logits: [K, vocab], of these examples.
        """
        if not self.packed:
            raise InputError('"keep": true: needs the packed form of a step')
        seen = [
            # text that is gone does not matter to the frozen model, and is not decoded
            e
            if e.visible
            else replace(e, earlier=[], segments=[], continued=[ask.question for ask in e.asks], visible=True)
            for e in examples
        ]
        with torch.no_grad():
            frozen = self.packed.logits(PackedBatch.of(seen, self.options.device), memory=False).float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), frozen, reduction="none", log_target=True).sum(-1)

    @torch.no_grad()
    def teacher(self, examples: Sequence[Example]) -> Tensor:
        """Logits [K, vocab] of the frozen model with the text before it. For the packed form."""
        assert self.packed is not None  # `_packed` refuses --teacher otherwise
        batch = PackedBatch.of(examples, self.options.device, memory=False)
        return self.packed.logits(batch, memory=False).float()

    @torch.no_grad()
    def answered(self, examples: Sequence[Example]) -> list[Example]:
        """The examples, with the teacher's greedy answers where the file has none."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends, self.tokenizer.eos_token_id])
        ends |= getattr(self.tokenizer, "ends", frozenset())
        answered = []
        for example in examples:
            asks = list(example.asks)
            for i, ask in enumerate(asks):
                if ask.answer:
                    continue
                given: list[int] = []
                while len(given) < TEACHER_ANSWER and not (given and given[-1] in ends):
                    # one more token, whose own logits are not needed
                    so_far = ask._replace(answer=[*given, 0])
                    alone = replace(example, asks=[so_far], continued=[example.continued[i]])
                    given.append(int(self.teacher([alone])[-1].argmax()))
                asks[i] = ask._replace(answer=given)
            answered.append(replace(example, asks=asks))
        return answered


def told_weights(examples: Sequence[Example], wording: float, first: float = 1.0) -> list[float]:
    """Weights of the answers' tokens in the loss, example by example: 1 for tokens that only the memory can know (they
    are in the earlier turns and not in the question), `first` for those that follow no such token; `wording` for the
    others, and for answers that stay the frozen model's.
    """
    weights = []
    for example in examples:
        told = set() if example.keep else set(example.earlier)
        for ask in example.asks:
            known = told.difference(ask.question)
            after = False
            for token in ask.answer:
                weights.append(wording if token not in known else 1.0 if after else first)
                after = token in known
    return weights
