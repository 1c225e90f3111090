"""Weights that are finite but absurd. The first state or logits that are no longer finite raise an error; the turn is
taken back, and the memory file stays good.
"""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
from llama_cpp import LLAMA_POOLING_TYPE_MEAN, LogitsProcessorList, llama_vocab_is_eog

from pydeltamem import Conversation, DeltaMemLlama, NotFiniteError, say_together
from pydeltamem.cli.main import main
from pydeltamem.runtime import library

GREEDY = {"n_predict": 8, "temp": 0.0}
TOKENS = [14, 17, 40, 99, 7, 63]
MESSAGES = [{"role": "user", "content": "hello there"}]

ABSURD = [
    ("no_lambda_raw_qk", "deltamem_in.weight", 1e25),  # the state is NaN
    ("qkvo_lambda_outside", "deltamem_v.weight", 1e25),
    ("tsw_qo", "deltamem_o.weight", 1e25),  # logits are 0: a norm makes values beyond float32 0
    ("ssw_message", "deltamem_o.weight", 1e25),
]


def with_values(source, target, name, value):
    """A copy of a GGUF file with the tensors of that name filled with a value."""
    shutil.copy(source, target)
    tensors = [tensor for tensor in gguf.GGUFReader(target, "r+").tensors if tensor.name.endswith(name)]
    for tensor in tensors:
        tensor.data[:] = value * np.where(tensor.data < 0, -1, 1)
    assert tensors
    return target


@pytest.fixture(params=ABSURD, ids=lambda param: "-".join(map(str, param)))
def bad(request, adapter, tmp_path):
    """A good adapter, and the same with absurd weights."""
    case, name, value = request.param
    good = adapter("qwen3", case)
    return good, with_values(good, tmp_path / "absurd.gguf", name, value)


