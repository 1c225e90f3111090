"""The composite, which computes the memory in ggml's own operations (docs/explanation/backends.md), forced on the CPU.

Its bound is the operator's: NMSE at most 1e-9.
"""

from __future__ import annotations

import numpy as np
import pytest

from golden_data import CASES
from native_context import open_context
from pydeltamem import DeltaMemLlama
from pydeltamem.errors import AdapterError
from refusals import refuses
from test_golden import (
    BOUND,
    F32,
    PIECES,
    each_case,
    errors_of,
    expected_of,
    nmse,
    read_one_by_one,
    read_prompt,
    segments_of,
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
    assert nmse(read_prompt(llm, expected), expected["prompt_logits"]) <= BOUND
    assert nmse(llm.memory.state, expected["prompt_state"]) <= BOUND
    assert nmse(read_one_by_one(llm, expected["decode_ids"]), expected["decode_logits"]) <= BOUND
    assert nmse(llm.memory.state, expected["decode_state"]) <= BOUND
    llm.close()


@pytest.mark.parametrize("case", CASES)
def test_other_sequences_in_the_batch(golden_dir, adapter, case):
    """Two sequences interleaved, in micro-batches that cut both, and a third one that has nothing to say."""
    expected = expected_of(golden_dir, "qwen3", case)
    base, memory = golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", case)
    ours = expected["prompt_ids"].tolist()
    other = ours[::-1][:50]
    segments = segments_of(expected)
    other_segments = None if segments is None else [i // 9 if i % 9 else -1 for i in range(len(other))]
    with open_context(base, memory) as alone:
        other_logits = alone.decode([(token, 0) for token in other], other_segments)
        other_state = alone.state(0)

    order = sorted([(2 * i, 0, i) for i in range(len(ours))] + [(2 * i + 1, 1, i) for i in range(len(other))])
    tokens = [(ours[i] if seq == 0 else other[i], seq) for _, seq, i in order]
    ids = None if segments is None else [segments[i] if seq == 0 else other_segments[i] for _, seq, i in order]
    of = {seq: [row for row, (_, s, _) in enumerate(order) if s == seq] for seq in (0, 1)}
    with open_context(base, memory, n_seq=3, n_ubatch=40) as both:
        logits = both.decode(tokens, ids)
        assert nmse(logits[of[0]], expected["prompt_logits"]) <= BOUND
        assert nmse(logits[of[1]], other_logits) <= BOUND
        assert nmse(both.state(0), expected["prompt_state"]) <= BOUND
        assert nmse(both.state(1), other_state) <= BOUND
        assert not both.state(2).any()
        rows = [both.decode([(other[i], 1), (t, 0)])[1] for i, t in enumerate(expected["decode_ids"].tolist())]
        assert nmse(rows, expected["decode_logits"]) <= BOUND
        assert nmse(both.state(0), expected["decode_state"]) <= BOUND


@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_ingest_over_many_batches(golden_dir, adapter, case):
    expected = expected_of(golden_dir, "qwen3", case)
    tokens, segments = expected["prompt_ids"].tolist(), segments_of(expected)
    with open_context(golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", case)) as context:
        rows = []
        for start in range(0, len(tokens), 11):
            piece = range(start, min(start + 11, len(tokens)))
            ends = [i == len(tokens) - 1 for i in piece]
            rows.append(context.decode([(tokens[i], 0) for i in piece], [segments[i] for i in piece], ends))
            if not any(ends):
                assert not context.state(0).any()  # nothing is written before the ingest ends
        assert nmse(np.concatenate(rows), expected["prompt_logits"]) <= BOUND
        assert nmse(context.state(0), expected["prompt_state"]) <= BOUND


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
