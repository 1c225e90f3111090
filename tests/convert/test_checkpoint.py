"""Reading a checkpoint: with and without PyTorch, tensors that have no effect, values that no output type can hold."""

from __future__ import annotations

import json
import os
import shutil
import sys

import gguf
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import CheckpointError, InputError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import Checkpoint
from pydeltamem.formats.gguf_header import Header
from refusals import refuses

CONFIG, PT, SAFETENSORS = "delta_mem_config.json", "delta_mem_adapter.pt", "delta_mem_adapter.safetensors"
LAYER = "model.layers.1.self_attn."


@pytest.fixture
def copy(golden_dir, tmp_path):
    """copy(case, change=None, kind=PT): a golden Qwen3 checkpoint whose state dict `change` has edited."""

    def make(case, change=lambda tensors: None, kind=PT):
        source, directory = golden_dir / "qwen3" / case, tmp_path / "checkpoint"
        directory.mkdir()
        shutil.copy(source / CONFIG, directory)
        tensors = torch.load(source / PT, weights_only=True)
        change(tensors)
        if kind == PT:
            torch.save(tensors, directory / PT)
        else:
            arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
            safetensors.numpy.save_file(arrays, directory / SAFETENSORS)
        return directory

    return make


@pytest.fixture
def convert(base, tmp_path):
    """convert(directory, outtype="f32"): the tensors of the adapter made from it."""

    def run(directory, outtype="f32"):
        out = tmp_path / "out.gguf"
        write_adapter(Checkpoint(directory), Base(base()), out, outtype)
        return {tensor.name: tensor.data for tensor in gguf.GGUFReader(out).tensors}

    return run


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_without_pytorch(copy, convert, monkeypatch):
    """A .pt needs it, and the sentence says how to get it; a .safetensors, also one beside a .pt, does not."""
    directory = copy("tsw_qo")
    expected = convert(directory)
    arrays = {name: tensor.numpy() for name, tensor in torch.load(directory / PT, weights_only=True).items()}

    monkeypatch.setitem(sys.modules, "torch", None)  # import torch: ImportError
    with refuses(CheckpointError, directory / PT, "pydeltamem[convert]", SAFETENSORS):
        convert(directory)
    safetensors.numpy.save_file(arrays, directory / SAFETENSORS)
    assert Checkpoint(directory).path.name == SAFETENSORS
    assert_equal(convert(directory), expected)
    monkeypatch.undo()
    assert Checkpoint(directory).path.name == PT  # the published file comes first


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
def test_names_that_are_no_text(copy, base, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.move(copy("tsw_qo"), folder)
    for name, kept in ((None, "caf�"), ("a\udce9", "a�"), ("\ud800", "?")):
        write_adapter(Checkpoint(folder), Base(base()), tmp_path / "out.gguf", name=name)
        assert Header(tmp_path / "out.gguf").keys["general.name"] == kept


@pytest.mark.parametrize(("kind", "what"), [(PT, PT), (SAFETENSORS, SAFETENSORS), (PT, CONFIG)])
def test_what_may_not_be_read_is_not_damaged(copy, monkeypatch, kind, what):
    directory = copy("tsw_qo", kind=kind)
    (directory / what).unlink()
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    monkeypatch.setattr("pathlib.Path.is_file", lambda path: path.name == what)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(directory / what))

    monkeypatch.setattr("torch.load", refuse)
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    if what == CONFIG:
        monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with refuses(CheckpointError, directory / what, "Permission denied"):
        Checkpoint(directory)


def test_lambda_without_an_effect(copy, convert):
    """With no_lambda a projection for λ is no part of the memory, and may be there."""
    directory = copy("no_lambda_raw_qk")
    expected = convert(directory)
    fields = {**json.loads((directory / CONFIG).read_text()), "couple_lambda": False}
    (directory / CONFIG).write_text(json.dumps(fields))
    tensors = torch.load(directory / PT, weights_only=True)
    tensors.update({f"{LAYER}lambda_proj": torch.ones(16, 96), f"{LAYER}lambda_bias": torch.ones(16)})
    torch.save(tensors, directory / PT)
    assert_equal(convert(directory), expected)


def test_corrections_that_are_off(copy, convert, adapter):
    """A published checkpoint has projections for heads that are not corrected: they change nothing."""

    def change(tensors):
        assert f"{LAYER}delta_v_proj" in tensors
        tensors[f"{LAYER}delta_v_proj"] = torch.ones(64, 8)

    published = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter("qwen3", "tsw_qo")).tensors}
    assert_equal(convert(copy("tsw_qo", change)), published)


def test_a_norm_of_corrections_that_are_off(copy, convert):
    """It goes with the corrections of o."""
    directory = copy("o_rmsnorm_scale_head")
    config = json.loads((directory / "delta_mem_config.json").read_text())
    assert any("o_norm" in name for name in convert(directory))
    (directory / "delta_mem_config.json").write_text(json.dumps({**config, "delta_heads": ["q"]}))
    names = {name.partition(".deltamem_")[2] for name in convert(directory)}
    assert names == {"in.weight", "gate.bias", "q.weight"}


def test_float64(copy, convert):
    """Rounded to float32."""
    exact = np.linspace(-1, 1, 8)

    def change(tensors):
        tensors[f"{LAYER}beta_bias"] = torch.from_numpy(exact)

    bias = convert(copy("tsw_qo", change, SAFETENSORS))["blk.1.deltamem_gate.bias"]
    np.testing.assert_array_equal(bias, exact.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_number_of_eight_bits(copy, dtype):
    directory = copy("tsw_qo")
    (directory / PT).unlink()
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    safetensors.torch.save_file({"numbers": numbers}, directory / SAFETENSORS)
    np.testing.assert_array_equal(Checkpoint(directory).tensors["numbers"], numbers.float().numpy())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [PT, SAFETENSORS])
def test_float64_beyond_float32(copy, convert, kind):
    def change(tensors):
        tensors[f"{LAYER}beta_bias"] = torch.full((8,), 1e300, dtype=torch.float64)

    directory = copy("tsw_qo", change, kind)
    with refuses(CheckpointError, directory / kind, f"tensor {LAYER}beta_bias", "finite"):
        convert(directory)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("outtype", "value"), [("f16", 7e4), ("q8_0", 1e7)])
def test_beyond_the_output_type(copy, convert, outtype, value):
    directory = copy("tsw_qo", lambda tensors: tensors[f"{LAYER}memory_q_proj"].view(-1)[:1].fill_(value))
    with refuses(CheckpointError, directory / PT, "blk.1.deltamem_in.weight", "--outtype f32 or bf16"):
        convert(directory, outtype)
    assert convert(directory)["blk.1.deltamem_in.weight"].flat[0] == np.float32(value)
    convert(directory, "bf16")


@pytest.mark.parametrize("kind", [PT, SAFETENSORS])
def test_output_over_the_weights(copy, base, kind):
    path = copy("tsw_qo", kind=kind) / kind
    before = path.read_bytes()
    with refuses(InputError, path):
        write_adapter(Checkpoint(path.parent), Base(base()), path)
    assert path.read_bytes() == before
