"""Trains an adapter on a frozen model, as the paper does (`deltamem train`).

Each step decodes the earlier turns of conversations with writes on, and drops their text. The model then answers the
last turn from the state and a visible tail alone. The next-token loss of the answer trains the adapter's weights.
Gradients go through the state, over all tokens that wrote it. The result is a PyTorch checkpoint in the published
format, for `deltamem convert`.

    trainer        the run; options: its options; report: its results
    objective      the loss of a step
    packed         a step, conversations end to end; kernels: what it does between matrix products
    padded         a step by hooks on the model, the reference of packed
    lines          lines of a training file; conversations: the same as tokens
    model          the frozen model, of a directory or a GGUF; tokenizer: that of a GGUF
    reference      δ-mem on a decoder; recurrence: its states and reads; attention: where the projections are
    heads          initial weights
    average        the moving average of the weights
    recall         what the native runtime recalls during training

The names below load torch and transformers when they are first used: that takes seconds, and the options need neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .options import STRATEGIES, Options

if TYPE_CHECKING:
    from .conversations import Ask, Conversations, Example
    from .heads import start_from_heads
    from .objective import Objective, told_weights
    from .packed import PackedBatch, PackedModel
    from .padded import Batch, answer_logits
    from .report import HeldOut, Report
    from .trainer import Trainer

__all__ = [
    "STRATEGIES",
    "Ask",
    "Batch",
    "Conversations",
    "Example",
    "HeldOut",
    "Objective",
    "Options",
    "PackedBatch",
    "PackedModel",
    "Report",
    "Trainer",
    "answer_logits",
    "start_from_heads",
    "told_weights",
]

_LAZY = {
    "Ask": ".conversations",
    "Batch": ".padded",
    "Conversations": ".conversations",
    "Example": ".conversations",
    "HeldOut": ".report",
    "Objective": ".objective",
    "PackedBatch": ".packed",
    "PackedModel": ".packed",
    "Report": ".report",
    "Trainer": ".trainer",
    "answer_logits": ".padded",
    "start_from_heads": ".heads",
    "told_weights": ".objective",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        raise InputError("deltamem train needs torch and transformers: pip install 'pydeltamem[train]'") from None
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
