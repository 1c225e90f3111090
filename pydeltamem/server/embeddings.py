"""/v1/embeddings: vectors by a second context of the same model, which is made when the first are asked for."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np

from ..errors import InputError
from ..llama import DeltaMemLlama
from .openai import field_of
from .service import AsyncDeltaMem


class Embedder:
    """Vectors of texts, each with the memory of a session or an empty one. Nothing is written."""

    def __init__(self, service: AsyncDeltaMem) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._llm: DeltaMemLlama | None = None

    def close(self) -> None:
        with self._lock:
            if self._llm is not None:
                self._llm.close()

    async def embeddings(self, body: Mapping[str, Any], model: str, session: str | None, owner: str) -> dict[str, Any]:
        """As OpenAI's endpoint. Raises InputError."""
        texts = body.get("input")
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError("input is a text, or a list of texts, none of them empty")
        encoding = field_of(body, "encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise InputError(f'encoding_format is "float" or "base64", not {encoding!r}')
        state = None if session is None else (await self._service.snapshot(session, owner)).state
        vectors, n = await asyncio.to_thread(self._embed, texts, state)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, encoding)}
            for i, vector in enumerate(vectors)
        ]
        return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": n, "total_tokens": n}}

    def _embed(self, texts: list[str], state: Any) -> tuple[Any, int]:
        with self._lock:
            if self._llm is None:
                self._llm = self._load()
            llm = self._llm
            if llm.memory.attached:
                if state is None:
                    llm.memory.reset()
                else:
                    llm.memory.state = state
            vectors, n = llm.embed(texts, normalize=True, truncate=False, return_count=True)
            return vectors, n

    def _load(self) -> DeltaMemLlama:
        other = self._service.llm
        return DeltaMemLlama(
            other.model_path,
            deltamem_path=other.deltamem_path,
            n_ctx=other.n_ctx(),
            n_batch=other.n_ctx(),
            n_ubatch=other.n_ctx(),
            n_threads=other.n_threads,
            n_threads_batch=other.n_threads_batch,
            embedding=True,
            pooling_type=_pooling(other),
        )


def _pooling(llm: DeltaMemLlama) -> int:
    """The model's own kind of pooling; the mean if it has none."""
    kind = llm.metadata.get(f"{llm.metadata.get('general.architecture', '')}.pooling_type", "")
    return int(kind) if kind.isdecimal() and int(kind) > 0 else int(llama_cpp.LLAMA_POOLING_TYPE_MEAN)


def _encoded(vector: Any, encoding: str) -> Any:
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
