"""Numbers in a model's header for which llama.cpp would end the process: GGML_ASSERTs of its loader and its graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NoReturn

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
    numbers = _Numbers(path, keys)
    _check_layers(numbers)
    _check_experts(numbers)
    _check_scalings(numbers)
    _check_heads(numbers)


class _Numbers:
    """The keys of a model under its architecture's name, which stands before them in the file."""

    def __init__(self, path: str | os.PathLike[str], keys: Mapping[str, Any]) -> None:
        self.architecture = str(keys.get("general.architecture"))
        self._path, self._keys = path, keys

    def get(self, name: str, default: Any = None) -> Any:
        return self._keys.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: int = 0) -> int:
        """A whole number; the largest one of a list over the layers."""
        value = self.get(name, default)
        value = max(value, default=default) if isinstance(value, list) else value
        return value if isinstance(value, int) else default

    def refuse(self, name: str, wanted: str) -> NoReturn:
        raise ModelError(
            f"{os.fspath(self._path)}: the model cannot be loaded: {self.architecture}.{name} is"
            f" {shown(self.get(name, 'missing'))}, not {wanted}"
        )


def _check_layers(numbers: _Numbers) -> None:
    n_layer = numbers.number("block_count", 1)
    if not 1 <= n_layer <= MAX_LAYERS:
        numbers.refuse("block_count", f"1 to {MAX_LAYERS}")
    if numbers.number("nextn_predict_layers") > n_layer:
        numbers.refuse("nextn_predict_layers", f"at most the {n_layer} of block_count")
    if not 0 <= numbers.number("context_length") < 2**31:  # llama_cpp makes an array of so many tokens for each text
        numbers.refuse("context_length", "0 or more, in 31 bits")


def _check_experts(numbers: _Numbers) -> None:
    n_expert, n_used = numbers.number("expert_count"), numbers.number("expert_used_count")
    if numbers.architecture.startswith("hunyuan") and n_expert <= 1:
        n_expert = n_used = 0
    if n_expert > MAX_EXPERTS:
        numbers.refuse("expert_count", f"at most {MAX_EXPERTS}")
    if not min(n_expert, 1) <= n_used <= n_expert:
        wanted = f"1 to the {n_expert} of expert_count" if n_expert else "0: the model has no experts"
        numbers.refuse("expert_used_count", wanted)
    n_group = numbers.number("expert_group_count")
    if n_group and (n_group >= n_expert or n_expert % n_group):
        numbers.refuse("expert_group_count", f"a smaller divisor of the {n_expert} of expert_count")
    if n_group > 1 and not 1 <= numbers.number("expert_group_used_count") < n_group:
        numbers.refuse("expert_group_used_count", f"1 to {n_group - 1}")


def _check_scalings(numbers: _Numbers) -> None:
    """Of RoPE, and of the norms."""
    scaling = numbers.get("rope.scaling.type", "linear")
    if isinstance(scaling, str) and scaling not in ROPE_SCALINGS:
        numbers.refuse("rope.scaling.type", f"one of {', '.join(ROPE_SCALINGS)}")
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon"):
        value = numbers.get(f"attention.{name}")
        if isinstance(value, float) and not value >= 0:
            numbers.refuse(f"attention.{name}", "0 or more")


def _check_heads(numbers: _Numbers) -> None:
    n_head = numbers.get("attention.head_count")
    n_head = n_head[0] if isinstance(n_head, list) and n_head else n_head
    if not isinstance(n_head, int) or n_head < 1:
        return
    head = numbers.number("embedding_length") // n_head
    n_key, n_value = numbers.number("attention.key_length", head), numbers.number("attention.value_length", head)
    n_rot = numbers.number("rope.dimension_count", n_key)
    if numbers.architecture in WHOLE_HEADS:
        if n_value != n_key:
            numbers.refuse("attention.value_length", f"the {n_key} of the keys")
        if n_rot != n_key:
            numbers.refuse("rope.dimension_count", f"the {n_key} of a head")
    elif numbers.get("rope.dimension_count") is not None and (n_rot % 2 or n_rot > max(n_key, n_value)):
        numbers.refuse("rope.dimension_count", f"an even number up to the {max(n_key, n_value)} of a head")
