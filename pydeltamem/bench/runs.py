"""Timed runs over llama.cpp's C API, for `deltamem bench`: in this process, or in a worker process.

A process holds one llama library, and a worker's may be another than ours: this module must not need δ-mem unless an
adapter is given. `python -m pydeltamem.bench.runs` is the worker; LLAMA_CPP_LIB_PATH names its library.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from ..errors import AdapterError, DecodeError, DeltaMemError, LibraryError, ModelError


@dataclass(frozen=True)
class Options:
    """What model and context are made with; names and meanings as in llama.h."""

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


class Model:
    """A loaded model. `llama` is the bindings' module llama_cpp. Raises ModelError; llama.cpp's log has the reason."""

    def __init__(self, llama: Any, options: Options) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = options.n_gpu_layers
        if not options.use_mmap:
            params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.llama, self.options = llama, options
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


class Session:
    """One context of a model, with the memory adapter at the path `adapter` or without any.

    observer: called with every node of its graphs (ggml_backend_sched_eval_callback), as in bench_nodes.

    Raises ModelError if the context cannot be made or a run fails, AdapterError if the adapter cannot be attached.
    """

    def __init__(self, model: Model, adapter: str | None = None, observer: Any = None) -> None:
        llama, options = model.llama, model.options
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = options.n_ctx, options.n_batch, options.n_ubatch
        params.n_threads = params.n_threads_batch = options.n_threads
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if options.flash_attn else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = getattr(llama, f"GGML_TYPE_{options.type_k.upper()}")
        params.type_v = getattr(llama, f"GGML_TYPE_{options.type_v.upper()}")
        params.n_seq_max, params.no_perf = 1, True
        if observer is not None:
            params.cb_eval = observer

        self.llama, self.model, self.adapter, self.observer = llama, model, adapter, observer
        self._lib: Any = None
        self.ctx = llama.llama_init_from_model(model.pointer, params)
        if not self.ctx:
            raise ModelError(f"{options.model}: no context of {options.n_ctx} tokens can be made")
        self._memory = llama.llama_get_memory(self.ctx)
        self._batches: dict[int, list[Any]] = {}
        self._tokens: Any = (ctypes.c_int32 * options.n_ctx)()
        choice = random.Random(0)
        for i in range(options.n_ctx):
            self._tokens[i] = choice.randrange(model.n_vocab)
        self.n_bytes = {"weights": 0, "states": 0}
        if adapter is not None:
            try:
                self._attach(adapter)
            except AdapterError:
                self.close()
                raise

    def _attach(self, path: str) -> None:
        from ..runtime import library

        adapter = library.llama_deltamem_adapter_load(self.model.pointer, os.fsencode(path))
        if not adapter:
            raise AdapterError(_naming(path, library.last_error()))
        try:
            if library.llama_deltamem_attach(self.ctx, adapter) != 0:
                raise AdapterError(_naming(path, library.last_error()))
            self._lib = library
            self.n_bytes = {
                "weights": library.llama_deltamem_n_bytes(adapter),
                "states": library.llama_deltamem_state_n_bytes(self.ctx),
            }
        finally:
            library.llama_deltamem_adapter_free(adapter)  # the context keeps what it needs

    @property
    def n_graphs(self) -> int:
        """Graphs with memory built so far; 0 without an adapter."""
        return self._lib.llama_deltamem_n_graphs(self.ctx) if self._lib else 0

    def prefill(self, n_tokens: int) -> tuple[int, int]:
        """Reads a prompt of n_tokens into an empty KV cache. Returns (nanoseconds, graphs built meanwhile)."""
        llama = self.llama
        batches = self._prompt(n_tokens)
        llama.llama_memory_clear(self._memory, False)
        llama.llama_synchronize(self.ctx)
        return self._timed(batches, False)

    def decode(self, depth: int, n_tokens: int) -> tuple[int, int]:
        """Generates n_tokens, one llama_decode each, after a text of `depth` tokens. Returns as prefill().

        The text is read when it is not there yet. One token goes before the others untimed: it wakes the threads and
        has llama.cpp make the graph that the others reuse.
        """
        if self._length() < depth:
            self.prefill(depth)
        token = self._prompt(1)
        self._cut(depth)
        self._timed(token, True)
        self._cut(depth)
        return self._timed(token * n_tokens, True)

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
            raise DecodeError(f"{self.model.options.model}: llama_decode failed with status {status}")
        return elapsed, self.n_graphs - n_graphs

    def _prompt(self, n_tokens: int) -> list[Any]:
        """Batches of at most n_batch over the same random tokens; logits of a batch's last token only."""
        if n_tokens not in self._batches:
            size = ctypes.sizeof(ctypes.c_int32)
            pieces = range(0, n_tokens, self.model.options.n_batch)
            self._batches[n_tokens] = [
                self.llama.llama_batch_get_one(
                    ctypes.cast(ctypes.byref(self._tokens, start * size), ctypes.POINTER(ctypes.c_int32)),
                    min(self.model.options.n_batch, n_tokens - start),
                )
                for start in pieces
            ]
        return self._batches[n_tokens]

    def _length(self) -> int:
        return self.llama.llama_memory_seq_pos_max(self._memory, 0) + 1

    def _cut(self, length: int) -> None:
        if not self.llama.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise ModelError(f"{self.model.options.model}: its KV cache cannot be shortened, so decode cannot be timed")

    def renew(self) -> None:
        """Another context like this one, whose buffers lie elsewhere in memory."""
        self.close()
        self.__init__(self.model, self.adapter, self.observer)

    def close(self) -> None:
        if self.ctx:
            self.llama.llama_free(self.ctx)
            self.ctx = None


