"""What the runtime needs of a model. `DeltaMemLlama` provides it; the runtime knows nothing else of that class."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .engine import Engine
from .history import Position
from .text import Text


class Model(Protocol):
    """A `llama_cpp.Llama` with a text of its own and an engine that decodes."""

    _engine: Engine
    _text: Text
    _ctx: Any  # llama_cpp's wrappers
    _model: Any
    _seed: int
    _candidates: Any
    _chat_handlers: dict[str, Any]
    _logits_all: bool
    _messages: list[Any] | None
    _n_before: int
    _n_vocab: int
    _sampler: Any
    cache: Any
    chat_format: str | None
    chat_handler: Any
    draft_model: Any
    finish_reason: str | None
    last_n_tokens_size: int
    metadata: dict[str, str]
    model_path: str
    n_batch: int
    scores: npt.NDArray[np.single]
    spm_infill: bool
    tokenizer_: Any
    verbose: bool

    @property
    def ctx(self) -> Any: ...
    @property
    def context_params(self) -> Any: ...
    @property
    def input_ids(self) -> npt.NDArray[np.intc]: ...
    @property
    def model(self) -> Any: ...
    def n_ctx(self) -> int: ...
    def n_vocab(self) -> int: ...
    def pooling_type(self) -> Any: ...
    def token_bos(self) -> int: ...
    def token_eos(self) -> int: ...
    def set_seed(self, seed: int) -> None: ...
    def tokenize(self, *args: Any, **kwargs: Any) -> list[int]: ...
    def detokenize(self, *args: Any, **kwargs: Any) -> bytes: ...
    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]: ...
    def save_state(self) -> Any: ...
    def load_state(self, state: Any) -> None: ...
    def _begins_another_chat(self) -> bool: ...
    def _eval(self, tokens: Sequence[int], undo: Position | None = None, **options: Any) -> Position | None: ...
    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any: ...
    def _checked_tokens(self, tokens: Sequence[int]) -> npt.NDArray[np.integer]: ...
