"""What a converter must know of the base model's GGUF: sizes, and the order of the rows of its q and k projections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from pydeltamem.errors import ModelError

# llama.cpp runs RoPE on neighbouring rows for some architectures, where Hugging Face pairs the halves of a head. Its
# converter then permutes the rows of the q and k projections (LlamaModel.permute and its users in llama.cpp's conversion/).
PERMUTED = frozenset({
    "arcee", "arctic", "bailingmoe", "deci", "deepseek", "granite", "granitemoe", "internlm2", "llada", "llama",
    "mistral3", "minicpm", "nanbeige", "olmo", "smollm3",
})  # fmt: skip
IN_ORDER = frozenset({
    "apertus", "exaone", "exaone4", "falcon", "gemma", "gemma2", "gemma3", "gpt-oss", "gptneox", "hunyuan-dense", "nemotron",
    "olmo2", "olmoe", "phi2", "phi3", "phimoe", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen3next", "seed_oss", "stablelm",
    "starcoder2",
})  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Widths of a layer's projections and its head counts; 0 where it has no attention."""

    n_q: int
    n_k: int
    n_v: int
    n_o: int
    n_head: int
    n_head_kv: int

    def rows(self, head: str) -> int:
        """Rows of the projection q, k, v or o."""
        return {"q": self.n_q, "k": self.n_k, "v": self.n_v, "o": self.n_o}[head]


class Base:
    """A base model's GGUF. Reads its header, no weights. Raises ModelError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{self.path}: no such base model")
        try:
            reader = gguf.GGUFReader(self.path)
        except Exception as error:  # gguf reports a damaged file by whatever numpy and struct raise
            raise ModelError(f"{self.path}: is not a readable GGUF file; it may be truncated") from error
        self._fields = reader.fields
        self._shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}

        if self._value("general.type", "model") == "adapter":
            raise ModelError(f"{self.path}: is an adapter, not a base model")
        self.architecture: str = self._value("general.architecture")
        self.n_layer = int(self._value(f"{self.architecture}.block_count"))
        self.n_embd = int(self._value(f"{self.architecture}.embedding_length"))
        self.layers = [self._layer(i) for i in range(self.n_layer)]

    def permute(self, head: str, layer: int, rows: np.ndarray) -> np.ndarray:
        """Brings the rows of a q or k correction, [rows, n], into this file's order. v and o have no order of their own."""
        if head not in ("q", "k") or self.architecture in IN_ORDER:
            return rows
        if self.architecture not in PERMUTED:
            raise ModelError(
                f"{self.path}: it is not known whether llama.cpp's converter permutes the q and k rows of architecture "
                f"'{self.architecture}', which this checkpoint corrects"
            )
        n_head = self.layers[layer].n_head if head == "q" else self.layers[layer].n_head_kv
        # as LlamaModel.permute of llama.cpp's converter
        return rows.reshape(n_head, 2, rows.shape[0] // n_head // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    def _value(self, key: str, default=None):
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise ModelError(f"{self.path}: has no key {key}, it is no language model")
            return default
        return field.contents()

    def _per_layer(self, key: str, layer: int, default: int | None = None) -> int:
        value = self._value(f"{self.architecture}.{key}", default)
        return int(value[layer] if isinstance(value, list) else value)

    def _layer(self, i: int) -> Layer:
        def rows(name: str) -> int:
            shape = self._shapes.get(f"blk.{i}.{name}.weight")
            return shape[1] if shape else 0

        n_head = self._per_layer("attention.head_count", i)
        n_head_kv = self._per_layer("attention.head_count_kv", i, n_head)
        n_q, n_k, n_v = rows("attn_q"), rows("attn_k"), rows("attn_v")
        if fused := rows("attn_qkv"):
            head_dim = self._per_layer("attention.key_length", i, self.n_embd // max(n_head, 1))
            value_dim = self._per_layer("attention.value_length", i, head_dim)
            n_k, n_v = head_dim * n_head_kv, value_dim * n_head_kv
            n_q = fused - n_k - n_v
        return Layer(n_q, n_k, n_v, rows("attn_output"), n_head, n_head_kv)
