"""Timed runs in their own process, over any llama library: a line of JSON in, a line of JSON out.

A process holds one llama library, and a worker's may not be ours: nothing here needs δ-mem without an adapter and
`unpack`. `python -m pydeltamem.bench.worker` is the worker; LLAMA_CPP_LIB_PATH names its library.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..errors import AdapterError, DecodeError, DeltaMemError, LibraryError, ModelError
from ..runtime.children import environment
from .ram import resident
from .runs import Model, Options, Runner


class Worker:
    """A Runner in its own process over the llama library in `folder`, for the same calls.

    Args:
        folder: holds libllama.so (or .dylib, .dll), a build of the llama.cpp that llama-cpp-python's bindings mirror.
        adapter: only for a library with δ-mem.

    process: that process; another one after `renew`.

    Raises ModelError, AdapterError or LibraryError with the worker's reason.
    """

    def __init__(self, folder: str | os.PathLike[str], options: Options, adapter: str | None = None) -> None:
        self.folder, self._options, self._adapter = os.fspath(folder), options, adapter
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pydeltamem.bench.worker"],
            env=environment(LLAMA_CPP_LIB_PATH=self.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            from ..runtime import library  # not in the worker

            ours = self.folder == library.library_folder()
            self.description = self._call(options=asdict(self._options), adapter=self._adapter, ours=ours)["result"]
        except BaseException:
            self.close()
            raise

    def prompt(self, n_tokens: int) -> tuple[int, int]:
        nanoseconds, built = self._call(run="prompt", arguments=[n_tokens])["result"]
        return nanoseconds, built

    def decode(self, depth: int, n_tokens: int) -> tuple[int, int]:
        nanoseconds, built = self._call(run="decode", arguments=[depth, n_tokens])["result"]
        return nanoseconds, built

    def renew(self) -> None:
        """Starts a new process like this one: the weights lie elsewhere in memory too."""
        self.close()
        self._start()

    def resident(self) -> dict[str, int]:
        """resident() of the worker."""
        return self._call(run="resident", arguments=[])["result"]

    def _call(self, **request: Any) -> dict[str, Any]:
        line, to, of = "", self.process.stdin, self.process.stdout
        assert to and of  # both are pipes
        with contextlib.suppress(BrokenPipeError):
            to.write(json.dumps(request) + "\n")
            to.flush()
            line = of.readline()
        if not line:
            raise LibraryError(f"the worker over the library in {self.folder} ended with status {self.process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            kinds = {kind.__name__: kind for kind in (AdapterError, DecodeError, LibraryError, ModelError)}
            raise kinds.get(reply["kind"], DeltaMemError)(reply["error"])
        return reply

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _serve(requests: Any, reply: Callable[[dict[str, Any]], None]) -> None:
    request = json.loads(next(requests))
    folder = os.environ.get("LLAMA_CPP_LIB_PATH")
    errors: list[str] = []
    try:
        # also without an adapter, so that RAM with and without one is comparable; and it takes llama.cpp's log
        if request["ours"] or request["options"]["unpack"] != "none":
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
        runner = Runner(Model(llama, Options(**request["options"])), request["adapter"])
        reply({"result": runner.model.describe()})
        for line in requests:
            request = json.loads(line)
            runs: dict[str, Callable[..., Any]] = {
                "prompt": runner.prompt,
                "decode": runner.decode,
                "resident": resident,
            }
            reply({"result": runs[request["run"]](*request["arguments"])})
    except DeltaMemError as error:
        text = str(error)
        if isinstance(error, (DecodeError, ModelError)):  # an AdapterError already has the reason
            reasons = (re.sub(r"^(\w+: )+", "", line) for line in errors)
            text += next((f": {reason}" for reason in reasons if reason), "")
        reply({"error": text, "kind": type(error).__name__})


def main() -> None:
    """Runs the worker. What the library prints to standard output goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError, StopIteration):
        _serve(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
