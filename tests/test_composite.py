"""The composite, which computes the memory in ggml's own operations (docs/explanation/backends.md), forced on the CPU.

Its bound is the operator's: NMSE at most 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest

from golden_data import CASES
from pydeltamem import DeltaMemLlama
from pydeltamem.errors import AdapterError
from refusals import refuses
from test_golden import (
    BOUND,
    F32,
    PIECES,
    check_ingest_over_many_batches,
    check_other_sequences,
    check_pieces,
    each_case,
    errors_of,
    expected_of,
    read_one_by_one,
    read_prompt,
)


@pytest.fixture(autouse=True)
def composite(monkeypatch):
    monkeypatch.setenv("DELTAMEM_OPERATOR", "composite")


@each_case
def test_golden(golden_dir, adapter, arch, case, capfd):
    expected = expected_of(golden_dir, arch, case)
    options = {**F32, "verbose": True}
    llm = DeltaMemLlama(golden_dir / arch / "base-f32.gguf", deltamem_path=adapter(arch, case), **options)
    errors = errors_of(llm, expected)
    llm.close()
    assert "operations of ggml compute the memory" in capfd.readouterr().err
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("pieces", ["ubatch-7", "ubatch-1", "batch-13", "threads-4"])
@pytest.mark.parametrize("case", CASES)
def test_cut_into_pieces(golden_dir, adapter, case, pieces):
    expected = expected_of(golden_dir, "qwen3", case)
    llm = DeltaMemLlama(
        golden_dir / "qwen3" / "base-f32.gguf", deltamem_path=adapter("qwen3", case), **{**F32, **PIECES[pieces]}
    )
    check_pieces(llm, expected)


@pytest.mark.parametrize("case", CASES)
def test_other_sequences_in_the_batch(golden_dir, adapter, case):
    """In micro-batches that cut both sequences, beside a third one."""
    expected = expected_of(golden_dir, "qwen3", case)
    check_other_sequences(golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", case), expected, 3)


@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_ingest_over_many_batches(golden_dir, adapter, case):
    expected = expected_of(golden_dir, "qwen3", case)
    check_ingest_over_many_batches(golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", case), expected)


@pytest.mark.parametrize("case", ["tsw_qo", "msw4_qo"])
def test_rollback(golden_dir, adapter, case):
    """A checkpoint is the state at its token, also inside a batch, and a rollback has its bits."""
    expected = expected_of(golden_dir, "qwen3", case)
    llm = DeltaMemLlama(golden_dir / "qwen3" / "base-f32.gguf", deltamem_path=adapter("qwen3", case), **F32)
    prompt = expected["prompt_ids"].tolist()
    llm.eval(prompt[:20])
    position, state = llm.n_tokens, llm.memory.state.copy()
    llm.memory.checkpoint()
    llm.eval(prompt[20:])
    assert not np.array_equal(llm.memory.state, state)
    llm.memory.rollback(position)
    assert np.array_equal(llm.memory.state, state)
    llm.close()


def test_reads_only(golden_dir, adapter):
    """With writes off, not a bit of the state changes."""
    expected = expected_of(golden_dir, "qwen3", "tsw_qo")
    llm = DeltaMemLlama(golden_dir / "qwen3" / "base-f32.gguf", deltamem_path=adapter("qwen3", "tsw_qo"), **F32)
    read_prompt(llm, expected)
    state = llm.memory.state.copy()
    llm.memory.write = False
    read_one_by_one(llm, expected["decode_ids"])
    assert np.array_equal(llm.memory.state, state)
    llm.close()


def test_unknown_choice(golden_dir, adapter, monkeypatch):
    monkeypatch.setenv("DELTAMEM_OPERATOR", "fast")
    with refuses(AdapterError, "DELTAMEM_OPERATOR", "fast"):
        DeltaMemLlama(golden_dir / "qwen3" / "base-f32.gguf", deltamem_path=adapter("qwen3", "tsw_qo"), **F32)
