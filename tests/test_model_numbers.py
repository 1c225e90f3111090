"""Numbers in a model's header for which llama.cpp would end the process: we refuse them first, by key and value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from pydeltamem.errors import ModelError
from pydeltamem.formats.model_numbers import check_numbers
from refusals import refuses

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny" / "base.gguf"  # Qwen3, 4 layers, heads of 32
EXPERTS = {"expert_count": 4, "expert_used_count": 2}

BAD = [
    ({"block_count": 0}, "block_count"),
    ({"block_count": 513}, "block_count"),
    ({"block_count": 100000}, "block_count"),
    ({"context_length": 2**31}, "context_length"),
    ({"nextn_predict_layers": 50}, "nextn_predict_layers"),
    ({"expert_count": 2**31, "expert_used_count": 2}, "expert_count"),
    ({"expert_used_count": 2}, "expert_used_count"),
    ({"expert_count": 4}, "expert_used_count"),
    ({"expert_count": 4, "expert_used_count": 5}, "expert_used_count"),
    ({"expert_count": 4, "expert_used_count": [1, 1, 1, 5]}, "expert_used_count"),
    ({"expert_group_count": 2}, "expert_group_count"),
    ({**EXPERTS, "expert_group_count": 4}, "expert_group_count"),
    ({**EXPERTS, "expert_group_count": 3}, "expert_group_count"),
    ({**EXPERTS, "expert_group_count": 2}, "expert_group_used_count"),
    ({**EXPERTS, "expert_group_count": 2, "expert_group_used_count": 2}, "expert_group_used_count"),
    ({"rope.dimension_count": 8}, "rope.dimension_count"),
    ({"rope.dimension_count": 0}, "rope.dimension_count"),
    ({"rope.dimension_count": 2**20}, "rope.dimension_count"),
    ({"rope.scaling.type": "odd"}, "rope.scaling.type"),
    ({"attention.layer_norm_rms_epsilon": -1.0}, "attention.layer_norm_rms_epsilon"),
    ({"attention.layer_norm_rms_epsilon": float("nan")}, "attention.layer_norm_rms_epsilon"),
]

GOOD = [
    {},
    EXPERTS,  # without effect in a dense architecture
    {"expert_count": 4, "expert_used_count": [2, 2, 2, 2]},
    {"rope.dimension_count": 32},
    {"rope.scaling.type": "yarn"},
    {"attention.layer_norm_rms_epsilon": 0.0},
]


@pytest.fixture
def write(tmp_path):
    """write(changes): the small model with other keys."""

    def write(changes):
        path, reader = tmp_path / "model.gguf", gguf.GGUFReader(TINY)
        writer = gguf.GGUFWriter(path, "qwen3")
        changed = {f"qwen3.{key}": value for key, value in changes.items()}
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key != "general.architecture" and key not in changed:
                kind, *sub = field.types
                writer.add_key_value(key, field.contents(), kind, sub[-1] if sub else None)
        kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, list: gguf.GGUFValueType.ARRAY}
        for key, value in changed.items():
            kind = kinds.get(type(value), gguf.GGUFValueType.UINT32)
            writer.add_key_value(key, value, kind, gguf.GGUFValueType.UINT32 if isinstance(value, list) else None)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


TRY = """
import sys
from pydeltamem import DeltaMemLlama, ModelError
from pydeltamem.runtime.quantize import quantize

def load(path, **options):
    llm = DeltaMemLlama(path, n_ctx=256, n_threads=1, n_threads_batch=1, **options)
    llm.eval([1, 2, 3])
    llm.close()

path, target = sys.argv[1:3]
for use in (lambda: load(path), lambda: quantize(path, target, "q8_0")):
    try:
        use()
        print("works")
    except ModelError as error:
        print(error)
"""


def outcome(*arguments, code=TRY):
    """The lines that are printed by code that may end the process; that it did not is checked."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("changes", "key"), BAD, ids=str)
def test_bad_numbers(write, tmp_path, changes, key):
    path = write(changes)
    said = outcome(path, tmp_path / "quantized.gguf")
    value = changes.get(key, "missing")
    assert len(said) == 2 and all(str(path) in line and f"qwen3.{key} is {value}" in line for line in said), said


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_good_numbers(write, tmp_path, changes):
    assert outcome(write(changes), tmp_path / "quantized.gguf") == ["works", "works"]


HEADS = {"attention.head_count": 4, "embedding_length": 128}  # of 32


@pytest.mark.parametrize(
    ("architecture", "changes", "key"),
    [
        ("qwen3", {"attention.key_length": 32, "attention.value_length": 16}, "attention.value_length"),
        ("gemma3", {"context_length": -5}, "context_length"),  # by an override
        ("gemma3", {"rope.dimension_count": 31}, "rope.dimension_count"),
        ("gemma3", {"rope.dimension_count": 34}, "rope.dimension_count"),
        ("hunyuan-moe", {"expert_count": 2, "expert_used_count": 3}, "expert_used_count"),
    ],
)
def test_bad_numbers_of_an_architecture(architecture, changes, key):
    keys = {f"{architecture}.{name}": value for name, value in {**HEADS, **changes}.items()}
    with refuses(ModelError, "a.gguf", f"{architecture}.{key}", changes[key]):
        check_numbers("a.gguf", {"general.architecture": architecture, **keys})


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma3", {"rope.dimension_count": 16}),
        ("hunyuan-dense", {"expert_count": 1, "expert_used_count": 8}),  # one expert is none
    ],
)
def test_good_numbers_of_an_architecture(architecture, changes):
    keys = {f"{architecture}.{name}": value for name, value in {**HEADS, **changes}.items()}
    check_numbers("a.gguf", {"general.architecture": architecture, **keys})


def test_overrides(write):
    """What counts is what llama.cpp will read."""
    code = (
        TRY.partition("path, target")[0]
        + """
for path, value in (sys.argv[1], 0), (sys.argv[2], 4):
    try:
        load(path, kv_overrides={"qwen3.block_count": value})
        print("works")
    except ModelError as error:
        print(error)
"""
    )
    good = TINY
    bad = write({"block_count": 0})
    refused, works = outcome(good, bad, code=code)
    assert "qwen3.block_count is 0" in refused and works == "works"
