"""Damaged δ-mem checkpoints: refused by the package's errors, or converted to an adapter that can be read."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

import inputs  # noqa: F401 - how many
from damage import damaged
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import CheckpointError, ModelError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint
from pydeltamem.formats.gguf_header import Header
from small import BASE, MEMORY

FIELDS = {"rank": 2, "alpha": 4.0, "delta_heads": ["q", "o"], "target_layers": [0], "memory_reader_layers": []}
SHAPES = {f"memory_{name}_proj": (2, 32) for name in "qkv"} | {
    "beta_proj": (2, 32), "beta_bias": (2,), "delta_q_proj": (32, 2), "delta_o_proj": (32, 2),
}  # fmt: skip
ARRAYS = {f"model.layers.0.self_attn.{name}": np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}


def saved(tensors, **kwargs) -> bytes:
    out = io.BytesIO()
    torch.save(tensors, out, **kwargs)
    return out.getvalue()


TENSORS = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
SOUND, LEGACY = saved(TENSORS), saved(TENSORS, _use_new_zipfile_serialization=False)
SAFE = safetensors.numpy.save(ARRAYS)
with zipfile.ZipFile(io.BytesIO(SOUND)) as archive:
    MEMBERS = {name: archive.read(name) for name in archive.namelist()}
PICKLE = next(name for name in MEMBERS if name.endswith("/data.pkl"))


def zipped(pickle: bytes) -> bytes:
    """The checkpoint with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in MEMBERS.items():
            archive.writestr(name, pickle if name == PICKLE else data)
    return out.getvalue()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A base model, and the adapter that a conversion may write over."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "base.gguf").write_bytes(BASE)
    return folder


def convert(folder, weights: bytes, config: str = json.dumps(FIELDS), name: str = WEIGHTS[0]) -> None:
    out, directory = folder / "adapter.gguf", folder / "given"
    directory.mkdir(exist_ok=True)
    for path in (*directory.iterdir(), out):
        path.unlink(missing_ok=True)
    (directory / name).write_bytes(weights)
    (directory / CONFIG).write_text(config, encoding="utf-8")
    out.write_bytes(MEMORY)
    try:
        write_adapter(Checkpoint(directory), Base(folder / "base.gguf"), out)
    except (CheckpointError, ModelError) as error:
        assert str(directory) in str(error) and "\n" not in str(error)
        assert out.read_bytes() == MEMORY
    else:
        header = Header(out)
        assert all(np.isfinite(header.read(tensor)).all() for tensor in header.tensors)
    assert (directory / name).read_bytes() == weights


def test_the_sound_ones(folder):
    for weights in (SOUND, LEGACY, zipped(MEMBERS[PICKLE]), SAFE):
        convert(folder, weights, name=WEIGHTS[weights is SAFE])
        assert (folder / "adapter.gguf").read_bytes() != MEMORY


@given(weights=damaged(SOUND) | damaged(MEMBERS[PICKLE]).map(zipped) | damaged(LEGACY, front=400))
def test_damaged_pytorch(weights, folder):
    convert(folder, weights)


@given(weights=damaged(SAFE, front=600))
def test_damaged_safetensors(weights, folder):
    convert(folder, weights, name=WEIGHTS[1])


# a state dict of anything

kinds = st.sampled_from(
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
sizes = st.lists(st.sampled_from([0, 1, 2, 32, 2**18]), max_size=3)
special = st.sampled_from([0.5, float("nan"), float("inf"), 1e30, 3.4e38])


@st.composite
def some_tensor(draw: st.DrawFn):
    shape = draw(sizes | st.sampled_from(list(SHAPES.values())))
    tensor = torch.full((1,) * len(shape), draw(special)).to(draw(kinds)).expand(shape)  # one value in the file
    how = draw(st.sampled_from(["as it is", "in full", "sparse", "meta"]))
    if how == "in full" and tensor.numel() < 1 << 12:
        tensor = tensor.contiguous()
    elif how == "sparse" and 0 < tensor.numel() < 1 << 12:
        tensor = tensor.contiguous().to_sparse()
    elif how == "meta":
        tensor = tensor.to("meta")
    return tensor


values = st.recursive(
    some_tensor() | st.none() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(TENSORS)), inner, max_size=3),
    max_leaves=3,
)


names = st.sampled_from(list(TENSORS)) | st.text(max_size=6)


@given(changed=st.dictionaries(names, some_tensor() | values, max_size=3))
def test_another_state_dict(changed, folder):
    convert(folder, saved({**TENSORS, **changed}))


@given(value=values)
def test_no_state_dict(value, folder):
    convert(folder, saved(value))


# the configuration

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
fields = st.sampled_from([
    *FIELDS, "normalize_qk", "couple_lambda", "state_update_mode", "rankwise_gates", "num_state_heads",
    "delta_o_rmsnorm", "memory_write_granularity", "delta_o_rmsnorm_eps", "trainable_delta_scale", "delta_scale_max",
    "online_gain",
]) | st.text(max_size=4)  # fmt: skip


@given(changed=st.dictionaries(fields, plain, max_size=3))
def test_another_configuration(changed, folder):
    convert(folder, SOUND, json.dumps({**FIELDS, **changed}))


@given(
    config=damaged(json.dumps(FIELDS).encode()).map(lambda data: data.decode("utf-8", "replace"))
    | plain.map(json.dumps)
)
def test_no_configuration(config, folder):
    convert(folder, SOUND, config)
