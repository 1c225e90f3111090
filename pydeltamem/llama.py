"""`DeltaMemLlama`: `llama_cpp.Llama` with a memory that learns as it reads."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _lib
from ._lib import Llama
from .errors import AdapterError, InputError, ModelError
from .memory import SEQUENCE, Memory


class DeltaMemLlama(Llama):
    """A llama.cpp model whose attention is corrected by a memory that learns as it reads.

    Everything of `llama_cpp.Llama` works: completion, chat, grammars, streaming, LoRA, embeddings.

        llm = DeltaMemLlama(model_path="base.gguf", deltamem_path="memory.gguf")
        llm.create_completion("...")
        llm.memory.save("conversation.memory")

    Args:
        model_path: the model as GGUF, plain or packed with an adapter.
        deltamem_path: an adapter GGUF for that model. None: a packed model's own adapter; without one there is no
            memory, and `llm.memory` says so when its state is asked for.
        **kwargs: as `llama_cpp.Llama`.

    Raises:
        ModelError: the model file is missing or cannot be loaded.
        AdapterError: the adapter is missing, corrupt or made for another model.

    Memory and text are independent: `reset()` forgets the text and keeps the memory, `memory.reset()` the reverse.

    Each token of a text is written once. `Llama.generate` keeps the common beginning of two prompts in the KV cache and
    may evaluate a token of it again: the same token at the same position only reads then. After going back, tokens that
    differ from those read before write; what the dropped ones wrote stays in the memory.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        deltamem_path: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        model_path = os.fspath(model_path)
        self.deltamem_path = None if deltamem_path is None else os.fspath(deltamem_path)
        self._adapter: _lib.llama_deltamem_adapter_p | None = None
        if not os.path.isfile(model_path):
            raise ModelError(f"{model_path}: no such model file")
        if self.deltamem_path is not None and not os.path.isfile(self.deltamem_path):
            raise AdapterError(f"{self.deltamem_path}: no such adapter file")
        with _lib.errors_held() as log:
            try:
                super().__init__(model_path, **kwargs)
            except (RuntimeError, ValueError) as error:
                self.close()
                if str(error).startswith("Failed to "):
                    raise ModelError(f"{model_path}: the model cannot be loaded{_lib.reason(log)}") from error
                raise
            try:
                # a null pointer, which llama_cpp takes for an adapter and llama.cpp would follow
                if self._lora_adapter is not None and not self._lora_adapter:
                    raise ModelError(f"{self.lora_path}: the LoRA adapter cannot be loaded{_lib.reason(log)}")
                self._load_adapter()
            except (AdapterError, ModelError):
                self.close()
                raise

        # the token evaluated last at each position of the text, and whether it wrote
        self._seen: npt.NDArray[np.intc] = np.zeros(len(self.input_ids), dtype=np.intc)
        self._wrote: npt.NDArray[np.bool_] = np.zeros(len(self.input_ids), dtype=np.bool_)

    def _load_adapter(self) -> None:
        path = self.deltamem_path
        if path is None:
            if "deltamem.version" not in self.metadata:
                return
            path = self.model_path  # packed
        adapter = _lib.llama_deltamem_adapter_load(self.model, os.fsencode(path))
        if not adapter:
            raise AdapterError(_naming(path, _lib.last_error()))
        self._adapter = adapter
        self._stack.callback(_lib.llama_deltamem_adapter_free, adapter)  # before context and model
        if _lib.llama_deltamem_attach(self.ctx, adapter) != 0:
            raise AdapterError(_naming(path, _lib.last_error()))

    @property
    def memory(self) -> Memory:
        """The memory of this conversation."""
        return Memory(self)

    def eval(self, tokens: Sequence[int], segments: Sequence[int] | None = None) -> None:
        """Evaluates tokens after the present text: one ingest, in pieces of n_batch.

        Args:
            tokens: token ids.
            segments: for adapters that write per segment, one id per token: ids do not fall, -1 writes nothing. All
                tokens read the memory as it was before the call; then each segment writes once. None: each token is a
                segment of its own and writes as it is read.

        Tokens that this text has written already, at the same positions, only read, unless `segments` are given: those
        are the caller's word on what writes. With a draft model, whose verification needs all logits of one batch, a
        batch of old and new tokens writes as a whole.

        Raises InputError if the arguments do not fit. If llama.cpp fails, text and memory are as before the call.
        """
        if segments is not None:
            segments = self._checked_segments(tokens, segments)
        if not self.memory.attached or len(tokens) == 0:
            super().eval(tokens)
            return

        n_past, n_tokens = self.n_tokens, len(tokens)
        if n_past + n_tokens > len(self.input_ids):
            raise InputError(
                f"{n_tokens} tokens do not fit after {n_past} in a context of {len(self.input_ids)}: raise n_ctx"
            )
        span = slice(n_past, n_past + n_tokens)
        differs = np.flatnonzero(self._seen[span] != np.asarray(tokens, dtype=np.intc))
        fork = int(differs[0]) if len(differs) else n_tokens  # from here on it is another text
        written = self._wrote[span] & (np.arange(n_tokens) < fork)

        state, write = self.memory.state, self.memory.write
        try:
            if segments is not None:
                self._eval_segments(tokens, segments)
                writes = (segments >= 0) & write
            else:
                self._eval_runs(tokens, written)
                writes = written | write
        except BaseException:
            self.memory.write = write
            _lib.llama_deltamem_abandon_ingest(self.ctx, SEQUENCE)
            self._set_state(state)
            self.n_tokens = n_past
            self._requires_eval = True
            raise
        if fork < n_tokens:
            self._wrote[n_past + fork :] = False
        self._seen[span] = tokens
        self._wrote[span] = writes

    def _eval_runs(self, tokens: Sequence[int], written: npt.NDArray[np.bool_]) -> None:
        """Token writes: runs of written tokens with writes off, the others as the caller set it."""
        if self.draft_model is not None:
            written = np.full(len(written), written.all())
        write = self.memory.write
        start = 0
        for again, run in itertools.groupby(written):
            end = start + len(list(run))
            if write and again:
                self.memory.write = False
            super().eval(tokens[start:end])
            if write and again:
                self.memory.write = True
            start = end

    def _eval_segments(self, tokens: Sequence[int], segments: npt.NDArray[np.int32]) -> None:
        """Segment writes: the ingest ends with the last token of the last piece."""
        for start in range(0, len(tokens), self.n_batch):
            piece = np.ascontiguousarray(segments[start : start + self.n_batch])
            ends = np.zeros(len(piece), dtype=np.int8)
            ends[-1] = start + len(piece) == len(tokens)
            if _lib.llama_deltamem_set_segments(
                self.ctx, piece.ctypes.data_as(_lib.int32_p), ends.ctypes.data_as(_lib.int8_p), len(piece)
            ):
                raise InputError(_lib.last_error())
            super().eval(tokens[start : start + self.n_batch])

    def _checked_segments(self, tokens: Sequence[int], segments: Sequence[int]) -> npt.NDArray[np.int32]:
        if not self.memory.attached:
            raise AdapterError("segments were given but no memory adapter is attached")
        if _lib.llama_deltamem_write_granularity(self._adapter) == _lib.LLAMA_DELTAMEM_TOKEN:
            raise InputError("segments were given but the adapter writes per token: call eval without them")
        if len(segments) != len(tokens):
            raise InputError(f"{len(segments)} segment ids were given for {len(tokens)} tokens")
        ids = np.asarray(segments)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"segment ids must be integers, not {ids.dtype}")
        if ids.size and (ids.min() < -1 or ids.max() > np.iinfo(np.int32).max):
            raise InputError("segment ids must be -1 or from 0 to 2147483647")
        if np.any(np.diff(ids[ids >= 0]) < 0):
            raise InputError("segment ids must not fall from one token to the next")
        return ids.astype(np.int32)

    def reset(self) -> None:
        """Forgets the text and keeps the memory."""
        super().reset()
        self._forget_writes()

    def load_state(self, state: Any) -> None:
        """As `Llama.load_state`: restores text. Its tokens count as written, the memory stays as it is."""
        super().load_state(state)
        self._seen[: self.n_tokens] = self.input_ids[: self.n_tokens]
        self._wrote[: self.n_tokens] = True
        self._wrote[self.n_tokens :] = False

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As `Llama.embed`. Every text reads the memory of the conversation; nothing is written."""
        if not self.memory.attached:
            return super().embed(input, *args, **kwargs)
        n_inputs = 1 if isinstance(input, str) else len(input)
        for seq_id in range(1, min(n_inputs, self.context_params.n_seq_max)):
            _lib.llama_deltamem_state_copy(self.ctx, SEQUENCE, seq_id)
        write = self.memory.write
        _lib.llama_deltamem_set_write(self.ctx, -1, False)
        try:
            return super().embed(input, *args, **kwargs)
        finally:
            _lib.llama_deltamem_set_write(self.ctx, -1, True)
            self.memory.write = write

    def close(self) -> None:
        """Frees adapter, context and model. Closing twice is fine."""
        if hasattr(self, "_stack"):  # not before Llama.__init__ ran
            super().close()
        self._adapter = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "deltamem_path": self.deltamem_path}

    @property
    def _open_ctx(self) -> _lib.llama_context_p:
        ctx = self.ctx
        if ctx is None:
            raise ModelError(f"{self.model_path}: the model is closed")
        return ctx

    def _set_state(self, state: npt.NDArray[np.float32]) -> None:
        _lib.llama_deltamem_state_set(self.ctx, SEQUENCE, state.ctypes.data_as(_lib.float_p), state.size)

    def _forget_writes(self) -> None:
        """No token of the present text counts as written any more."""
        if hasattr(self, "_wrote"):
            self._wrote[:] = False


def _naming(path: str, reason: str) -> str:
    return reason if path in reason else f"{path}: {reason}"
