"""Numbers in a model's header for which llama.cpp would end the process: GGML_ASSERTs of its loader and its graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import ModelError, shown

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
MAX_CONTEXT = 1 << 24  # tokens of a text: more than any model was trained on
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

# architectures whose graphs rotate whole heads, with keys as long as values: GGML_ASSERT(n_embd_head == n_rot)
WHOLE_HEADS = {
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cogvlm", "dbrx", "deci", "deepseek", "dots1",
    "dream", "ernie4_5", "ernie4_5-moe", "exaone", "falcon", "granite", "grok", "hunyuan-moe", "hunyuan_vl",
    "internlm2", "jais2", "llada", "llada-moe", "llama", "llama4", "maincoder", "mellum", "mistral3", "olmo", "olmo2",
    "olmoe", "orion", "paddleocr", "pangu-embedded", "plamo", "pockettts", "qwen2", "qwen2moe", "qwen2vl", "qwen3",
    "qwen3moe", "qwen3vl", "qwen3vlmoe", "rnd1", "seed_oss", "smallthinker", "smollm3", "starcoder2", "xverse",
}  # fmt: skip


def check_numbers(path: str | os.PathLike[str], keys: Mapping[str, Any]) -> None:
    """Raises ModelError, which names key and value, if llama.cpp would end the process for one of a model's keys.

    llama.cpp itself refuses a missing key or one of another type.
    """
    architecture = keys.get("general.architecture")

    def number(name: str, default: int = 0) -> int:
        """A whole number; the largest one of a list over the layers."""
        value = keys.get(f"{architecture}.{name}", default)
        value = max(value, default=default) if isinstance(value, list) else value
        return value if isinstance(value, int) else default

    def refuse(name: str, wanted: str) -> None:
        value = shown(keys.get(f"{architecture}.{name}", "missing"))
        raise ModelError(
            f"{os.fspath(path)}: the model cannot be loaded: {architecture}.{name} is {value}, not {wanted}"
        )

    n_layer = number("block_count", 1)
    if not 1 <= n_layer <= MAX_LAYERS:
        refuse("block_count", f"1 to {MAX_LAYERS}")
    if number("nextn_predict_layers") > n_layer:
        refuse("nextn_predict_layers", f"at most the {n_layer} of block_count")

    if not 0 <= number("context_length") < 2**31:  # llama_cpp makes an array of so many tokens for each text
        refuse("context_length", "0 or more, in 31 bits")

    n_expert, n_used = number("expert_count"), number("expert_used_count")
    if str(architecture).startswith("hunyuan") and n_expert <= 1:
        n_expert = n_used = 0
    if n_expert > MAX_EXPERTS:
        refuse("expert_count", f"at most {MAX_EXPERTS}")
    if not min(n_expert, 1) <= n_used <= n_expert:
        refuse(
            "expert_used_count", f"1 to the {n_expert} of expert_count" if n_expert else "0: the model has no experts"
        )
    n_group = number("expert_group_count")
    if n_group and (n_group >= n_expert or n_expert % n_group):
        refuse("expert_group_count", f"a smaller divisor of the {n_expert} of expert_count")
    if n_group > 1 and not 1 <= number("expert_group_used_count") < n_group:
        refuse("expert_group_used_count", f"1 to {n_group - 1}")

    scaling = keys.get(f"{architecture}.rope.scaling.type", "linear")
    if isinstance(scaling, str) and scaling not in ROPE_SCALINGS:
        refuse("rope.scaling.type", f"one of {', '.join(ROPE_SCALINGS)}")
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        value = keys.get(f"{architecture}.attention.{name}")
        if isinstance(value, float) and not value >= 0:
            refuse(f"attention.{name}", "0 or more")

    n_head = keys.get(f"{architecture}.attention.head_count")
    n_head = n_head[0] if isinstance(n_head, list) and n_head else n_head
    if not isinstance(n_head, int) or n_head < 1:
        return
    head = number("embedding_length") // n_head
    n_key, n_value = number("attention.key_length", head), number("attention.value_length", head)
    n_rot = number("rope.dimension_count", n_key)
    if architecture in WHOLE_HEADS:
        if n_value != n_key:
            refuse("attention.value_length", f"the {n_key} of the keys")
        if n_rot != n_key:
            refuse("rope.dimension_count", f"the {n_key} of a head")
    elif f"{architecture}.rope.dimension_count" in keys and (n_rot % 2 or n_rot > max(n_key, n_value)):
        refuse("rope.dimension_count", f"an even number up to the {max(n_key, n_value)} of a head")
