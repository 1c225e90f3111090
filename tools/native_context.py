"""Batches of several sequences over the C API, which `llama_cpp.Llama` does not offer; tests call it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from pydeltamem.runtime import library

llama = library.llama_cpp


class NativeContext:
    """A model with n_seq sequences and, if an adapter is given, as many memories. F32 KV cache, no flash attention."""

    def __init__(self, model, ctx, n_vocab, adapter):
        self.model, self.ctx, self.n_vocab, self.adapter = model, ctx, n_vocab, adapter
        self.n_past: dict[int, int] = {}

    def decode(
        self,
        tokens: Sequence[tuple[int, int]],
        segments: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
    ) -> np.ndarray:
        """One llama_decode of (token, sequence) pairs after each sequence's text; logits [len(tokens), n_vocab]."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, (token, seq) in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self.n_past.get(seq, 0)
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = seq
                batch.logits[i] = 1
                self.n_past[seq] = batch.pos[i] + 1
            if segments is not None:
                ids = np.asarray(segments, dtype=np.int32)
                flags = None if ends is None else np.asarray(ends, dtype=np.int8)
                status = library.llama_deltamem_set_segments(
                    self.ctx,
                    ids.ctypes.data_as(library.int32_p),
                    None if flags is None else flags.ctypes.data_as(library.int8_p),
                    len(ids),
                )
                assert status == 0, library.last_error()
            status = llama.llama_decode(self.ctx, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode: {status}: {library.last_error()}")
            rows = [
                np.ctypeslib.as_array(llama.llama_get_logits_ith(self.ctx, i), (self.n_vocab,))
                for i in range(len(tokens))
            ]
            return np.stack(rows)  # a copy: the next decode overwrites them
        finally:
            llama.llama_batch_free(batch)

    def state(self, seq: int) -> np.ndarray:
        """The sequence's state [L, H, r, r]."""
        n_layer, n_head, rank = (
            library.llama_deltamem_n_layer(self.adapter),
            library.llama_deltamem_n_head(self.adapter),
            library.llama_deltamem_rank(self.adapter),
        )
        state = np.empty((n_layer, n_head, rank, rank), dtype=np.float32)
        status = library.llama_deltamem_state_get(self.ctx, seq, state.ctypes.data_as(library.float_p), state.size)
        assert status == 0, library.last_error()
        return state

    def forget_text(self, seq: int) -> None:
        llama.llama_memory_seq_rm(llama.llama_get_memory(self.ctx), seq, 0, -1)
        self.n_past[seq] = 0


@contextlib.contextmanager
def open_context(
    base,
    adapter=None,
    *,
    n_seq=1,
    n_ctx=1024,
    n_batch=512,
    n_ubatch=512,
    n_threads=1,
    unified=True,
    n_gpu_layers=0,
    eval_callback=None,
) -> Iterator[NativeContext]:
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = n_gpu_layers
    model = llama.llama_model_load_from_file(str(base).encode(), model_params)
    assert model
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, n_ubatch, n_seq
    params.n_threads = params.n_threads_batch = n_threads
    params.kv_unified = unified
    params.type_k = params.type_v = 0  # F32
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if eval_callback is not None:
        params.cb_eval = eval_callback
    ctx = llama.llama_init_from_model(model, params)
    assert ctx
    handle = None
    try:
        if adapter is not None:
            handle = library.llama_deltamem_adapter_load(model, str(adapter).encode())
            assert handle, library.last_error()
            assert library.llama_deltamem_attach(ctx, handle) == 0, library.last_error()
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        yield NativeContext(model, ctx, n_vocab, handle)
    finally:
        llama.llama_free(ctx)
        if handle:
            library.llama_deltamem_adapter_free(handle)
        llama.llama_model_free(model)
