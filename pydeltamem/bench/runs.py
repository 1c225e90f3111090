"""Timed runs over llama.cpp's C API: prompts and single tokens in one context.

worker.py does the same over another llama library, so nothing here needs δ-mem without an adapter and `unpack`. Ctrl-C
waits for the end of what llama.cpp does: it would be lost in a callback for its log or its nodes.
"""

from __future__ import annotations

import ctypes
import os
import random
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from ..errors import AdapterError, DecodeError, ModelError, naming
from ..runtime.interrupt import uninterrupted


@dataclass(frozen=True)
class Options:
    """Parameters of model and context; names and meanings as in llama.h."""

    model: str
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_gpu_layers: int
    flash_attn: bool
    type_k: str
    type_v: str
    use_mmap: bool = True
    n_threads_batch: int | None = None  # for prompts; None: n_threads
    repack: bool = True
    unpack: str = "none"  # which weights prompts multiply in BF16 (runtime/unpacking.py); others need our library


class Model:
    """A loaded model. `llama` is the bindings' module llama_cpp. Raises ModelError; llama.cpp's log has the reason."""

    def __init__(self, llama: Any, options: Options) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        params.use_extra_bufts = options.repack
        if options.unpack != "none":
            from ..runtime.unpacking import overrides

            self._overrides = overrides(options.model, options.unpack)
            if self._overrides is not None:
                params.tensor_buft_overrides = ctypes.addressof(self._overrides)
        if not options.use_mmap:
            params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.llama, self.options = llama, options
        with uninterrupted():
            self.pointer = llama.llama_model_load_from_file(os.fsencode(options.model), params)
        if not self.pointer:
            raise ModelError(f"{options.model}: the model cannot be loaded")
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.pointer))

    def describe(self) -> dict[str, Any]:
        """The model, and what the library says of this system."""
        buf = ctypes.create_string_buffer(256)
        self.llama.llama_model_desc(self.pointer, buf, len(buf))
        return {
            "model_info": {
                "description": buf.value.decode("utf-8", errors="replace"),
                "n_params": self.llama.llama_model_n_params(self.pointer),
                "n_bytes": self.llama.llama_model_size(self.pointer),
            },
            "system": self.llama.llama_print_system_info().decode(),
        }

    def close(self) -> None:
        if self.pointer:
            self.llama.llama_model_free(self.pointer)
            self.pointer = None


