"""llm.memory and memory files: state, writes, saving, loading, and every refusal."""

from __future__ import annotations

import os
import stat

import numpy as np
import pytest
import safetensors.numpy

from pydeltamem import AdapterError, DeltaMemError, InputError, MemoryFileError, ModelError
from pydeltamem.memory_file import check_writable, read_memory_file, write_memory_file

TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88]
METADATA = {"layers": "0,1", "adapter": "ab" * 32, "adapter_name": "test", "architecture": "qwen3"}


def random_state(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# memory files


def test_file_round_trip(tmp_path):
    path, state = tmp_path / "a.memory", random_state((2, 1, 8, 8))
    write_memory_file(path, state, METADATA)
    read, metadata = read_memory_file(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, state)
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["format"] == "deltamem-memory" and metadata["format_version"] == "1"
    assert metadata["created"].endswith("+00:00")
    assert os.listdir(tmp_path) == ["a.memory"]


def test_file_of_a_4b_model_is_small(tmp_path):
    path = tmp_path / "a.memory"
    metadata = {**METADATA, "layers": ",".join(map(str, range(36))), "adapter_name": "delta_mem_qwen3_4b-instruct"}
    write_memory_file(path, random_state((36, 1, 8, 8)), metadata)
    assert 36 * 64 * 4 < path.stat().st_size < 10 * 1024


@pytest.mark.skipif(os.name != "posix", reason="POSIX file modes")
def test_file_mode_follows_umask(tmp_path):
    path = tmp_path / "a.memory"
    old = os.umask(0o027)
    try:
        write_memory_file(path, random_state((2, 1, 8, 8)), METADATA)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path, state = tmp_path / "a.memory", random_state((2, 1, 8, 8))
    write_memory_file(path, state, METADATA)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MemoryFileError, match=r"a\.memory.*No space left"):
        write_memory_file(path, state + 1, METADATA)
    np.testing.assert_array_equal(read_memory_file(path)[0], state)
    assert os.listdir(tmp_path) == ["a.memory"]


def test_save_follows_a_link(tmp_path):
    real, link = tmp_path / "real.memory", tmp_path / "link.memory"
    write_memory_file(real, random_state((2, 1, 8, 8)), METADATA)
    link.symlink_to(real)
    write_memory_file(link, random_state((2, 1, 8, 8), seed=1), METADATA)
    assert link.is_symlink()
    np.testing.assert_array_equal(read_memory_file(real)[0], random_state((2, 1, 8, 8), seed=1))


@pytest.mark.parametrize("target", ["nowhere/a.memory", "."])
def test_save_where_nothing_can_be_saved(tmp_path, target):
    with pytest.raises(MemoryFileError, match="cannot be saved"):
        write_memory_file(tmp_path / target, random_state((2, 1, 8, 8)), METADATA)
    with pytest.raises(MemoryFileError, match="cannot be saved"):
        check_writable(tmp_path / target)


def bad_file(path, kind):
    """Writes a file that must be refused; returns what the sentence says."""
    state = random_state((2, 1, 8, 8))
    good = {"format": "deltamem-memory", "format_version": "1", **METADATA}

    def save(tensors, metadata):
        path.write_bytes(safetensors.numpy.save(tensors, metadata))

    if kind == "missing":
        return "no such memory file"
    if kind == "folder":
        path.mkdir()
        return "cut off or not a memory file"
    if kind == "truncated":
        write_memory_file(path, state, METADATA)
        path.write_bytes(path.read_bytes()[:-100])
        return "cut off or not a memory file"
    if kind == "empty":
        path.write_bytes(b"")
        return "cut off or not a memory file"
    if kind == "text":
        path.write_text("this is not a memory\n" * 20)
        return "cut off or not a memory file"
    if kind == "other safetensors":
        save({"weight": state}, {"format": "pt"})
        return "not a memory file"
    if kind == "no metadata":
        save({"state": state}, None)
        return "not a memory file"
    if kind == "newer version":
        save({"state": state}, {**good, "format_version": "2"})
        return "format version 2, this release reads 1"
    if kind == "no state":
        save({"weight": state}, good)
        return "holds no state"
    if kind == "half precision":
        save({"state": state.astype(np.float16)}, good)
        return "F16"
    if kind == "not square":
        save({"state": random_state((2, 1, 8, 4))}, good)
        return r"\[2, 1, 8, 4\]"
    assert kind == "NaN"
    state[1, 0, 3, 3] = np.nan
    save({"state": state}, good)
    return "not finite"


