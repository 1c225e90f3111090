"""Initial weights by which an adapter reads and writes as the model's own copying heads do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..formats.checkpoint import HEADS
from .attention import find_attention
from .reference import DeltaMem


@torch.no_grad()
def start_from_heads(memory: DeltaMem, model: Any, gain: float = 1.0) -> None:
    """Sets initial weights with which the adapter reads and writes as the model's own copying heads do.

    A head's value and output weights form one matrix: it maps a token's hidden state to what attending to it adds. Its
    query and key weights form another: it decides which tokens match (Elhage et al., A mathematical framework for
    transformer circuits, 2021; without rotary positions and norms). In each layer we take the half of the heads whose
    first matrix best maps tokens to themselves. The state heads get the leading singular directions of both matrices.

    Both matrices are products of two narrow ones, so the decomposition costs only as much as the width of a head.

    Raises ModelError if a head's queries, keys and values, or embeddings and hidden states, are not of one width.
    """
    text = model.config.get_text_config()
    embedded = model.get_input_embeddings().weight.float()
    embedded = embedded / embedded.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    alike, mean = embedded.T @ embedded / len(embedded), embedded.mean(0)  # second and first moment of the tokens
    attentions = find_attention(model)
    n_head = text.num_attention_heads
    n_kv = getattr(text, "num_key_value_heads", None) or n_head
    rank, scale = memory.config.rank, memory.config.alpha / memory.config.rank
    for layer, parameters in zip(memory.layers, memory.memories):
        weight = {head: attentions[layer].weight(head).float() for head in HEADS}
        size = weight["q"].shape[0] // n_head
        widths = {weight["k"].shape[0] // n_kv, weight["v"].shape[0] // n_kv, weight["o"].shape[1] // n_head}
        if widths != {size} or weight["v"].shape[1] != embedded.shape[1]:
            raise ModelError(
                f"--heads-gain: in layer {layer} of {type(model).__name__} queries, keys and values, or embeddings and "
                "hidden states, are not of one width: leave it out"
            )
        heads = [_Head.of(weight, i, i // (n_head // n_kv), size) for i in range(n_head)]
        heads.sort(key=lambda head: -head.copying(alike, mean))
        decomposed = [head.decomposed() for head in heads[: max(n_head // 2, 1)]]
        for i in range(memory.config.num_state_heads):
            (out, strength, into), (asked, match, kept) = decomposed[i % len(decomposed)]
            begin = i // len(decomposed) * rank
            some = slice(begin, min(begin + rank, size))
            rows = slice(i * rank, i * rank + some.stop - some.start)
            root, level = strength[some, None].sqrt(), (match[some, None] / match[0]).sqrt()
            parameters.memory_v_proj[rows] = root * into[some]
            parameters.memory_k_proj[rows] = level * kept[some]
            parameters.memory_q_proj[rows] = level * asked.T[some]
            if "o" in memory.config.delta_heads:
                parameters.delta_o_proj[:, rows] = gain / scale * (root * out.T[some]).T


Decomposed = tuple[Tensor, Tensor, Tensor]  # U, singular values, Vᵀ


@dataclass(frozen=True)
class _Head:
    """The weights of one head of attention."""

    query: Tensor  # [size, n_embd]
    key: Tensor  # [size, n_embd]
    value: Tensor  # [size, n_embd]
    output: Tensor  # [n_embd, size]

    @classmethod
    def of(cls, weight: Mapping[str, Tensor], i: int, i_kv: int, size: int) -> _Head:
        """Head i of a layer, which has the keys and values of number i_kv."""
        q, kv = (slice(j * size, (j + 1) * size) for j in (i, i_kv))
        return cls(weight["q"][q], weight["k"][kv], weight["v"][kv], weight["o"][:, q])

    def copying(self, alike: Tensor, mean: Tensor) -> float:
        """How well it maps tokens to themselves: the mean of x · (output value x) over all tokens x, minus the same of
        their mean. alike, mean: second and first moment of the tokens.
        """
        of_all = ((self.value @ alike) * self.output.T).sum()
        return (of_all - (self.value @ mean) @ (self.output.T @ mean)).item()

    def decomposed(self) -> tuple[Decomposed, Decomposed]:
        """Of what it adds for a token that it attends to, and of what decides to which it attends."""
        return _singular(self.output, self.value), _singular(self.query.T, self.key)


def _singular(left: Tensor, right: Tensor) -> Decomposed:
    """Singular vectors and values of left @ right, [n, m] @ [m, k] with m < n, k: U [n, m], [m], Vᵀ [m, k]."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, strength, v = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, strength, v @ q_right.T
