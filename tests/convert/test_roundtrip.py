"""Every golden checkpoint, converted: the GGUF holds what the checkpoint holds, in every output type, from any source.

The expected tensors are computed here anew from the published ones, without the converter's code.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from golden_data import ARCHITECTURES, CASES
from pydeltamem.cli.main import main

every_golden = pytest.mark.parametrize(("arch", "case"), [(arch, case) for arch in ARCHITECTURES for case in CASES])

F32, F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16
TYPES = {"f16": F16, "bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def fields(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def values(reader):
    """Name to float32 values, rows first."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }


def interleaved(rows, n_head):
    """Rows in the order where RoPE turns neighbours: row 2j of a head is its row j, row 2j + 1 its row j + d/2."""
    head_dim = len(rows) // n_head
    order = [
        h * head_dim + j + half for h in range(n_head) for j in range(head_dim // 2) for half in (0, head_dim // 2)
    ]
    return rows[order]


class Published:
    """A golden checkpoint, and the adapter that docs/reference/formats.md makes of it."""

    def __init__(self, golden_dir, arch, case):
        self.directory, self.arch = golden_dir / arch / case, arch
        self.config = json.loads((self.directory / "delta_mem_config.json").read_text())
        self.tensors = {
            name: tensor.float().numpy()
            for name, tensor in torch.load(self.directory / "delta_mem_adapter.pt", weights_only=True).items()
        }
        self.model = json.loads((golden_dir / arch / "hf" / "config.json").read_text())

    @property
    def layers(self):
        return sorted(self.config["target_layers"]) or list(range(self.model["num_hidden_layers"]))

    @property
    def separate_lambda(self):
        return not self.config["couple_lambda"] and self.config["state_update_mode"] != "no_lambda"

    def expected(self):
        """The adapter's tensors by name, in float64."""
        config, result = self.config, {}
        for layer in self.layers:

            def get(name, layer=layer):
                return self.tensors[f"model.layers.{layer}.self_attn.{name}"].astype(np.float64)

            parts = ["memory_q_proj", "memory_k_proj", "memory_v_proj", "beta_proj"]
            bias = [get("beta_bias")]
            if self.separate_lambda:
                parts.append("lambda_proj")
                bias.append(get("lambda_bias"))
            result[f"blk.{layer}.deltamem_in.weight"] = np.vstack([get(name) for name in parts])
            result[f"blk.{layer}.deltamem_gate.bias"] = np.hstack(bias)
            for head in config["delta_heads"]:
                scale = config["alpha"] / config["rank"]
                if config["trainable_delta_scale"]:
                    raw = get("delta_scale_raw")
                    raw = raw["qkvo".index(head)] if config["delta_scale_granularity"] == "head" else raw[0]
                    scale *= config["delta_scale_max"] * float(torch.sigmoid(torch.tensor(raw)))
                delta = scale * get(f"delta_{head}_proj")
                if self.arch == "smollm3" and head in "qk":
                    n_head = self.model["num_attention_heads" if head == "q" else "num_key_value_heads"]
                    delta = interleaved(delta, n_head)
                result[f"blk.{layer}.deltamem_{head}.weight"] = delta
            if config["delta_o_rmsnorm"]:
                result[f"blk.{layer}.deltamem_o_norm.weight"] = get("delta_o_rmsnorm_weight")
        return result


@pytest.fixture
def published(golden_dir):
    return lambda arch, case: Published(golden_dir, arch, case)


@every_golden
def test_tensors_in_f32(published, adapter, arch, case):
    expected, reader = published(arch, case).expected(), gguf.GGUFReader(adapter(arch, case))
    assert {tensor.tensor_type for tensor in reader.tensors} == {F32}
    actual = values(reader)
    assert set(actual) == set(expected)
    for name, want in expected.items():
        if name.endswith(("deltamem_in.weight", "bias", "norm.weight")):  # as they are
            np.testing.assert_array_equal(actual[name], want.astype(np.float32), err_msg=name)
        else:  # a product with the scale: rounded once
            np.testing.assert_allclose(actual[name], want, rtol=2e-7, atol=0, err_msg=name)


@every_golden
def test_keys(published, adapter, arch, case):
    source = published(arch, case)
    config = source.config
    expected = {
        "general.type": "adapter",
        "general.architecture": arch,
        "general.name": case,
        "general.file_type": 0,
        "general.quantization_version": 2,
        "adapter.type": "deltamem",
        "deltamem.version": 1,
        "deltamem.rank": config["rank"],
        "deltamem.head_count": config["num_state_heads"],
        "deltamem.alpha": config["alpha"],
        "deltamem.update_mode": config["state_update_mode"],
        "deltamem.couple_lambda": config["couple_lambda"],
        "deltamem.rankwise_gates": config["rankwise_gates"],
        "deltamem.normalize_qk": config["normalize_qk"],
        "deltamem.write_granularity": config["memory_write_granularity"],
        "deltamem.delta_heads": config["delta_heads"],
        "deltamem.layers": source.layers,
        "deltamem.base.embedding_length": source.model["hidden_size"],
        "deltamem.base.block_count": source.model["num_hidden_layers"],
        "deltamem.source.name": "delta_mem_adapter.pt",
        "deltamem.source.sha256": hashlib.sha256((source.directory / "delta_mem_adapter.pt").read_bytes()).hexdigest(),
    }
    if config["delta_o_rmsnorm"]:
        expected["deltamem.o_norm_epsilon"] = np.float32(config["delta_o_rmsnorm_eps"])
    reader = gguf.GGUFReader(adapter(arch, case))
    assert fields(reader) == expected

    kinds = gguf.GGUFValueType
    types = {key: reader.fields[key].types for key in expected}
    assert types["deltamem.version"] == [kinds.UINT32]
    assert types["deltamem.rank"] == [kinds.UINT32]
    assert types["deltamem.alpha"] == [kinds.FLOAT32]
    assert types["deltamem.couple_lambda"] == [kinds.BOOL]
    assert types["deltamem.layers"] == [kinds.ARRAY, kinds.UINT32]
    assert types["deltamem.delta_heads"] == [kinds.ARRAY, kinds.STRING]
    if config["delta_o_rmsnorm"]:
        assert types["deltamem.o_norm_epsilon"] == [kinds.FLOAT32]


def test_the_golden_cases_are_all_here(golden_dir):
    """A new case must join the tests above; between them they use every option."""
    for arch in ARCHITECTURES:
        assert sorted(folder.name for folder in (golden_dir / arch).iterdir() if folder.name in CASES) == sorted(CASES)
        others = {file.parent.name for file in (golden_dir / arch).glob("*/delta_mem_config.json")} - set(CASES)
        assert not others


@pytest.mark.parametrize("outtype", TYPES)
@every_golden
def test_output_types(published, adapter, arch, case, outtype):
    expected = published(arch, case).expected()
    reader = gguf.GGUFReader(adapter(arch, case, outtype))
    assert fields(reader)["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[outtype]
    kinds, actual = {tensor.name: tensor.tensor_type for tensor in reader.tensors}, values(reader)
    assert set(actual) == set(expected)
    for name, want in expected.items():
        if name.endswith(("bias", "norm.weight")):
            assert kinds[name] == F32, name
        elif outtype == "q8_0" and want.shape[1] % 32:
            assert kinds[name] == F16, name
        else:
            assert kinds[name] == TYPES[outtype], name

        if kinds[name] == F32:
            np.testing.assert_array_equal(actual[name], want.astype(np.float32), err_msg=name)
        elif kinds[name] == TYPES["q8_0"]:  # half a step of the block's scale, and that scale's own rounding
            step = np.abs(want).reshape(len(want), -1, 32).max(axis=2, keepdims=True) / 127
            error = np.abs(actual[name] - want).reshape(len(want), -1, 32)
            assert (error <= 0.5 * step + 127 * step * 2**-10).all(), name
        else:  # half a unit in the last place: 11 and 8 bits of significand; F16 has subnormals from 6e-5
            bits = 11 if kinds[name] == F16 else 8
            np.testing.assert_allclose(actual[name], want, rtol=1.01 * 2**-bits, atol=2**-24, err_msg=name)
    if outtype == "q8_0":
        assert TYPES["q8_0"] in kinds.values()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("arch", "case"), [("qwen3", "o_rmsnorm_scale_head"), ("smollm3", "qkvo_lambda_outside")])
def test_safetensors(golden_dir, tmp_path, arch, case, dtype):
    """The same values give the same file from .pt and .safetensors, apart from what names the source."""
    source, base = golden_dir / arch / case, golden_dir / arch / "base-f32.gguf"
    weights = torch.load(source / "delta_mem_adapter.pt", weights_only=True)
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in weights.items()}
    readers = {}
    for suffix, save in ((".pt", torch.save), (".safetensors", safetensors.torch.save_file)):
        directory = tmp_path / suffix[1:] / case
        directory.mkdir(parents=True)
        shutil.copy(source / "delta_mem_config.json", directory)
        save(weights, directory / f"delta_mem_adapter{suffix}")
        out = tmp_path / f"{suffix[1:]}.gguf"
        assert main(["convert", str(directory), "--base", str(base), "-o", str(out)]) == 0
        readers[suffix] = gguf.GGUFReader(out)
        recorded = fields(readers[suffix])
        assert recorded["deltamem.source.name"] == f"delta_mem_adapter{suffix}"
        digest = hashlib.sha256((directory / f"delta_mem_adapter{suffix}").read_bytes()).hexdigest()
        assert recorded["deltamem.source.sha256"] == digest

    a, b = (fields(reader) for reader in readers.values())
    for recorded in (a, b):
        del recorded["deltamem.source.name"], recorded["deltamem.source.sha256"]
    assert a == b
    a, b = (values(reader) for reader in readers.values())
    assert list(a) == list(b)
    for name, tensor in a.items():
        np.testing.assert_array_equal(tensor, b[name], err_msg=name)
    if dtype == "float32":
        for name, want in Published(golden_dir, arch, case).expected().items():
            np.testing.assert_allclose(a[name], want, rtol=2e-7, atol=0, err_msg=name)