BAD_FILES = [
    "missing", "folder", "truncated", "empty", "text", "other safetensors", "no metadata", "newer version", "no state",
    "half precision", "not square", "NaN",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, kind):
    path = tmp_path / "bad.memory"
    says = bad_file(path, kind)
    with pytest.raises(MemoryFileError, match=rf"bad\.memory: .*{says}") as info:
        read_memory_file(path)
    assert "\n" not in str(info.value)


# the memory of a model


def test_shape_and_layers(llm, make_llm):
    assert llm.memory.layers == [0, 1, 2, 3]
    assert llm.memory.shape == (4, 1, 8, 8)
    assert llm.memory.state.shape == (4, 1, 8, 8) and llm.memory.state.dtype == np.float32
    assert not llm.memory.state.any()
    many = make_llm("msw4_qo").memory
    assert many.shape[1] > 1 and many.state.shape == many.shape
    some = make_llm("layers_subset_scale_layer").memory
    assert 0 < len(some.layers) < 4 and some.shape[0] == len(some.layers)


def test_state_is_a_copy(llm):
    llm.eval(TOKENS)
    state = llm.memory.state
    assert np.abs(state).max() > 0
    before = state.copy()
    state[:] = 7
    np.testing.assert_array_equal(llm.memory.state, before)


def test_state_is_set(llm):
    state = random_state(llm.memory.shape)
    llm.memory.state = state
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.memory.state = state.astype(np.float64).tolist()
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.memory.state = np.asfortranarray(state * 2)
    np.testing.assert_array_equal(llm.memory.state, state * 2)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.zeros((4, 1, 8)), r"shape \(4, 1, 8\)"),
        (np.zeros((4, 2, 8, 8)), r"shape \(4, 2, 8, 8\)"),
        (0.0, r"shape \(\)"),
        (np.full((4, 1, 8, 8), np.nan), "finite"),
        (np.full((4, 1, 8, 8), np.inf), "finite"),
        (np.full((4, 1, 8, 8), 1e300), "finite"),
        ("memory", "numbers"),
        (None, "shape|finite"),
    ],
)
def test_bad_state(llm, value, says):
    state = random_state(llm.memory.shape)
    llm.memory.state = state
    with pytest.raises(InputError, match=says) as info:
        llm.memory.state = value
    assert isinstance(info.value, ValueError) and isinstance(info.value, DeltaMemError)
    np.testing.assert_array_equal(llm.memory.state, state)


def test_write_off_reads_and_does_not_write(make_llm):
    llm = make_llm(logits_all=True)
    assert llm.memory.write is True
    llm.eval(TOKENS)
    state = llm.memory.state
    llm.memory.write = False
    assert llm.memory.write is False
    llm.reset()
    llm.eval(TOKENS)
    with_memory = llm._scores.copy()
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.memory.reset()
    llm.reset()
    llm.eval(TOKENS)
    assert np.abs(llm._scores - with_memory).max() > 1e-3, "the memory was not read"
    assert not llm.memory.state.any()


def test_text_and_memory_are_independent(llm):
    llm.eval(TOKENS)
    state = llm.memory.state
    llm.reset()
    assert llm.n_tokens == 0
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.eval(TOKENS)
    assert llm.n_tokens == len(TOKENS)
    llm.memory.reset()
    assert llm.n_tokens == len(TOKENS)
    assert not llm.memory.state.any()


