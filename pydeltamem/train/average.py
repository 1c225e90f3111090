"""The moving average of an adapter's weights over the steps of a run (`--average`), which is what the run saves and
measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """average ← D average + (1 − D) weights after each step; D grows from 0 towards `decay`, so that the first weights
    do not stay for long.

    parameters: what is averaged.
    decay: D in [0, 1); None: there is no average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None):
        self.parameters, self.decay = parameters, decay or 0.0
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the step of that number, from 1 on."""
        if self.values:
            decay = min(self.decay, (step - 1) / (step + 9))
            get_ema_multi_avg_fn(decay)(self.values, [p.detach() for p in self.parameters], step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters have the average's values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, values: Sequence[torch.Tensor]) -> None:
        """Goes on from the values that a run has saved."""
        for mine, saved in zip(self.values, values, strict=True):
            mine.copy_(saved)

    def _swap(self) -> None:
        for i, value in enumerate(self.values):
            self.values[i], self.parameters[i].data = self.parameters[i].data, value
