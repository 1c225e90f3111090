"""Adapters whose writes are deferred: a turn, or its reply, reads what the turns before it wrote."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import random

import numpy as np
import pytest

from native_context import open_context
from pydeltamem.conversation import Conversation, say_together
from pydeltamem.errors import AdapterError, InputError
from pydeltamem.runtime import library
from pydeltamem.runtime.history import REPLY

N_LOGITS = N_STATE = 1e-10
TURNS = [[5, 17, 99, 23, 42, 8, 3], [61, 7, 7, 12], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
OPERATIONS = ["say", "say", "together", "add", "regenerate", "edit", "undo", "fork", "quiet"]
WORDS = ["ada", "lima", "red", "7", "who", "why", "tea", "sun"]

each_arch = pytest.mark.parametrize("arch", ["qwen3", "smollm3"])


def nmse(a, b):
    return float(np.square(np.asarray(a, float) - b).sum() / np.square(np.asarray(b, float)).sum())


@pytest.fixture
def open_llm(make):
    """open_llm(arch, plain, **kwargs): a model with such an adapter; plain: without one."""
    return lambda arch="qwen3", plain=False, **kwargs: make(None if plain else "msw4_deferred", arch, **kwargs)


def logits_of(llm, tokens):
    n = llm.n_tokens
    llm.eval(tokens)
    return np.array(llm.scores[n : llm.n_tokens])


@each_arch
@pytest.mark.parametrize("visible", [False, True])
def test_pytorch_and_native_agree(golden_dir, checkpoint, open_llm, arch, visible):
    import torch
    import transformers

    from pydeltamem.train.reference import DeltaMem

    model = transformers.AutoModelForCausalLM.from_pretrained(golden_dir / arch / "hf", dtype=torch.float32).eval()
    memory = DeltaMem.from_checkpoint(model, checkpoint(arch, "msw4_deferred"))
    llm, past = open_llm(arch, logits_all=True), None
    for turn in TURNS:
        with torch.no_grad(), memory.segments([0] * len(turn)):
            out = model(torch.tensor([turn]), past_key_values=past, use_cache=True)
        if visible:
            past = out.past_key_values
        else:
            llm.reset()
        assert nmse(logits_of(llm, turn), out.logits[0].numpy()) <= N_LOGITS
        assert nmse(llm.memory.state, memory.state[:, 0].numpy()) <= N_STATE


def test_a_turn_reads_nothing_of_itself(open_llm):
    llm, plain = open_llm(logits_all=True), open_llm(plain=True, logits_all=True)
    first = logits_of(llm, TURNS[0])
    assert nmse(first, logits_of(plain, TURNS[0])) <= N_LOGITS
    assert np.abs(llm.memory.state).max() > 0
    # sampled tokens go on with their turn
    for token in TURNS[1]:
        assert nmse(logits_of(llm, [token]), logits_of(plain, [token])) <= N_LOGITS
    assert llm.memory.n_written == len(TURNS[0]) + len(TURNS[1])
    # the next turn reads all that
    assert nmse(logits_of(llm, TURNS[2]), logits_of(plain, TURNS[2])) > 1e-6


def test_a_reply_reads_what_was_there_before_its_message(make):
    """And its message reads, and all write, as with an adapter that defers nothing."""
    llm, plain = (make(case, logits_all=True) for case in ("msw4_replies", "msw4_qo"))
    for told, said in ((TURNS[0], TURNS[1]), (TURNS[2], TURNS[0])):
        before = plain.memory.state
        assert nmse(logits_of(llm, told), logits_of(plain, told)) <= N_LOGITS
        after = plain.memory.state
        assert nmse(llm.memory.state, after) <= N_STATE
        plain.memory.state, plain.memory.write = before, False
        for token in said:
            assert nmse(logits_of(llm, [token]), logits_of(plain, [token])) <= N_LOGITS
        assert np.abs(llm.memory.state - after).max() > 0
        plain.memory.state, plain.memory.write = llm.memory.state, True


def test_replies_of_any_adapter_can_be_deferred(make, tmp_path):
    """Its memory file fits both ways. An adapter that defers all writes stays as it is; segments are refused."""
    llm, other = make("msw4_qo", defer_replies=True, logits_all=True), make("msw4_replies", logits_all=True)
    for turn in (*TURNS, [7], [9]):
        assert nmse(logits_of(llm, turn), logits_of(other, turn)) <= N_LOGITS
    llm.memory.save(tmp_path / "a.memory")
    plain = make("msw4_qo")
    plain.memory.load(tmp_path / "a.memory")
    np.testing.assert_array_equal(plain.memory.state, llm.memory.state)
    copy = pickle.loads(pickle.dumps(llm))
    with contextlib.closing(copy):
        for one in (copy, llm):
            one.reset()
            one.eval(TURNS[0])
            one.eval([7])
        assert nmse(copy.scores[copy.n_tokens - 1], llm.scores[llm.n_tokens - 1]) <= N_LOGITS
    turned, same = make("msw4_deferred", defer_replies=True, logits_all=True), make("msw4_deferred", logits_all=True)
    for turn in TURNS:
        assert nmse(logits_of(turned, turn), logits_of(same, turn)) <= N_LOGITS
    with pytest.raises(AdapterError):
        make("ssw_message", defer_replies=True)


def test_a_state_that_is_set_is_read_at_once(open_llm):
    llm, plain = open_llm(logits_all=True), open_llm(plain=True, logits_all=True)
    llm.eval(TURNS[0])
    plain.eval(TURNS[0])
    llm.memory.state = np.random.default_rng(1).normal(size=llm.memory.shape)
    assert nmse(logits_of(llm, [7]), logits_of(plain, [7])) > 1e-6


def test_batches_change_nothing(open_llm):
    tokens = [int(t) for t in np.random.default_rng(2).integers(4, 250, size=150)]
    states = []
    for options in ({}, {"n_batch": 16}, {"n_batch": 64, "n_ubatch": 32}):
        llm = open_llm(**options)
        for turn in (tokens[:90], tokens[90:]):
            llm.eval(turn)
        states.append(llm.memory.state)
    for state in states[1:]:
        assert nmse(state, states[0]) <= N_STATE


def test_segments_are_refused(open_llm):
    with pytest.raises(InputError):
        open_llm().eval([5, 6], segments=[0, 0])


def test_only_such_an_adapter_has_turns(make_llm):
    llm = make_llm()
    state = np.zeros(llm.memory.shape, dtype=np.float32)
    assert library.llama_deltamem_begin_turn(llm.ctx, 0) < 0
    assert library.llama_deltamem_turn_set(llm.ctx, 0, state.ctypes.data_as(library.float_p), state.size) < 0


def replayed(context, conversation, case, seq=0):
    """The state after a conversation's text, token by token, by what its record says of turns and writes."""
    context.forget_text(seq)
    assert not library.llama_deltamem_state_reset(context.ctx, seq)
    position = conversation._text.position
    for i in range(position.n):
        assert not library.llama_deltamem_set_write(context.ctx, seq, bool(position.log.wrote[i]))
        if position.log.begins[i]:
            assert not library.llama_deltamem_begin_turn(context.ctx, seq)
        if case == "msw4_replies":
            assert not library.llama_deltamem_set_replies(context.ctx, seq, bool(position.log.segment[i] == REPLY))
        context.decode([(int(position.log.tokens[i]), seq)])
    return context.state(seq)


