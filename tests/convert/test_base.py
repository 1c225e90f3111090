"""What the converter takes from a base model: the order of its rows, sizes of every layer, fused and split files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy

from pydeltamem.convert.hf import converter
from pydeltamem.errors import ModelError
from pydeltamem.formats.base_model import IN_ORDER, PERMUTED, RESCALED, Base, converts
from refusals import refuses

KEYS = {"block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
TENSORS = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}


def write(path, architecture="qwen3", keys=KEYS, tensors=TENSORS, layers=(0, 1), split=None):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", 2 * len(tensors))
    for layer in layers:
        for name, rows in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros((rows, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["qwen3", "smollm3"])
def test_row_order_is_that_of_the_base(golden_dir, arch):
    """Rows of the Hugging Face model's q and k in our order equal those that llama.cpp's own converter wrote."""
    model = safetensors.numpy.load_file(golden_dir / arch / "hf" / "model.safetensors")
    path = golden_dir / arch / "base-f32.gguf"
    base, tensors = Base(path), {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for layer in range(base.n_layer):
        for head in "qkvo":
            rows = model[f"model.layers.{layer}.self_attn.{head}_proj.weight"]
            name = "attn_output" if head == "o" else f"attn_{head}"
            expected = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(base.permute(head, layer, rows), expected)
            assert base.layers[layer].rows(head) == len(rows)
            if arch == "smollm3" and head in "qk":
                assert (rows != expected).any()


def test_the_orders_are_those_of_the_converter():
    """As each of its classes treats rows: those that read a Hugging Face model of a listed architecture."""
    script = Path(__file__).parents[2] / "tools" / "converter_rows.py"
    command = [sys.executable, str(script), str(converter().parent)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for name in (
        "UltravoxModel",  # refuses every model
        "MistralModel",  # reads Mistral's own files, whose rows are in llama.cpp's order already
        "Mistral3Model",  # leaves it to Ministral3Model
        "LFM2ColBertModel",  # no decoder
    ):
        assert sum(classes.pop(name, None) is not None for classes in found.values()) == 1, name
    # which Base tells apart by a key
    assert [found["glm4"].pop(f"{name} with M-RoPE")["q"] for name in ("Glm4Model", "GlmOCRModel")] == ["other"] * 2
    assert not PERMUTED & IN_ORDER
    for order, architectures in (("permuted", PERMUTED), ("in order", IN_ORDER)):
        expected = {"q": order, "k": order, "v": "in order", "o": "in order"}
        for architecture in architectures:
            assert found[architecture]
            for name, got in found[architecture].items():
                assert got == expected, f"{architecture}: {name}"
    for architecture in RESCALED:
        assert "other" in [got["v"] for got in found[architecture].values()]


@pytest.mark.parametrize(
    ("architecture", "more"), [("newarch", {}), ("glm4", {"rope.dimension_sections": [8, 8, 0, 0]})]
)
def test_unknown_order(tmp_path, architecture, more):
    """q and k of an architecture whose order nobody stated are refused by name; v and o need none."""
    base = Base(write(tmp_path / "base.gguf", architecture, {**KEYS, **more}))
    rows = np.ones((64, 8), np.float32)
    for head in "qk":
        with refuses(ModelError, tmp_path / "base.gguf", architecture):
            base.permute(head, 0, rows)
    for head in "vo":
        assert base.permute(head, 0, rows) is rows
    if more:
        base = Base(write(tmp_path / "text.gguf", architecture))
        assert base.permute("q", 0, rows) is rows
    assert converts(architecture) == ("qkvo" if more else "vo")


def test_rescaled_weights(tmp_path):
    """Falcon-H1: nothing can be converted, for the memory's own weights would be wrong."""
    base = Base(write(tmp_path / "base.gguf", "falcon-h1"))
    for head in "qkvo":
        with refuses(ModelError, tmp_path / "base.gguf", "falcon-h1"):
            base.permute(head, 0, np.ones((64, 8), np.float32))
    assert converts("falcon-h1") == ""


def test_heads_per_layer(tmp_path):
    keys = {**KEYS, "attention.head_count": [4, 8], "attention.head_count_kv": [2, 1]}
    base = Base(write(tmp_path / "base.gguf", "llama", keys))
    assert [(layer.n_head, layer.n_head_kv) for layer in base.layers] == [(4, 2), (8, 1)]
    rows = np.arange(64, dtype=np.float32)[:, None]
    first, second = (base.permute("q", layer, rows)[:, 0].astype(int).tolist() for layer in (0, 1))
    assert first[:16] == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert second[:16] == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert base.permute("k", 1, rows[:32])[:4, 0].astype(int).tolist() == [0, 16, 1, 17]