@pytest.fixture
def load(base):
    made = []

    def make(path, **options):
        options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, **options}
        made.append(DeltaMemLlama(base(), deltamem_path=path, **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def some_state(llm):
    return np.random.default_rng(0).standard_normal(llm.memory.shape).astype(np.float32)


def test_a_conversation_with_a_memory_file(load, bad, tmp_path):
    good, absurd = bad
    file = tmp_path / "ada.memory"
    with Conversation(load(good), memory_file=file, **GREEDY) as ada:
        ada.say("my name is ada")
        state, n_written = ada.memory.state, ada.memory.n_written
    before = file.read_bytes()
    with Conversation(load(absurd, n_seq_max=2), memory_file=file, **GREEDY) as ada:
        for speak in (ada.say, lambda text: list(ada.stream(text)), lambda text: ada.add("user", text)):
            with pytest.raises(NotFiniteError) as info:
                speak("hello there")
            assert str(absurd) in str(info.value)
            assert ada.messages == [] and file.read_bytes() == before
            np.testing.assert_array_equal(ada.memory.state, state)
            assert ada.memory.n_written == n_written
    with Conversation(load(good), memory_file=file) as ada:
        np.testing.assert_array_equal(ada.memory.state, state)


@pytest.mark.parametrize("write", [True, False])
def test_the_models_own_text(load, bad, write):
    llm = load(bad[1])
    llm.memory.state = state = some_state(llm)
    llm.memory.write = write
    for use in (
        lambda: llm.eval([*TOKENS, 1, 2, 3]),
        lambda: list(llm.generate(TOKENS, temp=0.0)),
        lambda: llm.create_completion("hello there", max_tokens=8),
        lambda: list(llm.create_completion("hello there", max_tokens=8, stream=True)),
        lambda: llm.create_chat_completion(MESSAGES, max_tokens=8),
    ):
        with pytest.raises(NotFiniteError):
            use()
        np.testing.assert_array_equal(llm.memory.state, state)
        assert llm.memory.n_written == 0 and llm.n_tokens == 0


def test_segments(load, adapter, tmp_path):
    llm = load(with_values(adapter("qwen3", "ssw_message"), tmp_path / "absurd.gguf", "deltamem_o.weight", 1e25))
    llm.memory.state = state = some_state(llm)
    with pytest.raises(NotFiniteError):
        llm.eval(TOKENS, segments=[0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(llm.memory.state, state)
    assert llm.n_tokens == 0


@pytest.mark.parametrize("case", ["tsw_qo", "qkvo_lambda_outside"])
def test_nothing_of_it_stays(load, adapter, case):
    """A state far too large is replaced by another one, and has no effect afterwards. No NaN stays in the KV cache
    either.
    """
    llm, fresh = (load(adapter("qwen3", case), n_seq_max=2) for _ in range(2))
    ada, other = (Conversation(model, **GREEDY) for model in (llm, fresh))
    assert ada.say("my name is ada") == other.say("my name is ada")
    state = ada.memory.state
    ada.memory.state = np.full(state.shape, 3e38)
    with pytest.raises(NotFiniteError):
        ada.say("hello there")
    assert ada.messages == other.messages
    ada.close(), other.close()
    ada, other = (Conversation(model, **GREEDY) for model in (llm, fresh))  # in the same slots
    for one in (ada, other):
        one.memory.state = state
    assert ada.say("hello there") == other.say("hello there")
    np.testing.assert_array_equal(ada.memory.state, other.memory.state)


def test_one_of_several(load, adapter):
    """The others' turns are made, and saved; then the error is raised."""
    llm = load(adapter("qwen3", "tsw_qo"), n_seq_max=3)
    ada, bob = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    ada.memory.state = np.full(ada.memory.shape, 1e30)
    with pytest.raises(NotFiniteError):
        say_together({ada: "hello", bob: "hello"})
    assert ada.messages == [] and len(bob.messages) == 2
    assert bob.memory.n_written == bob.n_tokens and np.isfinite(bob.memory.state).all()


@pytest.mark.parametrize("operator", [None, "composite"])
@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_deferred", "msw4_replies"])
@pytest.mark.parametrize("value", [1e30, 3e38])
def test_the_others_do_not_notice(load, adapter, monkeypatch, operator, case, value):
    """They say and learn what they would alone: one in the same batches, one that waits, and the model's own text.

    Found: their texts were decoded again without writing, and of a composite with segments all failed.
    """
    if operator:
        monkeypatch.setenv("DELTAMEM_OPERATOR", operator)
    said, states = [], []
    for is_alone in (True, False):
        llm = load(adapter("qwen3", case), n_seq_max=4)
        ada, bob, eve = (Conversation(llm, **GREEDY) for _ in range(3))
        eve.say("my name is eve")
        llm.eval(TOKENS)
        if is_alone:
            replies = [bob.say("hello")]
        else:
            ada.memory.state = np.full(ada.memory.shape, value)
            with pytest.raises(NotFiniteError):
                say_together({ada: "hello", bob: "hello"})
            assert ada.messages == []
            replies = [bob.messages[-1]["content"]]
        replies += [bob.say("and you?"), eve.say("hello again"), list(llm.generate([*TOKENS, 5], temp=0.0))[:8]]
        said.append(replies)
        states.append([one.memory.state for one in (bob, eve, llm)])
    assert said[0] == said[1]
    for alone, beside in zip(*states):
        np.testing.assert_allclose(alone, beside, rtol=0, atol=1e-5)


class Fails:
    """Makes everything not finite from the n-th decode on."""

    def __init__(self, monkeypatch, n):
        self.n, take_result = n, library.llama_deltamem_take_result

        def later(*args):
            self.n -= 1
            return take_result(*args) if self.n > 0 else library.LLAMA_DELTAMEM_LOGITS_NOT_FINITE

        monkeypatch.setattr(library, "llama_deltamem_take_result", later)


@pytest.mark.parametrize("again", [False, True])
def test_in_the_middle_of_a_reply(load, adapter, monkeypatch, again):
    llm = load(adapter("qwen3", "tsw_qo"), n_seq_max=2)
    ada = Conversation(llm, **GREEDY)
    ada.add("user", "my name is ada")
    ada.add("assistant", "hello ada")
    if again:
        ada.say("hello")
    messages, state, n_written = [dict(m) for m in ada.messages], ada.memory.state, ada.memory.n_written
    with monkeypatch.context() as patch:
        Fails(patch, 4)
        pieces = []
        with pytest.raises(NotFiniteError):
            pieces += ada.stream_regenerate() if again else ada.stream("hello")
    assert ada.messages == messages
    if not again:  # otherwise the memory is where the other reply began
        np.testing.assert_array_equal(ada.memory.state, state)
        assert ada.memory.n_written == n_written
    assert ada.say("and") and np.isfinite(ada.memory.state).all()
    assert ada.memory.n_written == ada.n_tokens


@pytest.mark.parametrize("prompt", [[*TOKENS, 5, 6, 7], [*TOKENS[:3], 5, 6, 7], [5, 6, 7]])
def test_in_the_middle_of_a_generation(load, adapter, monkeypatch, prompt):
    llm = load(adapter("qwen3", "tsw_qo"))
    llm.eval(TOKENS)
    state = llm.memory.state
    with monkeypatch.context() as patch, pytest.raises(NotFiniteError):
        Fails(patch, 4)
        list(llm.generate(prompt, temp=0.0))
    assert llm.input_ids[: llm.n_tokens].tolist() == TOKENS and llm.memory.n_written == len(TOKENS)
    np.testing.assert_array_equal(llm.memory.state, state)


def test_after_text_has_left(load, adapter, monkeypatch):
    """The reply had already pushed the oldest turn out of the context."""
    llm = load(adapter("qwen3", "tsw_qo"), n_seq_max=2)
    ada = Conversation(llm, temp=0.0)
    ada.add("user", "hello there " * 10)
    ada.add("assistant", "hello ada")
    state, n_written = ada.memory.state, ada.memory.n_written
    ends = [token for token in range(llm.n_vocab()) if llama_vocab_is_eog(llm._model.vocab, token)]

    def never_end(_, scores):
        scores[ends] = -np.inf
        return scores

    with monkeypatch.context() as patch, pytest.raises(NotFiniteError):
        n = ada.n_dropped
        fails = Fails(patch, 10**6)
        for _ in ada.stream("and so on", n_predict=400, logits_processor=LogitsProcessorList([never_end])):
            if ada.n_dropped > n:
                fails.n = min(fails.n, 5)
    assert ada.n_dropped > 0 and ada.messages == []
    np.testing.assert_array_equal(ada.memory.state, state)
    assert ada.memory.n_written == n_written
    assert ada.say("once more", n_predict=4) and np.isfinite(ada.memory.state).all()


def test_embedding(base, load, adapter, tmp_path):
    absurd = with_values(adapter("qwen3", "qkvo_lambda_outside"), tmp_path / "absurd.gguf", "deltamem_v.weight", 1e25)
    llm = load(absurd, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN)
    llm.memory.state = some_state(llm)
    with pytest.raises(NotFiniteError):
        llm.embed("hello there")
    assert np.isfinite(load(adapter("qwen3", "tsw_qo"), embedding=True).embed("hello there")).all()


def test_a_model_without_a_memory(base, tmp_path):
    path = with_values(base(), tmp_path / "absurd-base.gguf", "blk.1.attn_output.weight", 1e30)
    with pytest.raises(NotFiniteError) as info:
        DeltaMemLlama(path, n_ctx=64).create_completion("hello", max_tokens=4)
    assert str(path) in str(info.value)


def test_the_command(base, bad, capsys, tmp_path):
    saved = tmp_path / "out.memory"
    options = ["--deltamem", str(bad[1]), "-p", "hello there", "-n", "4", "-c", "256", "--save-memory", str(saved)]
    code = main(["generate", "-m", str(base()), *options])
    assert code != 0 and str(bad[1]) in capsys.readouterr().err
