"""/v1/embeddings: vectors by a second context of the same model, which is made when the first are asked for."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import threading
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np

from ..errors import InputError, ModelError, shown_value
from ..llama import DeltaMemLlama
from ..runtime.tokenizer import encoded
from .lengths import PromptTooLong
from .openai import field_of
from .service import AsyncDeltaMem
from .worker import QueueFull

_N_TOGETHER = 256  # tokens of texts that are embedded in one call, which begins by emptying the KV cache


class Embedder:
    """Vectors of texts, each with the memory of a session or an empty one. Nothing is written.

    One request is embedded at a time, in a thread of its own: those that wait hold no thread that answers need. If
    nobody waits for one any more, it ends after a few texts.

    Attributes:
        n_asked: requests that wait, and the one that is embedded.
    """

    def __init__(self, service: AsyncDeltaMem) -> None:
        self._service = service
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "deltamem-embed")
        self.n_asked = 0
        self._llm: DeltaMemLlama | None = None
        self._cuts = False

    def cut(self) -> None:
        """Fails the requests after a few texts. Any thread may call this."""
        self._cuts = True

    def close(self) -> None:
        """Waits for the texts that are embedded now."""
        self.cut()
        self._thread.shutdown(cancel_futures=True)
        if self._llm is not None:
            self._llm.close()

    async def embeddings(self, body: Mapping[str, Any], model: str, session: str | None, owner: str) -> dict[str, Any]:
        """The fields of OpenAI's answer; `data` is an iterator. Raises InputError, AdapterError, SessionUnknown,
        QueueFull, and ModelError after `cut`. One that is cancelled is not embedded, or no further.
        """
        texts, encoding = await asyncio.to_thread(self._checked, body)
        state = None if session is None else (await self._service.readable(session, owner)).state
        if self.n_asked > self._service.worker.n_queue:
            raise QueueFull(f"{self.n_asked} requests of embeddings wait already: try again later")
        self.n_asked += 1
        is_over = threading.Event()
        try:
            loop = asyncio.get_running_loop()
            vectors, n = await loop.run_in_executor(self._thread, self._embed, texts, state, is_over)
        finally:
            self.n_asked -= 1
            is_over.set()
        data = (
            {"object": "embedding", "index": i, "embedding": _encoded(vector, encoding)}
            for i, vector in enumerate(vectors)
        )
        return {"data": data, "model": model, "usage": {"prompt_tokens": n, "total_tokens": n}}

    def _checked(self, body: Mapping[str, Any]) -> tuple[list[str], str]:
        """The texts of a request, and the form of their vectors. Raises InputError."""
        texts = body.get("input")
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError("input is a text, or a list of texts, none of them empty")
        encoding = field_of(body, "encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise InputError(f'encoding_format is "float" or "base64", not {shown_value(encoding)}')
        n_wide = self._service.llm.n_embd()
        if body.get("dimensions") not in (None, n_wide):
            raise InputError(f"dimensions: vectors of this model have {n_wide}, not {shown_value(body['dimensions'])}")
        return texts, encoding

    def _embed(self, texts: list[str], state: Any, is_over: threading.Event) -> tuple[list[Any], int]:
        """The vectors of texts, and the number of their tokens. `is_over`: nobody waits for them any more."""
        if self._llm is None:
            self._llm = self._load()
        llm = self._llm
        lengths = []
        for i, text in enumerate(texts):
            if is_over.is_set():
                return [], 0
            lengths.append(self._length(llm, i, text))
        if llm.memory.attached:
            if state is None:
                llm.memory.reset()
            else:
                llm.memory.state = state
        vectors: list[Any] = []
        ends = np.cumsum([0, *lengths])
        while (n := len(vectors)) < len(texts) and not is_over.is_set():
            if self._cuts:
                raise ModelError("the server is stopping")
            end = int(np.searchsorted(ends, ends[n] + _N_TOGETHER, side="right")) - 1
            vectors += llm.embed(texts[n : max(n + 1, end)], normalize=True, truncate=False)
        return vectors, sum(lengths)

    def _length(self, llm: DeltaMemLlama, i: int, text: str) -> int:
        """How many tokens the i-th text has. Raises InputError if it cannot be embedded."""
        data, n_ctx = encoded(text, f"input: text {i}"), llm.n_ctx()
        n = self._service.lengths.at_least(data)
        n = n if n > n_ctx else len(llm.tokenize(data))
        if n > n_ctx:
            raise PromptTooLong(f"input: text {i} has {n} tokens or more, the context holds {n_ctx}: send parts of it")
        if n == 0:
            raise InputError(f"input: text {i} has no tokens, so it has no vector: leave it out")
        return n

    def _load(self) -> DeltaMemLlama:
        other = self._service.llm
        options = other.__getstate__()  # how to load it again: with its LoRA adapter, on its devices and RPC servers
        del options["memory"], options["unpack"]  # unpacked weights would be there twice
        n = other.n_ctx()
        options |= {"n_seq_max": 1, "n_ctx": n, "n_batch": n, "n_ubatch": n}
        return DeltaMemLlama(**{**options, "embedding": True, "pooling_type": _pooling(other)})


def _pooling(llm: DeltaMemLlama) -> int:
    """The model's own kind of pooling; the mean if it has none."""
    kind = llm.metadata.get(f"{llm.metadata.get('general.architecture', '')}.pooling_type", "")
    return int(kind) if kind.isdecimal() and int(kind) > 0 else int(llama_cpp.LLAMA_POOLING_TYPE_MEAN)


def _encoded(vector: Any, encoding: str) -> Any:
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
