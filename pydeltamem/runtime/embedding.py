"""Vectors of texts: `DeltaMemLlama.embed`.

llama_cpp's own takes vectors from the wrong place, from the second text on, when nothing is pooled. It writes outside
its batch for a text without tokens. It averages over only a part of a text that does not fit in one micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, NotFiniteError
from . import library
from .model import Model
from .tokenizer import encoded

_llama = library.llama_cpp


def vectors(llm: Model, texts: list[str], normalize: bool, truncate: bool) -> tuple[list[Any], int]:
    """The vectors of texts, as `DeltaMemLlama.embed` returns them, and the number of their tokens."""
    if not llm.context_params.embeddings:
        raise InputError("embed needs a model that was loaded with embedding=True")
    tokens, text, slots = _tokenized(llm, texts, truncate), llm._text, llm._engine.slots
    try:
        if slots.has_memory:
            text.renew()
            checkpoint = text.position.checkpoint
            assert checkpoint is not None  # there is a memory
            slots.share_state(checkpoint.state, len(tokens))
        with library.decoding():
            embedded = _vectors(llm, tokens, normalize)
    finally:
        slots.empty_kv()
        text.reset()
    for i, vector in enumerate(embedded):
        rows = np.atleast_2d(vector)
        if not np.isfinite(rows).all() or (rows.shape[1] > 1 and not rows.any(axis=1).all()):
            raise NotFiniteError(slots.not_finite(f"the vector of text {i}"))
    return embedded, sum(map(len, tokens))


def _tokenized(llm: Model, texts: list[str], truncate: bool) -> list[list[int]]:
    """The tokens of texts to embed. Raises InputError, which counts texts from 0, if one cannot be embedded."""
    limit = n_tokens_max(llm)
    pooled = llm.pooling_type() != _llama.LLAMA_POOLING_TYPE_NONE
    tokens = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} to embed is a {type(text).__name__}: texts are str")
        ids = llm.tokenize(encoded(text, f"text {i} to embed"))
        if len(ids) > limit and not truncate:
            raise InputError(
                f"text {i} to embed has {len(ids)} tokens, {limit} fit: raise n_ctx, n_batch and n_ubatch, or truncate"
            )
        if not ids and pooled:
            raise InputError(f"text {i} to embed has no tokens, so it has no vector: leave empty texts out")
        tokens.append(ids[:limit])
    return tokens


def n_tokens_max(llm: Model) -> int:
    """Most tokens of a text to embed, and of a batch of them."""
    n_ctx = int(_llama.llama_n_ctx(llm.ctx))  # a text may have all of it while it is embedded
    if _in_one_go(llm):
        return min(int(_llama.llama_n_ubatch(llm.ctx)), llm.n_batch, n_ctx)
    return min(llm.n_batch, n_ctx)


def _in_one_go(llm: Model) -> bool:
    """Whether a text must be in one micro-batch. Otherwise llama.cpp would pool a part of it; where tokens attend to
    later ones it would end the process.
    """
    kind = llm.context_params.attention_type
    causal = kind != _llama.LLAMA_ATTENTION_TYPE_NON_CAUSAL
    if kind == _llama.LLAMA_ATTENTION_TYPE_UNSPECIFIED:
        causal = llm.metadata.get(f"{llm.metadata.get('general.architecture')}.attention.causal") != "false"
    encodes = _llama.llama_get_memory(llm.ctx) is None
    in_parts = (_llama.LLAMA_POOLING_TYPE_NONE, _llama.LLAMA_POOLING_TYPE_LAST)
    return encodes or not causal or llm.pooling_type() not in in_parts


def _vectors(llm: Model, texts: list[list[int]], normalize: bool) -> list[Any]:
    """One vector per text, a list of floats; without pooling one list of vectors per text, one vector per token."""
    limit, n_seq_max = n_tokens_max(llm), _llama.llama_n_seq_max(llm.ctx)
    result: list[Any] = []
    batch: list[list[int]] = []
    for tokens in texts:
        if batch and (len(batch) == n_seq_max or sum(map(len, batch)) + len(tokens) > limit):
            result += _decoded(llm, batch, normalize)
            batch = []
        batch.append(tokens)
    return result + _decoded(llm, batch, normalize)


def _decoded(llm: Model, texts: list[list[int]], normalize: bool) -> list[Any]:
    """One llama_decode, each text in its own slot."""
    n_tokens = llm._engine.slots.decode_alone(texts)
    pooling = llm.pooling_type()
    if pooling == _llama.LLAMA_POOLING_TYPE_NONE:
        n_embd = _llama.llama_model_n_embd_out(llm.model)
        rows = np.empty((0, n_embd), dtype=np.float32)
        if n_tokens:
            rows = np.ctypeslib.as_array(_llama.llama_get_embeddings(llm.ctx), (n_tokens, n_embd))
        ends = np.cumsum([len(tokens) for tokens in texts])
        return [_scaled(rows[end - len(tokens) : end], normalize).tolist() for tokens, end in zip(texts, ends)]
    ranks = pooling == _llama.LLAMA_POOLING_TYPE_RANK
    width = _llama.llama_model_n_cls_out(llm.model) if ranks else _llama.llama_model_n_embd_out(llm.model)
    return [
        _scaled(np.ctypeslib.as_array(_llama.llama_get_embeddings_seq(llm.ctx, slot), (width,)), normalize).tolist()
        for slot in range(len(texts))
    ]


def _scaled(rows: npt.NDArray[np.float32], normalize: bool) -> npt.NDArray[np.float64]:
    """A copy, scaled to length 1 if `normalize`; zeros stay zeros."""
    scaled = rows.astype(np.float64)
    if normalize:
        lengths = np.linalg.norm(scaled, axis=-1, keepdims=True)
        scaled /= np.where(lengths == 0, 1, lengths)
    return scaled
