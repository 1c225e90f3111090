"""Trains an adapter on a frozen model, as the paper does (`deltamem train`).

Each step decodes the earlier turns of conversations with writes on, and drops their text. The model then answers the
last turn from the state and a visible tail alone. The next-token loss of the answer trains the adapter's weights.
Gradients go through the state, over all tokens that wrote it. The result is a PyTorch checkpoint in the published
format, for `deltamem convert`.

    trainer.py        the run                     options.py         its options
    objective.py      its loss                    report.py          its results
    conversations.py  lines of a file as tokens   tokenizer.py       the tokenizer of a GGUF
    reference.py      δ-mem in PyTorch            model.py           the frozen model, of a directory or a GGUF
    packed.py         a step, conversations end to end (kernels.py: what it does between matrix products)
    padded.py         a step by hooks on the model, the reference of packed.py
    heads.py          initial weights             recall.py          what the native runtime recalls during training
"""

from __future__ import annotations

from ..errors import InputError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError:
    raise InputError("deltamem train needs torch and transformers: pip install 'pydeltamem[train]'") from None

from .conversations import Conversations, Example
from .heads import start_from_heads
from .objective import Objective, told_weights
from .options import STRATEGIES, Options
from .packed import PackedBatch, PackedModel
from .padded import Batch, answer_logits
from .report import HeldOut, Report
from .trainer import Trainer

__all__ = [
    "STRATEGIES",
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
