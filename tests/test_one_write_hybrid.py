"""The rule of one write where the KV cache cannot be cut: a hybrid, whose other layers keep a state of their own."""

from __future__ import annotations

import numpy as np
import pytest

from one_write import SAME, read_twice, take
from pydeltamem import DeltaMemLlama, ModelError
from refusals import refuses

HYBRID = [5, 7, 9, 11, 13, 15, 17, 19]


@pytest.fixture(scope="module")
def hybrid_files(tmp_path_factory):
    """A tiny LFM2, whose layers without attention keep a state of their own, and a memory on its attention."""
    from test_architectures import convert, converted, reference

    folder = tmp_path_factory.mktemp("lfm2")
    reference("Lfm2", folder)
    return converted(folder, convert(folder))


@pytest.fixture
def make_hybrid(hybrid_files):
    """make_hybrid(**kwargs): its KV cache cannot be cut."""
    base, adapter = hybrid_files
    made = []

    def make(**kwargs):
        options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "type_k": 0, "type_v": 0}
        made.append(DeltaMemLlama(base, deltamem_path=adapter, **{**options, **kwargs}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def test_going_back_in_a_hybrid(make_hybrid):
    """All is decoded again as it was the first time: text, memory and logits are those of a model that read it once."""

    def once(tokens):
        llm = make_hybrid()
        llm.eval(tokens)
        return llm.memory.state, llm.logits

    llm = make_hybrid()
    take(llm.generate(HYBRID, temp=0), 4)
    take(llm.generate(HYBRID, temp=0), 1)  # again
    np.testing.assert_allclose(llm.memory.state, once(HYBRID)[0], **SAME)
    assert llm.memory.n_written == llm.n_tokens == len(HYBRID)
    edited = [*HYBRID[:5], 30]
    take(llm.generate(edited, temp=0), 1)
    np.testing.assert_allclose(llm.memory.state, once(edited)[0], **SAME)
    assert llm.memory.n_written == llm.n_tokens == 6
    assert llm.memory.n_decoded_again > 0  # reported
    llm.n_tokens = 4
    llm.eval([20, 21])
    llm.memory.checkpoint()
    llm.eval([22, 23])
    assert llm.memory.rollback(6) == 0
    llm.eval([24])
    state, logits = once([*HYBRID[:4], 20, 21, 24])
    np.testing.assert_allclose(llm.memory.state, state, **SAME)
    np.testing.assert_allclose(llm.logits, logits, rtol=0, atol=1e-4)


def test_decode_of_a_hybrid_cannot_be_timed(hybrid_files):
    """The bench decodes at the same depth again and again."""
    from pydeltamem.bench import runs
    from pydeltamem.runtime import library

    model = runs.Model(library.llama_cpp, runs.Options(str(hybrid_files[0]), 256, 64, 32, 1, 0, False, "f16", "f16"))
    side = runs.Runner(model, None)
    with refuses(ModelError, hybrid_files[0]):
        side.decode(20, 2)
    side.close()
    model.close()


def test_a_hybrid_goes_on(make_hybrid):
    """A longer prompt, and one that comes after the text was forgotten: nothing but what is new is read."""
    llm, other = make_hybrid(), make_hybrid()
    take(llm.generate(HYBRID[:5], temp=0), 1)
    take(llm.generate(HYBRID, temp=0), 1)
    assert llm.memory.n_written == len(HYBRID) and llm.memory.n_decoded_again == 0
    llm.reset()
    llm.eval([20, 21])
    other.eval(HYBRID)
    other.reset()
    other.eval([20, 21])
    np.testing.assert_allclose(llm.memory.state, other.memory.state, **SAME)


def test_forgetting_one_text_of_a_hybrid_leaves_the_others(make_hybrid):
    llm, alone = make_hybrid(n_seq_max=2), make_hybrid()
    text = llm._engine.text()
    text.eval(HYBRID)
    llm.eval([20, 21])
    llm.reset()
    text.eval([22, 23])
    alone.eval([*HYBRID, 22, 23])
    np.testing.assert_allclose(text.state, alone.memory.state, **SAME)


def test_dropping_text_of_a_hybrid_keeps_what_it_wrote(make_hybrid):
    llm = make_hybrid()
    llm.eval(HYBRID)
    state = llm.memory.state
    llm._text.shift(2, 5)
    llm.memory.write = False
    llm.eval([20])
    np.testing.assert_array_equal(llm.memory.state, state)


def test_rehearsal_of_a_hybrid(make_hybrid):
    llm, other = make_hybrid(), make_hybrid()
    llm.eval(HYBRID)
    llm.memory.rehearse()
    np.testing.assert_allclose(llm.memory.state, read_twice(other, (HYBRID, {})), **SAME)