@pytest.mark.parametrize("case", ["msw4_deferred", "msw4_replies"])
@pytest.mark.parametrize("n_batch", [16, 512])
def test_schedules(base, adapter, make, n_batch, case):
    """Random turns of three conversations: each memory is as if its text had been read once."""
    draw = random.Random(n_batch)
    llm = make(case, n_seq_max=5, n_ctx=4096, n_batch=n_batch)
    with open_context(base(), adapter("qwen3", case)) as context:
        for _ in range(6):
            talks = [Conversation(llm, n_predict=4, temp=0.0) for _ in range(3)]
            for _ in range(8):
                talk, words = draw.choice(talks), " ".join(draw.choices(WORDS, k=draw.randrange(1, 6)))
                operation = draw.choice(OPERATIONS)
                said = any(message["role"] == "user" for message in talk.messages)
                if operation == "say" or (operation in ("regenerate", "edit", "undo") and not said):
                    talk.say(words)
                elif operation == "together":
                    say_together(dict.fromkeys(talks[:2], words))
                elif operation == "add":
                    talk.add(draw.choice(["user", "assistant"]), words)
                elif operation == "quiet":
                    talk.memory.write = False
                    talk.say(words)
                    talk.memory.write = True
                elif operation == "fork":
                    talks[talks.index(talk)] = talk.fork()
                    talk.close()
                elif operation == "edit":
                    talk.edit(words)
                else:
                    getattr(talk, operation)()
                for each in talks:
                    if each.n_tokens:
                        assert nmse(each.memory.state, replayed(context, each, case)) <= N_STATE, operation
            for talk in talks:
                talk.close()


@pytest.mark.parametrize("case", ["msw4_deferred", "msw4_replies"])
def test_a_turn_that_is_taken_back_is_read_again_as_before(make, case):
    """regenerate and edit go back into a turn, which then reads what it read before."""
    llm = make(case, n_seq_max=2, n_ctx=1024)
    with Conversation(llm, n_predict=6, temp=0.0) as one, Conversation(llm, n_predict=6, temp=0.0) as other:
        for words in ("ada lima", "who red"):
            one.say(words)
            other.say(words)
        before = one.memory.state
        one.regenerate()
        assert nmse(one.memory.state, before) <= N_STATE
        one.edit("tea")
        one.edit("who red")
        assert nmse(one.memory.state, before) <= N_STATE
        one.undo()
        one.say("who red")
        assert nmse(one.memory.state, other.memory.state) <= N_STATE


