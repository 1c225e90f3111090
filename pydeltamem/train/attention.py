"""Finds the attention of a decoder's layers, and its projections, in the modules of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..formats.checkpoint import HEADS


@dataclass(frozen=True)
class Attention:
    """The projections of one layer's attention, and the rows that each of q, k, v, o has in them."""

    inputs: tuple[nn.Linear, ...]  # q, k and v, or one that computes them one after the other
    output: nn.Linear
    rows: dict[str, int]

    def weight(self, head: str) -> Tensor:
        if head == "o":
            return self.output.weight
        if len(self.inputs) == 3:
            return self.inputs["qkv".index(head)].weight
        return self.inputs[0].weight.split([self.rows[x] for x in "qkv"])["qkv".index(head)]


# How transformers' decoders name their attention and its projections.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_NAMES = (
    ("self_attn", _SEPARATE, "o_proj"),  # nearly all
    ("self_attn", _SEPARATE, "out_proj"),  # OPT, LFM2
    ("self_attn", _SEPARATE, "dense"),  # Phi
    ("self_attn", ("qkv_proj",), "o_proj"),  # Phi-3
    ("attn", _SEPARATE, "out_proj"),  # GPT-J
)


def find_attention(model: Any) -> dict[int, Attention]:
    """The attention of each layer of a decoder, without the layers of hybrid models that have none.

    Raises ModelError if the projections of an attention layer are not known.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers = next((stack for stack in stacks if len(stack) == config.num_hidden_layers), None)
    if layers is None:
        raise ModelError(f"{name}: has no list of {config.num_hidden_layers} layers; it is no decoder that we know")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    found = {}
    for i, (layer, kind) in enumerate(zip(layers, kinds)):
        attention = _attention(layer, config)
        if attention:
            found[i] = attention
        elif kind.endswith("attention") and kind != "linear_attention":
            raise ModelError(
                f"{name}: layer {i} ({', '.join(child for child, _ in layer.named_children())}) has no attention with"
                " projections that we know; add its names to pydeltamem/train/attention.py"
            )
    return found


def _attention(layer: nn.Module, config: Any) -> Attention | None:
    for attention_name, input_names, output_name in _NAMES:
        attention = getattr(layer, attention_name, None)
        modules: list[Any] = [getattr(attention, name, None) for name in (*input_names, output_name)]
        if all(isinstance(module, nn.Module) for module in modules):
            *inputs, output = modules
            sizes = [module.out_features for module in inputs]
            if len(sizes) == 1:
                head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
                n_q = config.num_attention_heads * head_dim
                sizes = [n_q, (sizes[0] - n_q) // 2, (sizes[0] - n_q) // 2]
            return Attention(tuple(inputs), output, dict(zip(HEADS, [*sizes, output.out_features])))
    return None