def _naming(path: str, reason: str) -> str:
    return reason if path in reason else f"{path}: {reason}"


def resident() -> dict[str, int]:
    """Bytes of this process in RAM: peak, and where the system tells also now, and the part that no file backs."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    names = {"peak": "VmHWM", "now": "VmRSS", "anonymous": "RssAnon"}
    found = {key: re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for key, name in names.items()}
    return {key: int(match[1]) * 1024 for key, match in found.items() if match}


#
# the worker: a line of JSON in, a line of JSON out
#


class Worker:
    """A Session in a process of its own over the llama library in `folder`, for the same calls.

    Args:
        folder: holds libllama.so (or .dylib, .dll), a build of the llama.cpp that llama-cpp-python's bindings mirror.
        adapter: only for a library with δ-mem.

    Raises ModelError, AdapterError or LibraryError with the worker's reason.
    """

    def __init__(self, folder: str | os.PathLike[str], options: Options, adapter: str | None = None) -> None:
        self.folder, self._options, self._adapter = os.fspath(folder), options, adapter
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pydeltamem.bench.runs"],
            env={**os.environ, "LLAMA_CPP_LIB_PATH": self.folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            from ..runtime import library  # not in the worker

            ours = self.folder == library.library_folder()
            self.description = self._call(options=asdict(options), adapter=adapter, ours=ours)["result"]
        except BaseException:
            self.close()
            raise

    def prefill(self, n_tokens: int) -> tuple[int, int]:
        return tuple(self._call(run="prefill", arguments=[n_tokens])["result"])

    def decode(self, depth: int, n_tokens: int) -> tuple[int, int]:
        return tuple(self._call(run="decode", arguments=[depth, n_tokens])["result"])

    def renew(self) -> None:
        """Another process like this one: the weights lie elsewhere in memory too."""
        self.close()
        self.__init__(self.folder, self._options, self._adapter)

    def resident(self) -> dict[str, int]:
        """As resident(), of the worker."""
        return self._call(run="resident", arguments=[])["result"]

    def _call(self, **request: Any) -> dict[str, Any]:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise LibraryError(f"the worker over the library in {self.folder} ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            kinds = {kind.__name__: kind for kind in (AdapterError, DecodeError, LibraryError, ModelError)}
            raise kinds.get(reply["kind"], DeltaMemError)(reply["error"])
        return reply

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve(requests: Any, reply: Callable[[dict[str, Any]], None]) -> None:
    request = json.loads(next(requests))
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    errors: list[str] = []
    try:
        if request["ours"]:  # also without an adapter, so that memory with and without one compares
            from ..runtime import library  # noqa: F401 - before llama_cpp
        try:
            import llama_cpp.llama_cpp as llama
        except (AttributeError, FileNotFoundError, RuntimeError) as error:
            raise LibraryError(f"the llama library in {folder} cannot be used: {error}") from error

        @llama.llama_log_callback
        def keep_errors(level: int, text: bytes, user_data: Any) -> None:
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                errors.append(text.decode("utf-8", errors="replace").strip())

        llama.llama_log_set(keep_errors, ctypes.c_void_p(0))
        session = Session(Model(llama, Options(**request["options"])), request["adapter"])
        reply({"result": session.model.describe()})
        for line in requests:
            request = json.loads(line)
            runs = {"prefill": session.prefill, "decode": session.decode, "resident": resident}
            reply({"result": runs[request["run"]](*request["arguments"])})
    except DeltaMemError as error:
        text = str(error)
        if isinstance(error, (DecodeError, ModelError)):  # an adapter's reason is in the sentence
            reasons = (re.sub(r"^(\w+: )+", "", line) for line in errors)
            text += next((f": {reason}" for reason in reasons if reason), "")
        reply({"error": text, "kind": type(error).__name__})


def main() -> None:
    """The worker. What the library prints to standard output goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, StopIteration):
        _serve(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