def test_fused_projections(tmp_path):
    keys = {**KEYS, "attention.key_length": 32, "attention.value_length": 16}
    base = Base(write(tmp_path / "base.gguf", keys=keys, tensors={"attn_qkv": 128 + 64 + 32, "attn_output": 64}))
    assert [base.layers[1].rows(head) for head in "qkvo"] == [128, 64, 32, 64]


def test_layer_without_attention(tmp_path):
    base = Base(write(tmp_path / "base.gguf", layers=(1,)))
    assert [base.layers[0].rows(head) for head in "qkvo"] == [0, 0, 0, 0]
    assert [base.layers[1].rows(head) for head in "qkvo"] == [64, 32, 32, 64]
    assert [layer.has_attention for layer in base.layers] == [False, True]


def test_layer_with_linear_attention(tmp_path):
    """Qwen3-Next has a fused projection there too, and another one for the output."""
    base = Base(write(tmp_path / "base.gguf", tensors={"attn_qkv": 128, "ssm_out": 64}))
    assert not any(layer.has_attention or layer.rows("q") for layer in base.layers)


def test_layers_that_predict_further_tokens(tmp_path):
    """They are counted in the file, and are no layers of the model to llama.cpp."""
    base = Base(write(tmp_path / "base.gguf", keys={**KEYS, "nextn_predict_layers": 1}))
    assert base.n_layer == len(base.layers) == 1
    with refuses(ModelError, tmp_path / "base.gguf", "0 layers"):
        Base(write(tmp_path / "base.gguf", keys={**KEYS, "nextn_predict_layers": 2}))


def test_split_model(tmp_path):
    first = write(tmp_path / "base-00001-of-00002.gguf", layers=(0,), split=(0, 2))
    second = write(tmp_path / "base-00002-of-00002.gguf", keys={}, layers=(1,), split=(1, 2))
    assert [layer.n_q for layer in Base(first).layers] == [64, 64]
    second.unlink()
    with refuses(ModelError, second):
        Base(first)
    write(second, keys={}, layers=(1,), split=(0, 2))
    with refuses(ModelError, second, "part 2 of 2", first):
        Base(first)
    write(second, keys={}, layers=(0,), split=(1, 2))
    with refuses(ModelError, second, "blk.0.attn_k.weight"):
        Base(first)
    write(second, keys={}, layers=(), split=(1, 2))
    with refuses(ModelError, first, "2 parts", "4 tensors", 8):
        Base(first)
    other = write(tmp_path / "part.gguf", layers=(1,), split=(1, 2))
    with refuses(ModelError, other, "...-00001-of-00002.gguf"):
        Base(other)


@pytest.mark.parametrize("missing", ["block_count", "embedding_length", "attention.head_count"])
def test_missing_key(tmp_path, missing):
    keys = {key: value for key, value in KEYS.items() if key != missing}
    with refuses(ModelError, tmp_path / "base.gguf", f"qwen3.{missing}"):
        Base(write(tmp_path / "base.gguf", keys=keys))


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"block_count": [2, 2]}, ["block_count", "[2, 2]"]),
        ({"block_count": 0}, ["0 layers"]),
        ({"block_count": 1 << 31}, ["2147483648 layers"]),
        ({"attention.head_count": [4]}, ["qwen3.attention.head_count", "1 values", "2 layers"]),
    ],
)
def test_sizes_that_cannot_be(tmp_path, keys, names):
    with refuses(ModelError, tmp_path / "base.gguf", *names):
        Base(write(tmp_path / "base.gguf", keys={**KEYS, **keys}))


@pytest.mark.parametrize("n_head", [0, 3, 1 << 31])
def test_rows_that_are_not_the_heads(tmp_path, n_head):
    base = Base(write(tmp_path / "base.gguf", "llama", {**KEYS, "attention.head_count_kv": n_head}))
    with refuses(ModelError, tmp_path / "base.gguf", "32 rows of k", "layer 1", f"{n_head} heads"):
        base.permute("k", 1, np.ones((32, 8), np.float32))
