"""The options of `deltamem train`, and the configuration of the adapter that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError
from ..formats.checkpoint import HEADS

if TYPE_CHECKING:
    from .reference import DeltaMemConfig

# The paper's write strategies: granularity and state heads.
STRATEGIES = {"tsw": ("token", 1), "ssw": ("message_mean", 1), "msw": ("token", 4)}

# Types of the frozen weights.
DTYPES = ("auto", "float32", "bfloat16")

# The share of the learning rate, by the share of the steps that are done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)) + 0.02,
    "linear": lambda done: 1.02 - done,
    "constant": lambda done: 1.0,
}

# What has no effect without another option.
NEEDED = {
    "teacher_share": "teacher", "init_gain": "init", "gate_mean": "gate_weight", "base": "eval_every",
    "eval_questions": "eval_every",
}  # fmt: skip


def flag(name: str) -> str:
    """The option on the command line of a field."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """The options of one run. Each field is the option of that name (`deltamem train --help`); None: not given.

    Raises InputError, which names the option, if some do not go together.
    """

    model: str  # a GGUF, its name, or a Hugging Face directory
    data: str  # JSON lines
    out: str  # directory of the PyTorch checkpoint

    # the adapter; with --init only strategy, defer and write_bias apply, the rest is as in that PyTorch checkpoint
    strategy: str | None = None
    rank: int | None = None
    heads: int | None = None
    corrections: str | None = None
    layers: Sequence[int] | None = None
    alpha: float | None = None
    write_bias: float | None = None
    update: str | None = None
    defer: bool = False
    heads_gain: float | None = None
    start: str | None = None
    init: str | None = None
    init_gain: float = 1.0

    # the training
    dtype: str = "auto"
    form: str = "auto"
    short_first: float = 0.4
    steps: int = 1000
    batch: int = 16
    micro_batch: int | None = None  # conversations that are computed at once; None: all of a batch
    rate: float = 2e-3
    warm_up: int = 50
    schedule: str = "cosine"
    gate_weight: float | None = None
    gate_mean: float = 0.05
    visible: float = 0.0
    ask_writes: float = 1.0
    rehearse: float = 0.0
    by_turn: float = 1.0
    wording: float = 1.0
    first_told: float = 1.0
    teacher: str | None = None
    teacher_share: float = 1.0
    dropout: float = 0.0
    clip: float = 1.0
    average: float | None = None
    max_tokens: int = 1024
    tail: int = 0
    seed: int = 1
    device: str = "cpu"

    # what is saved and measured during the run
    save_every: int = 100
    eval_every: int | None = None
    eval_questions: int = 100
    base: str | None = None  # the model as GGUF, for eval_every

    def __post_init__(self) -> None:
        if self.teacher_share > 1:
            raise InputError(f"--teacher-share {self.teacher_share}: must be a share of the loss, at most 1")
        for name in ("wording", "first_told") if self.teacher else ():
            if getattr(self, name) != 1:
                raise InputError(f"{flag(name)}: does not go together with --teacher: leave out one of them")
        for name, needed in NEEDED.items():
            value = getattr(self, name)
            if value != getattr(Options, name) and not getattr(self, needed):
                raise InputError(f"{flag(name)} {value}: there is no {flag(needed)}: name it")
        if self.defer and self.strategy == "ssw":
            raise InputError(
                "--defer: a segment of --strategy ssw writes after its message anyway: leave out one of them"
            )
        if self.micro_batch and self.micro_batch > self.batch:
            raise InputError(f"--micro-batch {self.micro_batch}: is more than --batch {self.batch}: lower it")
        if self.micro_batch and self.gate_weight:
            raise InputError("--micro-batch: --gate-weight needs the mean of a whole batch: leave one of them out")
        if not self._corrected or not set(self._corrected) <= set(HEADS):
            raise InputError(f"--corrections '{self.corrections}': must be letters of q, k, v, o")
        if self.init:
            of_checkpoint = ("rank", "heads", "corrections", "layers", "alpha", "update", "heads_gain", "start")
            if given := [name for name in of_checkpoint if getattr(self, name)]:
                raise InputError(f"{flag(given[0])}: with --init the PyTorch checkpoint sets it: leave it out")

    @property
    def _corrected(self) -> tuple[str, ...]:
        return tuple("qo" if self.corrections is None else self.corrections.lower())

    def adapter(self) -> DeltaMemConfig:
        """The configuration of the adapter. Raises InputError if a number of it is out of range."""
        from .reference import DeltaMemConfig  # which loads torch

        granularity, heads = STRATEGIES[self.strategy or "tsw"]
        if self.defer:
            granularity = "token_deferred"
        return DeltaMemConfig(
            rank=self.rank or 8,
            alpha=self.alpha or 16.0,
            num_state_heads=self.heads or heads,
            memory_write_granularity=granularity,
            target_layers=tuple(self.layers or ()),
            delta_heads=self._corrected,
            beta_bias_init=-1.5 if self.write_bias is None else self.write_bias,
            state_update_mode=self.update or "standard",
            output_init=self.start or "zero",
        )
