"""What a converter needs of the base model's GGUF: sizes, and the row order of its q and k projections."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError, named, shown
from .gguf_header import Header
from .model_numbers import MAX_LAYERS

# llama.cpp runs RoPE on neighbouring rows for some architectures, where Hugging Face pairs the halves of a head. Its
# converter then permutes the rows of the q and k projections. tools/converter_rows.py finds these lists by giving its
# classes numbered rows.
PERMUTED = frozenset({
    "arcee", "arctic", "bailingmoe", "chameleon", "deci", "deepseek", "granite", "granite_swa", "granitehybrid",
    "granitemoe", "internlm2", "llada", "llama", "llama-embed", "minicpm", "mistral3", "muse-glimmer", "nanbeige",
    "olmo", "smollm3", "xverse",
})  # fmt: skip
IN_ORDER = frozenset({
    "afmoe", "apertus", "cohere2", "cohere2moe", "command-r", "dots1", "ernie4_5", "ernie4_5-moe", "exaone",
    "exaone-moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gemma3n", "glm4", "glm4moe", "gpt-oss",
    "gptneox", "grok", "grovemoe", "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "hy_v3", "jais2", "jamba", "laguna",
    "lfm2", "lfm2moe", "llada-moe", "llama4", "maincoder", "maple", "mellum", "minimax-01", "minimax-m2",
    "minimax-m3", "nemotron", "olmo2", "olmoe", "orion", "paddleocr", "pangu-embedded", "phi2", "phi3", "phimoe",
    "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vl", "qwen3vlmoe",
    "seed_oss", "smallthinker", "stablelm", "starcoder2", "step35", "talkie",
})  # fmt: skip
# Hugging Face scales the activations before and after these projections; llama.cpp's converter scales the weights
# instead. The adapter's weights would need that too.
RESCALED = frozenset({"falcon-h1"})


def converts(architecture: str) -> str:
    """The corrections (of q, k, v and o) that can be converted for an architecture."""
    if architecture in RESCALED:
        return ""
    return "qkvo" if architecture in PERMUTED | IN_ORDER else "vo"


@dataclass(frozen=True)
class Layer:
    """Widths of a layer's projections and its head counts; 0 where it has no attention."""

    n_q: int
    n_k: int
    n_v: int
    n_o: int
    n_head: int
    n_head_kv: int

    @property
    def has_attention(self) -> bool:
        return self.n_q > 0

    def rows(self, head: str) -> int:
        """Rows of the projection q, k, v or o."""
        return {"q": self.n_q, "k": self.n_k, "v": self.n_v, "o": self.n_o}[head]


class Base:
    """A base model's GGUF, or the first of its shards. Reads only the header, no weights. Raises ModelError."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not os.path.exists(self.path):
            raise ModelError(f"{named(self.path)}: no such base model")
        header = Header.of_model(self.path)
        self.files = header.files  # all shards
        self._keys = header.keys
        self._shapes = {tensor.name: tensor.shape for tensor in header.tensors.values()}

        if (kind := self._keys.get("general.type", "model")) != "model":
            raise ModelError(f"{self.path}: is no base model: its general.type is '{shown(kind)}'")
        self.architecture: str = self._value("general.architecture")
        # the file also counts the layers that predict further tokens, llama.cpp does not
        self.n_layer = self._size("block_count") - self._size("nextn_predict_layers", 0)
        if not 0 < self.n_layer <= MAX_LAYERS:
            raise ModelError(f"{self.path}: has {self.n_layer} layers, llama.cpp takes 1 to {MAX_LAYERS}")
        self.n_embd = self._size("embedding_length")
        self.layers = [self._layer(i) for i in range(self.n_layer)]

    def permute(self, head: str, layer: int, rows: np.ndarray) -> np.ndarray:
        """Puts the rows of a q or k correction, [rows, n], in this file's order; rows of v and o keep theirs."""
        if self.architecture in RESCALED:
            raise ModelError(
                f"{self.path}: no adapter can be converted for architecture '{self.architecture}': its GGUF files hold "
                "rescaled weights"
            )
        mrope = self.architecture == "glm4" and "glm4.rope.dimension_sections" in self._keys  # has its own order
        if head not in ("q", "k") or (self.architecture in IN_ORDER and not mrope):
            return rows
        if self.architecture not in PERMUTED:
            raise ModelError(
                f"{self.path}: it is not known whether llama.cpp's converter permutes the q and k rows of architecture "
                f"'{shown(self.architecture)}', which this checkpoint corrects: convert one that corrects v and o only "
                "(deltamem train --corrections vo), or add the order to pydeltamem (docs/reference/architectures.md)"
            )
        n_head = self.layers[layer].n_head if head == "q" else self.layers[layer].n_head_kv
        if n_head < 1 or len(rows) % (2 * n_head):
            raise ModelError(
                f"{self.path}: the {len(rows)} rows of {head} in layer {layer} are not {n_head} heads' rows"
            )
        # as LlamaModel.permute of llama.cpp's converter
        pairs = rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, rows.shape[1])
        return np.reshape(pairs.swapaxes(1, 2), rows.shape)

    def _value(self, key: str, default: Any = None) -> Any:
        value = self._keys.get(key, default)
        if value is None:
            raise ModelError(f"{self.path}: has no key {shown(key)}, it is no language model")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        return self._integer(key, self._value(f"{self.architecture}.{key}", default))

    def _per_layer(self, key: str, layer: int, default: int | None = None) -> int:
        value = self._value(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and len(value) < self.n_layer:
            raise ModelError(
                f"{self.path}: {shown(self.architecture)}.{key} has {len(value)} values for {self.n_layer} layers"
            )
        return self._integer(key, value[layer] if isinstance(value, list) else value)

    def _integer(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.path}: {shown(key)} is {shown(value)}, it must be a whole number")
        return value

    def _layer(self, i: int) -> Layer:
        def rows(name: str) -> int:
            shape = self._shapes.get(f"blk.{i}.{name}.weight")
            return shape[0] if shape else 0

        n_head = self._per_layer("attention.head_count", i)
        n_head_kv = self._per_layer("attention.head_count_kv", i, n_head)
        if not rows("attn_output"):  # also linear attention, where some models have attn_qkv
            return Layer(0, 0, 0, 0, 0, 0)
        n_q, n_k, n_v = rows("attn_q"), rows("attn_k"), rows("attn_v")
        if fused := rows("attn_qkv"):
            head_dim = self._per_layer("attention.key_length", i, self.n_embd // max(n_head, 1))
            value_dim = self._per_layer("attention.value_length", i, head_dim)
            n_k, n_v = head_dim * n_head_kv, value_dim * n_head_kv
            n_q = fused - n_k - n_v
        return Layer(n_q, n_k, n_v, rows("attn_output"), n_head, n_head_kv)