class Runner:
    """One context of a model, with the adapter at the path `adapter` or without any.

    observer: called with every node of its graphs (ggml_backend_sched_eval_callback), see nodes.py.
    options: of the context; None: the model's.

    Raises ModelError if the context cannot be made or a run fails, AdapterError if the adapter cannot be attached.
    """

    def __init__(
        self, model: Model, adapter: str | None = None, observer: Any = None, options: Options | None = None
    ) -> None:
        self.llama, self.model, self.adapter, self.observer = model.llama, model, adapter, observer
        self.options = options or model.options
        self._batches: dict[int, list[Any]] = {}
        self._open()  # first: it refuses a context that is too large
        self._tokens: Any = (ctypes.c_int32 * self.options.n_ctx)()
        choice = random.Random(0)
        for i in range(self.options.n_ctx):
            self._tokens[i] = choice.randrange(model.n_vocab)

    @uninterrupted()
    def _open(self) -> None:
        llama, options = self.llama, self.options
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, options.n_ubatch
        params.n_threads, params.n_threads_batch = options.n_threads, options.n_threads_batch or options.n_threads
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if options.flash_attn else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = getattr(llama, f"GGML_TYPE_{options.type_k.upper()}")
        params.type_v = getattr(llama, f"GGML_TYPE_{options.type_v.upper()}")
        params.n_seq_max, params.no_perf = 1, True
        if self.observer is not None:
            params.cb_eval = self.observer
        self._lib: Any = None
        self.ctx = llama.llama_init_from_model(self.model.pointer, params)
        if not self.ctx:
            raise ModelError(f"{options.model}: no context of {options.n_ctx} tokens can be made")
        self._memory = llama.llama_get_memory(self.ctx)
        self.n_bytes = {"weights": 0, "states": 0}
        if self.adapter is not None:
            try:
                self._attach(self.adapter)
            except AdapterError:
                self.close()
                raise

    def _attach(self, path: str) -> None:
        from ..runtime import library

        adapter = library.llama_deltamem_adapter_load(self.model.pointer, os.fsencode(path))
        if not adapter:
            raise AdapterError(naming(path, library.last_error()))
        try:
            if library.llama_deltamem_attach(self.ctx, adapter) != 0:
                raise AdapterError(naming(path, library.last_error()))
            self._lib = library
            self.n_bytes = {
                "weights": library.llama_deltamem_n_bytes(adapter),
                "states": library.llama_deltamem_state_n_bytes(self.ctx),
            }
        finally:
            library.llama_deltamem_adapter_free(adapter)  # the context keeps what it needs

    @property
    def n_graphs(self) -> int:
        """Graphs with the adapter built so far; 0 without an adapter."""
        return self._lib.llama_deltamem_n_graphs(self.ctx) if self._lib else 0

    def prompt(self, n_tokens: int) -> tuple[int, int]:
        """Decodes a prompt of n_tokens into an empty KV cache. Returns (nanoseconds, graphs built meanwhile)."""
        llama = self.llama
        batches = self._in_batches(n_tokens)
        llama.llama_memory_clear(self._memory, False)
        llama.llama_synchronize(self.ctx)
        return self._timed(batches, False)

    def decode(self, depth: int, n_tokens: int) -> tuple[int, int]:
        """Generates n_tokens, one llama_decode each, after a text of `depth` tokens. Returns as prompt().

        Decodes that text first if the KV cache does not hold it. One untimed token goes before the others: it wakes the
        threads and builds the graph that the others reuse.
        """
        if self.n_tokens < depth:
            self.prompt(depth)
        token = self._in_batches(1)
        self._cut(depth)
        self._timed(token, True)
        self._cut(depth)
        return self._timed(token * n_tokens, True)

    @uninterrupted()
    def _timed(self, batches: list[Any], wait_for_each: bool) -> tuple[int, int]:
        decode, synchronize, ctx = self.llama.llama_decode, self.llama.llama_synchronize, self.ctx
        n_graphs = self.n_graphs
        status = 0
        start = perf_counter_ns()
        for batch in batches:
            status |= decode(ctx, batch)
            if wait_for_each:
                synchronize(ctx)
        synchronize(ctx)
        elapsed = perf_counter_ns() - start
        if status != 0:
            raise DecodeError(f"{self.options.model}: llama_decode failed with status {status}")
        return elapsed, self.n_graphs - n_graphs

    def _in_batches(self, n_tokens: int) -> list[Any]:
        """Batches of at most n_batch over the same random tokens; logits of a batch's last token only."""
        if n_tokens not in self._batches:
            size = ctypes.sizeof(ctypes.c_int32)
            pieces = range(0, n_tokens, self.options.n_batch)
            self._batches[n_tokens] = [
                self.llama.llama_batch_get_one(
                    ctypes.cast(ctypes.byref(self._tokens, start * size), ctypes.POINTER(ctypes.c_int32)),
                    min(self.options.n_batch, n_tokens - start),
                )
                for start in pieces
            ]
        return self._batches[n_tokens]

    @property
    def n_tokens(self) -> int:
        """Tokens in the KV cache."""
        return self.llama.llama_memory_seq_pos_max(self._memory, 0) + 1

    def _cut(self, length: int) -> None:
        if not self.llama.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise ModelError(f"{self.options.model}: its KV cache cannot be shortened, so decode cannot be timed")

    def renew(self) -> None:
        """Makes a new context like this one, with its buffers elsewhere in memory."""
        self.close()
        self._open()

    def close(self) -> None:
        if self.ctx:
            self.llama.llama_free(self.ctx)
            self.ctx = None
