"""The results of a training run: loss and right answers on held-out conversations, and a plot of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from ..formats import kinds
from ..formats.outputs import writing
from .conversations import Example
from .objective import Objective


@dataclass(frozen=True)
class HeldOut:
    """Results on held-out conversations."""

    n: int
    loss: float  # mean over the answers' tokens
    loss_without: float  # the same with an empty memory
    right: float  # share of the answers whose every token is the most likely one
    right_without: float


@dataclass(frozen=True)
class Report:
    """The results of a training run."""

    out: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    held_out: HeldOut
    curve: list[tuple[int, float]] = field(default_factory=list)  # steps and the loss


@torch.no_grad()
def measure(objective: Objective, examples: Sequence[Example]) -> HeldOut:
    """Measures an adapter on conversations, as many at a time as a step computes; not on answers that stay, of which
    none is right.
    """
    options = objective.options
    if not options.teacher:  # it answers them too
        examples = [example for example in examples if not example.keep]
    objective.memory.eval()
    size = options.micro_batch or options.batch
    losses, right, n_tokens, n_answers = [0.0, 0.0], [0, 0], 0, 0
    for begin in range(0, len(examples), size):
        rows: Sequence[Example] = examples[begin : begin + size]
        if options.teacher:
            rows = objective.answered(rows)
        lengths = [len(ask.answer) for row in rows for ask in row.asks]
        n_tokens, n_answers = n_tokens + sum(lengths), n_answers + len(lengths)
        for i in range(2):
            logits, targets = objective.student(rows, empty=bool(i))
            losses[i] += F.cross_entropy(logits, targets, reduction="sum").item()
            right[i] += sum(bool(hit.all()) for hit in (logits.argmax(-1) == targets).split(lengths))
    return HeldOut(
        len(examples), *(loss / max(n_tokens, 1) for loss in losses), *(hits / max(n_answers, 1) for hits in right)
    )


def plot(curve: Sequence[tuple[int, float]], path: Path) -> None:
    """Writes the curve of the loss as PNG. Raises OutputError; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss of the answers")
    if curve:
        axes.plot(*zip(*curve))
    axes.grid(alpha=0.3)
    with writing(path, kinds.PNG) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
