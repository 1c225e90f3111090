"""Cases in which an assertion of llama.cpp would end the process: we refuse them first, or avoid them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from pydeltamem.bench.synthetic import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny" / "base.gguf"
DEFAULT = ROOT / "pydeltamem" / "models" / "default.gguf"


def outcome(code: str) -> str:
    """What is printed by code that may end the process; that it did not is checked."""
    script = f"from pydeltamem import DeltaMemError, DeltaMemLlama\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRY_TYPES = """
for type in {types}:
    try:
        llm = DeltaMemLlama({model!r}, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False, {options})
        llm.eval([1, 2, 3])
        llm.close()
    except DeltaMemError as error:
        assert {option!r} in str(error), error
        print(type, end=" ")
"""

# enum ggml_type: all that are, were or will be
CACHE_TYPES = {0, 1, 2, 3, 6, 7, 8, 20, 30, 39, 40}  # f32 f16 q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl bf16 mxfp4 nvfp4
OTHERS = [n for n in range(-2, 64) if n not in CACHE_TYPES] + [10**6]


@pytest.mark.parametrize("option", ["type_k", "type_v"])
def test_cache_types(option):
    """Of the types that a cache may have all do where a head has 64 values; of the others none does."""
    types = [*OTHERS, *sorted(CACHE_TYPES)]
    options = f"{option}=type, flash_attn=True"
    refused = outcome(TRY_TYPES.format(types=types, model=str(DEFAULT), options=options, option=option))
    assert refused.split() == [str(n) for n in OTHERS]


@pytest.mark.parametrize("n_head_kv", [1, 2])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_cache_types_of_blocks_that_heads_do_not_fill(tmp_path, n_head_kv, flash_attn):
    """Heads of 48 values, one or two in a row."""
    model = tmp_path / "model.gguf"
    write_model(model, Shape("qwen3", 2, 64, 4, n_head_kv, 48, 64, n_ctx=256), TINY, "f32")
    options = f"type_k=type, flash_attn={flash_attn}"
    refused = outcome(TRY_TYPES.format(types=[8, 1, 2, 30, 20], model=str(model), options=options, option="type_k"))
    assert refused.split() == ["8", "2", "20"]


def test_pooling_types():
    options = "pooling_type=type, embedding=True"
    refused = outcome(TRY_TYPES.format(types=[-2, 0, 1, 3, 5, 99], model=str(TINY), options=options, option="pooling"))
    assert refused.split() == ["-2", "5", "99"]


def write_as(path: Path, architecture: str, tensors: dict[str, np.ndarray], **keys: int) -> Path:
    """A model of another architecture: these float32 tensors, and the keys of the tiny Qwen3 but for `keys`."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in gguf.GGUFReader(TINY).fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name.removeprefix("qwen3.") in keys:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("qwen3.", f"{architecture}."), field.contents(), kind, sub)
    for name, number in keys.items():
        writer.add_uint32(f"{architecture}.{name}", number)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sliding(tmp_path_factory) -> Path:
    """A Gemma 3 all of whose layers slide: the tiny Qwen3 with the norms that Gemma 3 has besides."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(TINY).tensors}
    n_layer = sum(name.endswith("attn_norm.weight") for name in tensors)
    assert n_layer < 6  # of six layers Gemma 3's sixth is one of full attention
    for i in range(n_layer):
        for norm in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{i}.{norm}.weight"] = np.ones_like(tensors["output_norm.weight"])
    path = tmp_path_factory.mktemp("gemma3") / "sliding.gguf"
    return write_as(path, "gemma3", tensors, **{"attention.sliding_window": 512})


@pytest.fixture(scope="module")
def rotated_in_part(tmp_path_factory) -> Path:
    """A Phi 3 of one layer, random, that rotates half of each head."""
    rng = np.random.default_rng(0)
    n_vocab = next(t for t in gguf.GGUFReader(TINY).tensors if t.name == "token_embd.weight").data.shape[0]
    shapes = {
        "token_embd": (n_vocab, 128), "output_norm": (128,), "blk.0.attn_norm": (128,), "blk.0.ffn_norm": (128,),
        "blk.0.attn_q": (128, 128), "blk.0.attn_k": (64, 128), "blk.0.attn_v": (64, 128),
        "blk.0.attn_output": (128, 128), "blk.0.ffn_up": (64, 128), "blk.0.ffn_down": (128, 32),
    }  # fmt: skip
    tensors = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    keys = {
        "block_count": 1, "embedding_length": 128, "feed_forward_length": 32, "rope.dimension_count": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.key_length": 64, "attention.value_length": 64,
    }  # fmt: skip
    return write_as(tmp_path_factory.mktemp("phi3") / "part.gguf", "phi3", tensors, **keys)


TALK = """
from pydeltamem import Conversation
llm = DeltaMemLlama({model!r}, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, {options})
talk = Conversation(llm)
for _ in range(12):
    talk.say("one two three four five", n_predict=8)
print(len(talk.messages) < 24)
"""


def test_a_model_that_slides_throughout_forgets_its_oldest_turns(sliding):
    assert outcome(TALK.format(model=str(sliding), options="")) == "True"


@pytest.mark.parametrize("type_k", [1, 8, 30])  # f16 q8_0 bf16
def test_keys_that_cannot_be_rotated_are_computed_again(rotated_in_part, type_k):
    options = f"type_k={type_k}, flash_attn=True"
    assert outcome(TALK.format(model=str(rotated_in_part), options=options)) == "True"
