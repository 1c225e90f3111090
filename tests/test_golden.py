"""Parity with the published implementation: every golden case, cut into batches in several ways.

The bound is an NMSE of 1e-9, which leaves room for sums in another order: the backbone alone reaches 1e-12 in float32.
"""

from __future__ import annotations

import numpy as np
import pytest

from golden_data import ARCHITECTURES, CASES
from native_context import open_context
from pydeltamem import DeltaMemLlama

ALL = [(arch, case) for arch in ARCHITECTURES for case in CASES]
BOUND = 1e-9

F32 = dict(type_k=0, type_v=0, flash_attn=False, logits_all=True, n_ctx=512, verbose=False)

each_case = pytest.mark.parametrize(("arch", "case"), ALL, ids=[f"{arch}-{case}" for arch, case in ALL])


def nmse(actual, expected) -> float:
    """Normalised mean squared error, in double precision."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(((actual - expected) ** 2).sum() / (expected**2).sum())


def expected_of(golden_dir, arch, case):
    with np.load(golden_dir / arch / case / "expected.npz") as arrays:
        return dict(arrays)


def segments_of(expected):
    """The segment ids of the prompt, None for token writes."""
    for name in ("prompt_sentence_ids", "prompt_message_ids"):
        if name in expected:
            return expected[name].tolist()
    return None


def read_prompt(llm, expected):
    llm.eval(expected["prompt_ids"].tolist(), segments=segments_of(expected))
    return llm.scores[: llm.n_tokens].copy()


def read_one_by_one(llm, tokens):
    start = llm.n_tokens
    for token in tokens.tolist():
        llm.eval([token])
    return llm.scores[start : llm.n_tokens].copy()


def errors_of(llm, expected) -> dict[str, float]:
    """NMSE of prompt, decode, and recall from an emptied text with writes off."""
    errors = {"prompt_logits": nmse(read_prompt(llm, expected), expected["prompt_logits"])}
    errors["prompt_state"] = nmse(llm.memory.state, expected["prompt_state"])
    errors["decode_logits"] = nmse(read_one_by_one(llm, expected["decode_ids"]), expected["decode_logits"])
    errors["decode_state"] = nmse(llm.memory.state, expected["decode_state"])
    llm.reset()
    llm.memory.write = False
    llm.eval(expected["recall_ids"].tolist())
    errors["recall_logits"] = nmse(llm.scores[: llm.n_tokens], expected["recall_logits"])
    return errors


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_backbone(golden_dir, arch):
    with np.load(golden_dir / arch / "base_logits.npz") as arrays:
        llm = DeltaMemLlama(model_path=golden_dir / arch / "base-f32.gguf", **F32)
        llm.eval(arrays["ids"].tolist())
        assert nmse(llm.scores[: llm.n_tokens], arrays["logits"]) < 1e-11
        llm.close()


@each_case
def test_conversation(golden_dir, adapter, arch, case):
    """Prompt, decode, then a recall from an emptied text; then the same recall with an emptied memory."""
    expected = expected_of(golden_dir, arch, case)
    base = golden_dir / arch / "base-f32.gguf"
    llm = DeltaMemLlama(model_path=base, deltamem_path=adapter(arch, case), **F32)
    errors = errors_of(llm, expected)
    recall = expected["recall_ids"].tolist()
    llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
    errors["recall_next_logits"] = nmse(llm.scores[llm.n_tokens - 1], expected["recall_next_logits"])
    errors["recall_state"] = nmse(llm.memory.state, expected["recall_state"])

    llm.reset()
    llm.memory.reset()
    llm.eval(recall)
    errors["empty_logits"] = nmse(llm.scores[: llm.n_tokens], expected["empty_logits"])
    assert not llm.memory.state.any()

    # an empty memory reads zeros: the corrected graph equals the plain one to the last bit
    with_memory = llm.scores[: llm.n_tokens].copy()
    llm.close()
    plain = DeltaMemLlama(model_path=base, **F32)
    plain.eval(recall)
    assert np.array_equal(with_memory, plain.scores[: plain.n_tokens])
    plain.close()

    assert max(errors.values()) <= BOUND, errors
    # the memory has an effect: what was written changes the recall
    assert nmse(expected["recall_logits"], expected["empty_logits"]) > 1e-6


PIECES = {
    "ubatch-64": dict(n_ubatch=64),
    "ubatch-7": dict(n_ubatch=7),
    "ubatch-1": dict(n_ubatch=1),
    "batch-13": dict(n_batch=13),
    "batch-30-ubatch-7": dict(n_batch=30, n_ubatch=7),
    "threads-1": dict(n_threads=1, n_threads_batch=1),
    "threads-2": dict(n_threads=2, n_threads_batch=2),
    "threads-4": dict(n_threads=4, n_threads_batch=4),
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
@each_case
def test_cut_into_pieces(golden_dir, adapter, arch, case, pieces):
    """Neither micro-batches nor batches nor threads show in the result."""
    expected = expected_of(golden_dir, arch, case)
    llm = DeltaMemLlama(
        model_path=golden_dir / arch / "base-f32.gguf", deltamem_path=adapter(arch, case), **{**F32, **pieces}
    )
    check_pieces(llm, expected)


def check_pieces(llm, expected):
    """The prompt, then one token at a time: logits and states as published. Closes the model."""
    assert nmse(read_prompt(llm, expected), expected["prompt_logits"]) <= BOUND
    assert nmse(llm.memory.state, expected["prompt_state"]) <= BOUND
    assert nmse(read_one_by_one(llm, expected["decode_ids"]), expected["decode_logits"]) <= BOUND
    assert nmse(llm.memory.state, expected["decode_state"]) <= BOUND
    llm.close()


def check_other_sequences(base, memory, expected, n_seq, **options):
    """Two sequences interleaved in one batch: each has the logits and the state of a separate run. Further sequences
    have nothing to say.
    """
    ours = expected["prompt_ids"].tolist()
    other = ours[::-1][:50]
    segments = segments_of(expected)
    other_segments = None if segments is None else [i // 9 if i % 9 else -1 for i in range(len(other))]

    with open_context(base, memory) as alone:
        other_logits = alone.decode([(token, 0) for token in other], other_segments)
        other_state = alone.state(0)

    # ours, other, ours, other, ... and the rest of ours
    order = sorted([(2 * i, 0, i) for i in range(len(ours))] + [(2 * i + 1, 1, i) for i in range(len(other))])
    tokens = [(ours[i] if seq == 0 else other[i], seq) for _, seq, i in order]
    ids = None if segments is None else [segments[i] if seq == 0 else other_segments[i] for _, seq, i in order]
    of = {seq: [row for row, (_, s, _) in enumerate(order) if s == seq] for seq in (0, 1)}

    with open_context(base, memory, n_seq=n_seq, n_ubatch=40, **options) as both:
        logits = both.decode(tokens, ids)
        assert nmse(logits[of[0]], expected["prompt_logits"]) <= BOUND
        assert nmse(logits[of[1]], other_logits) <= BOUND
        assert nmse(both.state(0), expected["prompt_state"]) <= BOUND
        assert nmse(both.state(1), other_state) <= BOUND
        assert not any(both.state(seq).any() for seq in range(2, n_seq))

        # decode: one token of each per batch
        rows = []
        for i, token in enumerate(expected["decode_ids"].tolist()):
            rows.append(both.decode([(other[i], 1), (token, 0)])[1])
        assert nmse(rows, expected["decode_logits"]) <= BOUND
        assert nmse(both.state(0), expected["decode_state"]) <= BOUND


def check_ingest_over_many_batches(base, memory, expected):
    """An ingest cut anywhere, also inside a segment, reads and writes as in one batch."""
    tokens, segments = expected["prompt_ids"].tolist(), segments_of(expected)
    with open_context(base, memory) as context:
        rows = []
        for start in range(0, len(tokens), 11):
            piece = range(start, min(start + 11, len(tokens)))
            ends = [i == len(tokens) - 1 for i in piece]
            rows.append(context.decode([(tokens[i], 0) for i in piece], [segments[i] for i in piece], ends))
            if not any(ends):
                assert not context.state(0).any()  # nothing is written before the ingest ends
        assert nmse(np.concatenate(rows), expected["prompt_logits"]) <= BOUND
        assert nmse(context.state(0), expected["prompt_state"]) <= BOUND


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@each_case
def test_other_sequences_in_the_batch(golden_dir, adapter, arch, case, unified):
    base = golden_dir / arch / "base-f32.gguf"
    check_other_sequences(base, adapter(arch, case), expected_of(golden_dir, arch, case), 2, unified=unified)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", ["ssw_message", "ssw_sentence"])
def test_ingest_over_many_batches(golden_dir, adapter, arch, case):
    base, expected = golden_dir / arch / "base-f32.gguf", expected_of(golden_dir, arch, case)
    check_ingest_over_many_batches(base, adapter(arch, case), expected)
