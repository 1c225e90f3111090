"""Damaged GGUF files: refused by one kind of error, or read as what can be worked with; what a command writes over
stays if it refuses its input.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import inputs  # noqa: F401 - how many
from damage import damaged
from pydeltamem import DeltaMemError, ModelError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.description import describe
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.kinds import ADAPTER, MODEL, SHARD
from pydeltamem.formats.packed import pack, unpack
from small import ARRAY, BASE, MEMORY, STRING, U32, key, text


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def packed(folder):
    """The bytes of base and adapter packed."""
    (folder / "base.gguf").write_bytes(BASE)
    (folder / "adapter.gguf").write_bytes(MEMORY)
    pack(folder / "base.gguf", folder / "adapter.gguf", folder / "packed.gguf")
    return (folder / "packed.gguf").read_bytes()


def put(path, data: bytes):
    path.unlink(missing_ok=True)  # ext4 syncs what is written over
    path.write_bytes(data)
    return path


def read(path, data: bytes) -> None:
    """Everything that reads a header, of a file with these contents."""
    put(path, data)
    try:
        header = Header(path)
    except ModelError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert header.keys.keys() == header.types.keys() == header.spans.keys()
        for name, tensor in header.tensors.items():
            assert tensor.offset + tensor.n_bytes <= len(data)
            if tensor.n_bytes < 1 << 16:
                try:
                    assert header.read(name).shape == tensor.shape
                except ModelError as error:  # a type that cannot be read here
                    assert str(path) in str(error)
        for at, end in header.spans.values():
            assert 0 < at < end <= len(data)
    for reader in (Header.of_model, Base, describe):
        try:
            reader(str(path))
        except DeltaMemError as error:
            assert str(path) in str(error)
    for kind in (MODEL, SHARD, ADAPTER):
        kind.is_one(path)
    assert path.read_bytes() == data


@given(data=damaged(BASE) | damaged(MEMORY))
def test_damaged(data, folder):
    read(folder / "damaged.gguf", data)


# any header, made of parts that fit together or not

names = st.sampled_from(
    ["general.architecture", "general.alignment", "general.type", "split.count", "split.no", "split.tensors.count",
     "qwen3.block_count", "qwen3.attention.head_count", "deltamem.version", "adapter.type"]
) | st.text(max_size=6)  # fmt: skip
lengths = st.integers(0, 4) | st.sampled_from([2**16, 2**31, 2**32, 2**61, 2**63, 2**64 - 1])
strings = st.binary(max_size=6) | st.sampled_from([b"qwen3", b"adapter", b"deltamem", b"model"])


@st.composite
def some_key(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 14))
    value = draw(st.binary(max_size=24))
    if kind == STRING:
        value = text(draw(strings))
    elif kind == U32:
        value = struct.pack("<I", draw(st.integers(0, 64)))
    elif kind == ARRAY:
        value = struct.pack("<IQ", draw(st.integers(0, 13)), draw(lengths)) + value
    return key(draw(names), kind, value)


@st.composite
def some_tensor(draw: st.DrawFn) -> bytes:
    dims = draw(st.lists(lengths | st.sampled_from([32, 64]), max_size=5))
    name = draw(
        st.sampled_from(["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_output.weight"]) | st.text(max_size=4)
    )
    offset = draw(st.sampled_from([0, 32, 2**63, 2**64 - 32]) | lengths)
    return text(name.encode()) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, draw(st.integers(0, 45)), offset)


@given(
    keys=st.lists(some_key(), max_size=5), tensors=st.lists(some_tensor(), max_size=4), more=st.none() | lengths,
    version=st.sampled_from([3, 3, 3, 2, 1, 0]), rest=st.integers(0, 1 << 12),
)  # fmt: skip
def test_made_up(keys, tensors, more, version, rest, folder):
    counts = (len(tensors), len(keys)) if more is None else (more, len(keys))
    read(folder / "made.gguf", b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys + tensors) + bytes(rest))


# nothing that is there is lost


@given(base=st.just(BASE) | damaged(BASE), memory=st.just(MEMORY) | damaged(MEMORY))
def test_packing_what_is_damaged(base, memory, folder):
    out = put(folder / "out.gguf", BASE)
    paths = put(folder / "b.gguf", base), put(folder / "m.gguf", memory)
    try:
        pack(*paths, out)
    except DeltaMemError as error:
        assert str(paths[0]) in str(error) or str(paths[1]) in str(error)
        assert out.read_bytes() == BASE
    else:
        Header(out)
    assert (paths[0].read_bytes(), paths[1].read_bytes()) == (base, memory)


@given(data=st.data())
def test_unpacking_what_is_damaged(data, folder, packed):
    model = put(folder / "p.gguf", data.draw(damaged(packed)))
    parts = put(folder / "one.gguf", BASE), put(folder / "two.gguf", MEMORY)
    try:
        unpack(model, *parts)
    except DeltaMemError as error:
        assert str(model) in str(error)
        assert (parts[0].read_bytes(), parts[1].read_bytes()) == (BASE, MEMORY)
    else:
        for part in parts:
            Header(part)