def test_save_and_load(llm, make_llm, tmp_path):
    path = tmp_path / "a.memory"
    llm.eval(TOKENS)
    state = llm.memory.state
    llm.memory.save(path)
    other = make_llm()
    other.memory.load(str(path))
    np.testing.assert_array_equal(other.memory.state, state)
    metadata = read_memory_file(path)[1]
    assert metadata["layers"] == "0,1,2,3" and metadata["architecture"] == "qwen3"
    assert len(metadata["adapter"]) == 64 and metadata["adapter_name"]


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_refuses_and_keeps_the_memory(llm, tmp_path, kind):
    path = tmp_path / "bad.memory"
    says = bad_file(path, kind)
    llm.eval(TOKENS)
    state = llm.memory.state
    with pytest.raises(MemoryFileError, match=says):
        llm.memory.load(path)
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize(
    ("arch", "case"), [("qwen3", "msw4_qo"), ("qwen3", "qkvo_lambda_outside"), ("smollm3", "tsw_qo")]
)
def test_load_refuses_another_adapters_memory(llm, make_llm, tmp_path, arch, case):
    path = tmp_path / "other.memory"
    other = make_llm(case, arch)
    other.memory.save(path)
    state = random_state(llm.memory.shape)
    llm.memory.state = state
    with pytest.raises(
        MemoryFileError, match=r"other\.memory: the memory of another adapter, .*; attached is "
    ) as info:
        llm.memory.load(path)
    assert arch in str(info.value) and other.memory._metadata["adapter"][:12] in str(info.value)
    assert llm.memory._metadata["adapter"][:12] in str(info.value)
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [("0,1,2,3", (4, 2, 8, 8)), ("0,1,2,3", (4, 1, 4, 4)), ("0,1,2,5", (4, 1, 8, 8)), ("0,1", (2, 1, 8, 8))],
)
def test_load_refuses_other_shapes(llm, tmp_path, layers, shape):
    path = tmp_path / "a.memory"
    write_memory_file(path, np.zeros(shape), {**llm.memory._metadata, "layers": layers})
    llm.eval(TOKENS)
    state = llm.memory.state
    with pytest.raises(MemoryFileError, match=r"a\.memory: holds layers"):
        llm.memory.load(path)
    np.testing.assert_array_equal(llm.memory.state, state)


def test_detach_and_attach(make_llm):
    plain = make_llm(None, logits_all=True)
    plain.eval(TOKENS)
    llm = make_llm(logits_all=True)
    llm.eval(TOKENS)
    with_memory = llm._scores.copy()
    llm.memory.detach()
    assert not llm.memory.attached
    llm.reset()
    llm.eval(TOKENS)
    np.testing.assert_array_equal(llm._scores, plain._scores)
    llm.memory.attach()
    llm.reset()
    llm.eval(TOKENS)
    np.testing.assert_allclose(llm._scores, with_memory, rtol=0, atol=1e-5)


def test_without_adapter(make_llm, tmp_path):
    memory = make_llm(None).memory
    assert memory.layers == [] and not memory.attached
    assert repr(memory) == "Memory(not attached)"
    for access in (
        lambda: memory.state,
        lambda: setattr(memory, "state", np.zeros((4, 1, 8, 8))),
        lambda: memory.write,
        lambda: setattr(memory, "write", False),
        lambda: memory.shape,
        lambda: memory.reset(),
        lambda: memory.save(tmp_path / "a.memory"),
        lambda: memory.load(tmp_path / "a.memory"),
        lambda: memory.attach(),
        lambda: memory.detach(),
    ):
        with pytest.raises(AdapterError, match="no memory adapter is attached"):
            access()
    assert os.listdir(tmp_path) == []


def test_closed_model(llm):
    memory = llm.memory
    llm.close()
    for access in (lambda: memory.state, lambda: memory.reset(), lambda: memory.attach(), lambda: memory.write):
        with pytest.raises(ModelError, match="the model is closed"):
            access()
    assert repr(memory) == "Memory(not attached)"


def test_repr(llm):
    assert repr(llm.memory) == "Memory(layers=4, heads=1, rank=8, write=True, norm=0)"