def test_any_base_will_do(golden_dir, adapter, tmp_path):
    """A quantised base and the name option change no tensor."""
    base = tmp_path / "base-q8_0.gguf"
    reader = gguf.GGUFReader(golden_dir / "smollm3" / "base-f32.gguf")
    writer = gguf.GGUFWriter(base, "smollm3")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        kind = F32 if tensor.data.ndim == 1 else TYPES["q8_0"]
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    out, case = tmp_path / "out.gguf", "qkvo_lambda_outside"
    arguments = ["convert", golden_dir / "smollm3" / case, "--base", base, "-o", out, "--name", "mine"]
    assert main([str(argument) for argument in arguments]) == 0
    a, b = gguf.GGUFReader(adapter("smollm3", case)), gguf.GGUFReader(out)
    assert fields(b) == {**fields(a), "general.name": "mine"}
    for name, tensor in values(a).items():
        np.testing.assert_array_equal(values(b)[name], tensor, err_msg=name)


def test_replies_that_are_deferred(golden_dir, adapter, checkpoint, tmp_path, capsys):
    """Only the key changes. What defers its writes already, or has segments, is refused and leaves no file."""
    out, arguments = tmp_path / "out.gguf", ["--base", str(golden_dir / "qwen3" / "base-f32.gguf"), "--defer-replies"]
    assert main(["convert", str(golden_dir / "qwen3" / "msw4_qo"), *arguments, "-o", str(out)]) == 0
    a, b = gguf.GGUFReader(adapter("qwen3", "msw4_qo")), gguf.GGUFReader(out)
    assert fields(b) == {**fields(a), "deltamem.write_granularity": "reply_deferred"}
    for name, tensor in values(a).items():
        np.testing.assert_array_equal(values(b)[name], tensor, err_msg=name)
    for case in ("ssw_message", "msw4_deferred"):
        capsys.readouterr()
        folder = checkpoint("qwen3", case)
        assert main(["convert", str(folder), *arguments, "-o", str(tmp_path / "none.gguf")]) == 1
        sentence = capsys.readouterr().err
        assert "--defer-replies" in sentence and str(folder) in sentence
        assert not (tmp_path / "none.gguf").exists()
