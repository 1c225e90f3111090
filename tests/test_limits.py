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


@pytest.fixture(scope="module")
def sliding(tmp_path_factory) -> Path:
    """A Gemma 3 all of whose layers slide: the tiny Qwen3 with the norms that Gemma 3 has besides."""
    path = tmp_path_factory.mktemp("gemma3") / "sliding.gguf"
    reader = gguf.GGUFReader(TINY)
    writer = gguf.GGUFWriter(path, "gemma3")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name.replace("qwen3.", "gemma3."), field.contents(), kind, sub)
    writer.add_uint32("gemma3.attention.sliding_window", 512)
    n_layer = 0
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        n_layer += tensor.name.endswith("attn_norm.weight")
        width = len(tensor.data) if tensor.name.endswith("output_norm.weight") else 0
        for i in range(n_layer if width else 0):
            for norm in ("post_attention_norm", "post_ffw_norm"):
                writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert n_layer < 6  # of six layers Gemma 3's sixth is one of full attention
    return path


def test_a_model_that_slides_throughout_forgets_its_oldest_turns(sliding):
    code = f"""
from pydeltamem import Conversation
llm = DeltaMemLlama({str(sliding)!r}, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
talk = Conversation(llm)
for _ in range(12):
    talk.say("one two three four five", n_predict=8)
print(len(talk.messages) < 24)
"""
    assert outcome(code) == "True"