def test_turns_of_a_conversation(open_llm):
    """Each message begins one; its reply goes on with it."""
    llm = open_llm()
    with Conversation(llm, n_predict=5, temp=0.0) as talk:
        for words in ("ada lima", "who red", "tea"):
            n = talk.n_tokens
            talk.say(words)
            log = talk._text.position.log
            begins = np.flatnonzero(log.begins[: talk.n_tokens])
            assert 0 < (log.segment[begins[-1] : talk.n_tokens] == REPLY).sum() <= 5
            assert n - 5 <= begins[-1] <= n  # a reply may be made of other tokens once it is text
        assert len(begins) == 3
        talk.clear()
        talk.say("sun")
        assert list(itertools.islice(np.flatnonzero(talk._text.position.log.begins[: talk.n_tokens]), 2))[-1] > 0


def begins(llm):
    return np.flatnonzero(llm._text.position.log.begins[: llm.n_tokens]).tolist()


def test_a_prompt_begins_a_turn_beside_a_draft_model(make):
    """And guesses, of a draft model or sent, do not."""
    n = [len(turn) for turn in TURNS]
    drafts = {"logits_all": True, "draft_model": lambda ids, **_: np.array([9, 9], np.intc)}
    drafted, plain, sent = (
        make("msw4_deferred", **drafts),
        make("msw4_deferred"),
        make("msw4_deferred", logits_all=True),
    )
    for turn in TURNS:
        drafted.eval(turn)
        plain.eval(turn)
    assert begins(drafted) == begins(plain) == [0, n[0], n[0] + n[1]]
    assert nmse(drafted.memory.state, plain.memory.state) <= N_STATE
    said = []
    for llm in (plain, drafted, sent):
        llm.reset()
        llm.memory.reset()
        reply = llm.generate([*TURNS[0], *TURNS[1]], temp=0.0)
        tokens = [next(reply)]
        if llm is sent:
            tokens += [reply.send([9, 9])]
        said.append([*tokens, *itertools.islice(reply, 8 - len(tokens))])
        assert begins(llm) == [0]
    assert said[1] == said[2] == said[0]


@pytest.mark.parametrize("case", ["msw4_deferred", "msw4_replies"])
@pytest.mark.parametrize("saved", [False, True])
def test_going_back_into_a_reply(make, case, saved):
    """What follows is a turn of its own if it is a prompt, else it is of the reply; also where the state was saved."""
    llm, once = make(case, logits_all=True), make(case, logits_all=True)
    for back in (len(TURNS[0]) + 2, len(TURNS[0]), len(TURNS[0]) + 4):
        for follows in ([TURNS[2]], [[70], [71]]):
            llm.reset()
            llm.memory.reset()
            once.reset()
            once.memory.reset()
            for tokens in (TURNS[0], [50], [51], [52], [53], TURNS[1], [54]):
                llm.eval(tokens)
            llm.n_tokens = back
            if saved:
                llm.load_state(llm.save_state())
            for tokens in (TURNS[0], [50], [51], [52], [53]):
                if once.n_tokens < back:
                    once.eval(tokens)
            for tokens in follows:
                if back == len(TURNS[0]) + 4 and len(tokens) == 1:
                    break  # a single token where a turn began is of its message
                llm.eval(tokens)
                once.eval(tokens)
            else:
                assert begins(llm) == begins(once)
                assert nmse(llm.memory.state, once.memory.state) <= N_STATE


def test_a_rehearsal_keeps_the_turns(make):
    llm = make("msw4_deferred", n_seq_max=2, n_ctx=1024)
    with Conversation(llm, n_predict=4, temp=0.0) as talk:
        talk.say("ada lima")
        talk.say("who red")
        talk.memory.rehearse()
        before = np.flatnonzero(talk._text.position.log.begins[: talk.n_tokens]).tolist()
        talk.edit("tea sun")
        assert np.flatnonzero(talk._text.position.log.begins[: talk.n_tokens]).tolist() == before


def test_a_turn_that_was_never_decoded(make, monkeypatch):
    """A failure after the native library was told of a turn: the next token goes on with the one before."""
    llm, plain = make("msw4_deferred"), make("msw4_deferred")
    for one in (llm, plain):
        one.eval(TURNS[0])
        one.eval([50])
    describe = llm._slots._describe

    def fail(*args):
        describe(*args)
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(llm._slots, "_describe", fail)
        llm.eval(TURNS[1])
    for one in (llm, plain):
        one.eval([51])
        one.eval([52])
    assert nmse(llm.memory.state, plain.memory.state) <= N_STATE


def test_a_question_after_a_shared_text_is_of_its_message(make):
    """Where an evaluation decodes the beginning of a message once for several questions."""
    from pydeltamem.evals.asker import Asker, Shared

    llm = make("msw4_deferred", n_seq_max=3, n_ctx=1536)
    asker = object.__new__(Asker)
    asker.llm, asker.parallel, asker.shares, asker._memory, asker._kept = llm, 3, True, None, None
    for question in ("Who tea", "why"):
        with asker._read(Shared("ada lima red\n\n")) as read, Conversation(llm, n_predict=3, temp=0.0) as talk:
            read.options.update(n_predict=3, temp=0.0)
            assert read.say(f"ada lima red\n\n{question}") == talk.say(f"ada lima red\n\n{question}")
            assert nmse(read.memory.state, talk.memory.state) <= N_STATE
