"""Damaged memory files: refused by one kind of error, or read as a memory that can be worked with."""

from __future__ import annotations

import json
import struct

import numpy as np
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import inputs  # noqa: F401 - how many
from damage import damaged
from pydeltamem import MemoryFileError, MemorySnapshot

METADATA = {"format": "deltamem-memory", "format_version": "1", "layers": "0,3", "tokens_written": "12"}
SOUND = safetensors.numpy.save({"state": np.ones((2, 1, 2, 2), np.float32)}, METADATA)


def check(path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # ext4 syncs what is written over
    path.write_bytes(data)
    try:
        snapshot = MemorySnapshot.load(path)
    except MemoryFileError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        n_layer, n_head, rank, _ = snapshot.state.shape
        assert np.isfinite(snapshot.state).all()
        assert len(snapshot.layers) == n_layer and snapshot.tokens_written >= 0
        assert snapshot.norms.shape == (n_layer, n_head)
        assert snapshot.singular_values.shape == (n_layer, n_head, rank)
    assert path.read_bytes() == data


@given(data=damaged(SOUND, front=200))
def test_damaged(data, tmp_path_factory):
    check(tmp_path_factory.getbasetemp() / "damaged.memory", data)


numbers = st.integers(-1, 9) | st.integers(2**31, 2**64)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(list(METADATA.values())),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F64", "BF16", "I8", "BOOL", "F4"]) | values,
        "shape": st.lists(numbers, max_size=5) | values,
        "data_offsets": st.lists(numbers | st.just(32), max_size=3) | st.just([0, 32]) | values,
    },
)
metadata = st.fixed_dictionaries({}, optional={key: st.just(value) | values for key, value in METADATA.items()})
header = st.fixed_dictionaries(
    {}, optional={"__metadata__": st.just(METADATA) | metadata | values, "state": entry | values, "other": entry}
)


@given(header=header | values, length=st.none() | st.integers(0, 2**64 - 1), data=st.binary(max_size=64))
def test_made_up(header, length, data, tmp_path_factory):
    """Whatever a header says."""
    text = json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    check(tmp_path_factory.getbasetemp() / "made.memory", prefix + text + data)
