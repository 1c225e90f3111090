"""llm.memory: state, writes, saving, loading, and every refusal."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest

from conftest import ROOT
from pydeltamem import AdapterError, DeltaMemError, InputError, MemoryFileError, ModelError
from pydeltamem.formats.memory_file import read_memory_file, write_memory_file
from pydeltamem.runtime import library
from refusals import refuses
from test_memory_file import BAD_FILES, bad_file

TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88]


def random_state(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize("value", [None, 5, "a.memory", np.zeros((4, 1, 8, 8))], ids=str)
def test_only_a_copy_is_restored(llm, value):
    llm.eval(TOKENS)
    before = llm.memory.state
    with refuses(InputError, "copy"):
        llm.memory.restore(value)
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
    ("value", "names"),
    [
        (np.zeros((4, 1, 8)), ["(4, 1, 8)", "(4, 1, 8, 8)"]),
        (np.zeros((4, 2, 8, 8)), ["(4, 2, 8, 8)", "(4, 1, 8, 8)"]),
        (0.0, ["()", "(4, 1, 8, 8)"]),
        (np.full((4, 1, 8, 8), np.nan), ["NaN"]),
        (np.full((4, 1, 8, 8), np.inf), ["infinite"]),
        (np.full((4, 1, 8, 8), 1e300), ["infinite"]),
        ("memory", ["(4, 1, 8, 8)", "'memory'"]),
        (None, ["state"]),
        (np.ones((4, 1, 8, 8)) * 1j, ["(4, 1, 8, 8)", "complex"]),
    ],
)
def test_bad_state(llm, value, names):
    state = random_state(llm.memory.shape)
    llm.memory.state = state
    with refuses(InputError, *names) as info:
        llm.memory.state = value
    assert isinstance(info.value, ValueError) and isinstance(info.value, DeltaMemError)
    np.testing.assert_array_equal(llm.memory.state, state)


def test_a_position_is_a_whole_number(llm):
    llm.eval([5, 6, 7])
    for position in (1.5, "1", None):
        with refuses(InputError, "whole", repr(position)):
            llm.memory.rollback(position)
        with refuses(InputError, "n_tokens", repr(position)):
            llm.n_tokens = position
    assert llm.n_tokens == 3
    llm.n_tokens = np.int64(2)
    assert llm.memory.rollback(np.int64(1)) == 0 and llm.n_tokens == 1


def test_write_off_reads_and_does_not_write(make_llm):
    llm = make_llm(logits_all=True)
    assert llm.memory.write is True
    llm.eval(TOKENS)
    state = llm.memory.state
    llm.memory.write = False
    assert llm.memory.write is False
    llm.reset()
    llm.eval(TOKENS)
    with_memory = llm.scores[: llm.n_tokens].copy()
    np.testing.assert_array_equal(llm.memory.state, state)
    llm.memory.reset()
    llm.reset()
    llm.eval(TOKENS)
    assert np.abs(llm.scores[: llm.n_tokens] - with_memory).max() > 1e-3, "the memory was not read"
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


def test_the_page_of_formats_has_every_field_of_a_file(llm, tmp_path):
    llm.eval(TOKENS)
    llm.memory.save(tmp_path / "a.memory")
    page = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    section = page.partition("\n## Memory file\n")[2].partition("\n## ")[0]
    named = " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    shown = re.findall(r"`(\w+)`", named)
    assert sorted(shown) == sorted(read_memory_file(tmp_path / "a.memory")[1])


def test_when_a_memory_began(llm, tmp_path, monkeypatch):
    """It stays with the memory: in files, states, pickles."""

    def began():
        return llm.memory.copy().metadata["created"]

    first = began()
    monkeypatch.setattr("pydeltamem.runtime.text.now", lambda: "2030-01-01T00:00:00+00:00")
    llm.eval([14, 17, 40])
    llm.memory.save(tmp_path / "a.memory")
    assert began() == first
    saved, copy = llm.save_state(), pickle.loads(pickle.dumps(llm))
    assert copy.memory.copy().metadata["created"] == first
    copy.close()
    llm.memory.reset()
    assert began().startswith("2030")
    llm.load_state(saved)
    assert began() == first
    llm.memory.reset()
    llm.memory.load(tmp_path / "a.memory")
    assert began() == first


@pytest.mark.parametrize("kind", BAD_FILES)
def test_load_refuses_and_keeps_the_memory(llm, tmp_path, kind):
    path = tmp_path / "bad.memory"
    names = bad_file(path, kind)
    llm.eval(TOKENS)
    state = llm.memory.state
    with refuses(MemoryFileError, path, *names):
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
    adapters = [memory.copy().metadata["adapter"][:12] for memory in (other.memory, llm.memory)]
    with refuses(MemoryFileError, path, arch, *adapters):
        llm.memory.load(path)
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [("0,1,2,3", (4, 2, 8, 8)), ("0,1,2,3", (4, 1, 4, 4)), ("0,1,2,5", (4, 1, 8, 8)), ("0,1", (2, 1, 8, 8))],
)
def test_load_refuses_other_shapes(llm, tmp_path, layers, shape):
    path = tmp_path / "a.memory"
    write_memory_file(path, np.zeros(shape), {**llm.memory.copy().metadata, "layers": layers})
    llm.eval(TOKENS)
    state = llm.memory.state
    with refuses(MemoryFileError, path, f"layers {layers}", shape):
        llm.memory.load(path)
    np.testing.assert_array_equal(llm.memory.state, state)


@pytest.mark.parametrize("wrote", ["an older release", "this model", "another model"])
def test_the_memory_of_another_base_model_is_loaded_with_a_warning(llm, tmp_path, caplog, wrote):
    """Its adapter fits; what it learned with that model may say less to this one."""
    path = tmp_path / "a.memory"
    llm.eval(TOKENS)
    snapshot = llm.memory.copy()
    metadata = dict(snapshot.metadata)
    if wrote == "another model":
        metadata["base"] = "0" * 64
    elif wrote == "an older release":  # which did not name it
        del metadata["base"]
    write_memory_file(path, snapshot.state, metadata)
    llm.memory.reset()
    llm.memory.load(path)
    np.testing.assert_array_equal(llm.memory.state, snapshot.state)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True] * (wrote == "another model")


def test_the_checkpoints_of_an_adapter_go_with_it(llm):
    llm.eval(TOKENS)
    llm.memory.attach()
    assert llm.memory.n_written == 0
    llm.eval(TOKENS)
    llm.memory.attach()
    assert llm.memory.checkpoints == [2 * len(TOKENS)]  # where the new memory began
    llm.eval(TOKENS)
    llm.memory.detach()
    assert llm.memory.checkpoints == []


def test_detach_and_attach(make_llm):
    plain = make_llm(None, logits_all=True)
    plain.eval(TOKENS)
    llm = make_llm(logits_all=True)
    llm.eval(TOKENS)
    with_memory = llm.scores[: llm.n_tokens].copy()
    llm.memory.detach()
    assert llm.memory.layers == []
    assert not llm.memory.attached
    llm.reset()
    llm.eval(TOKENS)
    np.testing.assert_array_equal(llm.scores[: llm.n_tokens], plain.scores[: plain.n_tokens])
    llm.memory.attach()
    llm.reset()
    llm.eval(TOKENS)
    np.testing.assert_allclose(llm.scores[: llm.n_tokens], with_memory, rtol=0, atol=1e-5)


def test_an_adapter_is_freed_when_another_takes_its_place(make_llm, adapter, monkeypatch):
    freed, free = [], library.llama_deltamem_adapter_free
    monkeypatch.setattr(library, "llama_deltamem_adapter_free", lambda adapter: (freed.append(adapter), free(adapter)))
    llm, other = make_llm(), make_llm("msw4_qo")
    for case in ("msw4_qo", "tsw_qo", "msw4_qo"):
        llm.memory.attach(adapter("qwen3", case))
    assert len(freed) == 3
    for one in (llm, other):
        one.eval(TOKENS)
    np.testing.assert_array_equal(llm.memory.state, other.memory.state)
    llm.memory.attach()  # the same again
    llm.close()
    assert len(freed) == 4


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
        lambda: memory.n_written,
        lambda: memory.checkpoint(),
        lambda: memory.rollback(0),
        lambda: memory.rehearse(),
        lambda: memory.copy(),
        lambda: memory.reset(),
        lambda: memory.save(tmp_path / "a.memory"),
        lambda: memory.load(tmp_path / "a.memory"),
        lambda: memory.attach(),
        lambda: memory.detach(),
    ):
        with refuses(AdapterError, "deltamem_path"):
            access()
    assert os.listdir(tmp_path) == []


def test_closed_model(llm):
    memory, path = llm.memory, llm.model_path
    llm.close()
    for access in (lambda: memory.state, lambda: memory.reset(), lambda: memory.attach(), lambda: memory.write):
        with refuses(ModelError, path, "closed"):
            access()
    assert repr(memory) == "Memory(not attached)"


def test_repr(llm):
    assert repr(llm.memory) == "Memory(layers=4, heads=1, rank=8, write=True, norm=0)"
    llm.memory.state = np.full(llm.memory.shape, 1e38)  # 4 · 64 values: the norm is no float32
    assert "norm=1.6e+39" in repr(llm.memory)
