"""The engine: which requests share a decode."""

from __future__ import annotations

import gc
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LogitsProcessorList

from decoding import fail_at, go_on
from pydeltamem import Conversation, DecodeError, say_together, stream_together
from pydeltamem.runtime import library
from pydeltamem.runtime.request import Request

TIMEOUT = 300  # seconds; a run takes a few
LONG = "a very long message that needs many batches " * 4


@pytest.fixture
def make(make_llm, monkeypatch):
    def model(**kwargs):
        llm = make_llm(type_k=0, type_v=0, **{"n_seq_max": 4, **kwargs})
        go_on(monkeypatch, llm)  # replies are as long as asked for
        return llm

    return model


@pytest.fixture
def recorded(monkeypatch):
    """recorded(llm): a list that gets {slot: number of tokens} of each decode."""

    def record(llm, then=lambda n: None):
        decode, decodes = llm._engine.slots.decode, []

        def decoded(jobs, *meanwhile):
            decodes.append({job.slot: len(job.piece.tokens) for job in jobs})
            then(len(decodes))
            return decode(jobs, *meanwhile)

        monkeypatch.setattr(llm._engine.slots, "decode", decoded)
        return decodes

    return record


def in_threads(*works):
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(work) for work in works]]


def test_what_two_threads_say_is_decoded_together(make, recorded):
    llm, alone = make(), make()
    decodes = recorded(llm)
    talks = [Conversation(llm, temp=0.0, n_predict=100) for _ in range(2)]
    barrier = threading.Barrier(2)

    def say(talk, content):
        barrier.wait(TIMEOUT)  # however late a thread begins
        return talk.say(content)

    replies = in_threads(*(lambda talk=talk, i=i: say(talk, f"hello {i}") for i, talk in enumerate(talks)))
    assert replies == [Conversation(alone, temp=0.0, n_predict=100).say(f"hello {i}") for i in range(2)]
    # 100 each; decodes are common after both have begun and before one has ended
    assert sum(len(decode) == 2 for decode in decodes) > 50 and len(decodes) < 150


def test_two_streams_are_decoded_together(make, recorded):
    """A decode waits a moment for the requests of the one before."""
    llm = make()
    llm._engine.patience = (30, 10**9)
    talks = [Conversation(llm, temp=0.0, n_predict=100) for _ in range(2)]
    barrier = threading.Barrier(2)

    def read(talk):
        barrier.wait(TIMEOUT)
        return "".join(talk.stream("hello"))

    decodes = recorded(llm)
    texts = in_threads(*(lambda talk=talk: read(talk) for talk in talks))
    assert [text.strip() for text in texts] == [talk.messages[-1]["content"].strip() for talk in talks]
    # from where both have begun to where one has ended
    common = [i for i, decode in enumerate(decodes) if len(decode) == 2]
    assert len(common) > 50 and len(common) == common[-1] - common[0] + 1


def test_a_stream_that_nobody_reads_on_stands_still(make, recorded):
    llm = make()
    ada, bob = Conversation(llm, temp=0.0, n_predict=20), Conversation(llm, temp=0.0, n_predict=20)
    stream = ada.stream("hello")
    next(stream)
    n, slot = ada.n_tokens, ada._text.slot
    decodes = recorded(llm)
    bob.say("hello")
    in_threads(lambda: bob.say("and"))
    assert ada.n_tokens == n and not any(slot in decode for decode in decodes)
    stream.close()


def test_a_long_prompt_delays_no_reply(make, recorded):
    """A reply is in every decode from its first token on; the prompt gets the remaining room."""
    llm = make(n_batch=16, n_ubatch=16)
    ada, bob = Conversation(llm, temp=0.0, n_predict=10), Conversation(llm, temp=0.0, n_predict=2)
    decodes = recorded(llm)
    stream = stream_together({bob: LONG, ada: "hi"})
    next(stream)
    slot, other, begun = ada._text.slot, bob._text.slot, len(decodes)
    list(stream)
    of_ada = [decode.get(slot) for decode in decodes[begun:]]
    n = of_ada.index(None)
    assert n >= 5 and of_ada == [1] * n + [None] * (len(of_ada) - n)
    assert [decode[other] for decode in decodes[begun : begun + 3]] == [15] * 3


def n_graphs(llm):
    """Graphs computed: those that were built, and those that were used again."""
    return library.llama_deltamem_n_graphs(llm.ctx) + llama_cpp.llama_perf_context(llm.ctx).n_reused


def test_a_common_decode_is_one_graph(make):
    """llama.cpp computes sequences together only if their numbers ascend by one."""
    llm = make()
    slots, texts = llm._engine.slots, [llm._engine.text() for _ in range(4)]

    for turn in range(4):
        requests = [Request(text) for text in (texts if turn % 2 else reversed(texts))]
        for request in requests:
            request.ask([7])
        n = n_graphs(llm), slots.n_decodes
        llm._engine.wait(requests)
        assert all(request.is_over for request in requests) and slots.n_decodes == n[1] + 1
        assert n_graphs(llm) == n[0] + 1


@pytest.mark.parametrize("between", ["a text", "nothing", "a text without room"])
def test_an_unused_slot_parts_no_decode(make, between):
    """The slot between two gets a token, too, which is taken back: its text goes on as if there had been none."""
    llm = make()
    slots, texts = llm._engine.slots, [llm._engine.text() for _ in range(3)]
    for text in texts:
        text.eval([7, 8])
    first, middle, last = sorted(texts, key=lambda text: text.slot)
    assert [first.slot, last.slot] == [middle.slot - 1, middle.slot + 1]
    if between == "nothing":
        slots.leave(middle)
    elif between == "a text without room":
        middle.eval([9] * (middle.n_ctx - 2))
    n, state = middle.n_tokens, middle.state

    n_before = n_graphs(llm), slots.n_decodes
    requests = [Request(first), Request(last)]
    for request in requests:
        request.ask([9])
    llm._engine.wait(requests)
    assert all(request.is_over for request in requests)
    assert slots.n_decodes == n_before[1] + 1
    assert n_graphs(llm) == n_before[0] + (2 if between == "a text without room" else 1)

    assert middle.n_tokens == n and (middle.state == state).all()
    if between == "a text":
        assert (slots.get_state(middle.slot) == state).all()
        middle.eval([9])
    alone = make()._engine.text()
    for tokens in ([7, 8], [9], [10]):
        alone.eval(tokens)
    for text in texts if between == "a text" else (first, last):
        text.eval([10])
        np.testing.assert_allclose(text.state, alone.state, rtol=0, atol=1e-6)


def test_a_short_prompt_does_not_wait_for_a_long_one(make, recorded):
    """Prompts take turns."""
    llm = make(n_batch=16, n_ubatch=16)
    texts = [llm._engine.text() for _ in range(2)]
    requests = [Request(text) for text in texts]
    requests[0].ask([7] * 160)
    requests[1].ask([8] * 10)
    decodes = recorded(llm)
    llm._engine.wait(requests)
    assert requests[1].is_over and not requests[0].is_over and len(decodes) == 2
    llm._engine.wait(requests[:1])
    assert texts[0].n_tokens == 160 and texts[1].n_tokens == 10


def test_going_back_a_long_way_delays_no_reply(make, recorded):
    """What is read again has its pieces, too."""
    llm = make(n_batch=16, n_ubatch=16)
    llm.eval([9] * 320)
    talk = Conversation(llm, temp=0.0, n_predict=1)
    begun = threading.Event()

    def say():
        begun.set()
        talk.say("hi")

    thread = threading.Thread(target=say)

    def beside(n):
        if n == 2:
            thread.start()
            assert begun.wait(TIMEOUT)
        time.sleep(0.01)  # it has begun, and comes to the lock

    llm._engine.slots.leave(llm._text)  # so that all is read again
    decodes = recorded(llm, beside)
    llm.memory.rollback(310)
    n = len(decodes)
    assert sum(decode.get(llm._text.slot, 0) for decode in decodes) == 310
    thread.join(TIMEOUT)
    slot = talk._text.slot
    assert slot != llm._text.slot and any(slot in decode for decode in decodes[: n - 1])


@pytest.mark.parametrize("how", ["between two decodes", "before the first"])
def test_one_that_is_cancelled_leaves_at_the_next_decode(make, recorded, how):
    llm = make(n_batch=16, n_ubatch=16)
    text = llm._engine.text()
    text.eval([5, 6, 7])
    state, n_written = text.state, text.position.n_written
    request = Request(text)
    request.ask([9] * 100)
    if how == "before the first":
        request.cancel()
    decodes = recorded(llm, lambda n: request.cancel() if n == 2 else None)
    in_threads(lambda: llm._engine.wait([request]))
    assert request.is_over and request.error is None
    assert len(decodes) == (0 if how == "before the first" else 2)
    assert text.tokens.tolist() == [5, 6, 7] and text.position.n_written == n_written
    np.testing.assert_array_equal(text.state, state)
    text.eval([9] * 3)
    once = llm._engine.text()
    once.eval([5, 6, 7])
    once.eval([9] * 3)
    np.testing.assert_array_equal(text.state, once.state)


def test_a_decode_that_fails_leaves_every_text_where_it_was(make, monkeypatch):
    llm = make()
    texts = [llm._engine.text() for _ in range(3)]
    for i, text in enumerate(texts):
        text.eval([5 + i, 6, 7])
    positions, states = [text.position for text in texts], [text.state for text in texts]
    requests = [Request(text) for text in texts]
    for request in requests:
        request.ask([9, 10])

    with monkeypatch.context() as patch:
        fail_at(patch, llm)
        llm._engine.wait(requests)
    assert all(request.is_over and isinstance(request.error, DecodeError) for request in requests)
    for text, position, state in zip(texts, positions, states):
        assert text.tokens.tolist() == position.tokens.tolist() and text.position.n_written == position.n_written
        assert text.position.checkpoints.positions == position.checkpoints.positions
        np.testing.assert_array_equal(text.state, state)


def test_an_interrupt_in_a_decode_ends_one_request(make, monkeypatch):
    """The request of the interrupted thread ends; others in the same decode go on."""
    llm, decode = make(), None
    texts = [llm._engine.text() for _ in range(2)]
    request = Request(texts[0])
    request.ask([9, 10])

    def interrupted(jobs, *meanwhile):
        monkeypatch.undo()
        decode(jobs, *meanwhile)
        raise KeyboardInterrupt

    decode = llm._engine.slots.decode
    llm._engine._wanted[request] = 0  # another thread waits for it
    monkeypatch.setattr(llm._engine.slots, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        texts[1].eval([9, 10])
    assert not request.is_over and texts[0].n_tokens == texts[1].n_tokens == 0
    llm._engine.wait([request])
    once = llm._engine.text()
    once.eval([9, 10])
    assert texts[0].tokens.tolist() == [9, 10]
    np.testing.assert_array_equal(texts[0].state, once.state)


def test_who_should_come_back_is_looked_up_while_others_change_it(make):
    engine = make()._engine
    texts, is_over, threads = [engine.text() for _ in range(50)], threading.Event(), sys.getswitchinterval()

    def change():
        while not is_over.is_set():
            for text in texts:
                engine._left[text] = 1, 0.0
            for text in texts:
                engine._left.pop(text, None)

    thread = threading.Thread(target=change)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(2000):
            assert set(engine._texts_of_others(2)) <= set(texts)
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(threads)


def test_more_texts_than_slots_wait_for_one(make, recorded):
    """A reply keeps its slot, even if others need one: nothing of it is decoded again."""
    llm = make(n_seq_max=1)
    decodes = recorded(llm)
    talks = [Conversation(llm, temp=0.0, n_predict=20) for _ in range(3)]
    in_threads(*(lambda talk=talk: talk.say("hello") for talk in talks))
    assert sum(sum(decode.values()) for decode in decodes) == sum(talk.n_tokens for talk in talks)


def test_callbacks_run_in_the_thread_that_asks(make):
    llm = make()
    talks = [Conversation(llm, temp=0.0, n_predict=20) for _ in range(3)]
    called = {}

    def say(talk, watched):
        here = threading.get_ident()

        def look(ids, scores):
            called.setdefault(here, set()).add(threading.get_ident())
            return scores

        return talk.say("hello", **({"logits_processor": LogitsProcessorList([look])} if watched else {}))

    in_threads(*(lambda talk=talk, i=i: say(talk, i > 0) for i, talk in enumerate(talks)))
    assert len(called) == 2 and all(threads == {here} for here, threads in called.items())


def test_a_callback_may_use_another_conversation(make):
    """The callback's tokens are decoded alone; the others of the batch decode their last token again."""
    llm, alone = make(), make()
    ada, bob, aside = (Conversation(llm, temp=0.0, n_predict=6) for _ in range(3))

    def ask(ids, scores):
        aside.say("hello", n_predict=1)
        return scores

    replies = say_together({ada: "my name is ada", bob: "i am bob"}, logits_processor=LogitsProcessorList([ask]))
    for talk, content in ((ada, "my name is ada"), (bob, "i am bob")):
        assert replies[talk] == Conversation(alone, temp=0.0, n_predict=6).say(content)
        assert talk.memory.n_written == talk.n_tokens


def test_a_stream_with_a_processor_is_read_on_in_another_thread(make):
    llm = make(n_seq_max=2)
    talk = Conversation(llm, temp=0.0, n_predict=4)
    pieces = talk.stream("hello", logits_processor=LogitsProcessorList([lambda ids, scores: scores]))
    first = next(pieces)
    (rest,) = in_threads(lambda: "".join(pieces))
    assert (first + rest).strip() == talk.messages[-1]["content"].strip()


def test_who_has_the_lock_waits_for_nobody(make):
    """A saved state is whole: the text that goes back takes the slot of a reply whose thread waits for the lock."""
    llm = make(n_seq_max=1, n_ctx=512)
    llm.eval(list(range(5, 105)))
    talk, begun = Conversation(llm, temp=0.0, n_predict=60), threading.Event()

    def process(ids, scores):
        begun.set()
        return scores

    def save():
        assert begun.wait(TIMEOUT)
        llm.n_tokens = 50
        return llm.save_state().n_tokens

    options = {"logits_processor": LogitsProcessorList([process])}
    reply, n_tokens = in_threads(lambda: talk.say("hello", **options), save)
    assert n_tokens == 50 and reply


@pytest.mark.parametrize("contended", [False, True])
def test_what_was_written_before_the_memory_is_not_written_again(make, recorded, contended):
    """Also if the text has to wait for a slot, and so is planned twice."""
    llm = make(n_seq_max=1, n_batch=16)
    tokens = list(range(5, 45))
    llm.eval(tokens)
    state = llm.save_state()
    state.memory = None  # as a cache gives it: the tokens count as written
    llm.load_state(state)
    n_written, begun = llm.memory.n_written, threading.Event()

    def other():
        if contended:
            llm._engine.text().eval([9] * 200)

    def again():
        if contended:
            assert begun.wait(TIMEOUT)
        llm.n_tokens = 10
        llm.eval(tokens[10:])

    recorded(llm, lambda n: (begun.set(), time.sleep(0.02)))
    in_threads(other, again)
    assert llm.memory.n_written == n_written


def test_a_failure_before_the_memorys_floor_leaves_the_text(make, monkeypatch):
    llm = make(n_seq_max=1)
    text, tokens = llm._engine.text(), list(range(5, 25))
    text.eval(tokens[:10])
    text.begin(10)
    text.eval(tokens[10:])
    text.n_tokens = 5
    before, state = text.position, text.state

    def fail(jobs, *meanwhile):
        raise DecodeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine.slots, "decode", fail)
        with pytest.raises(DecodeError):
            text.eval(tokens[5:12])
    assert (text.n_tokens, text.position.n, text.position.n_written) == (5, before.n, before.n_written)
    np.testing.assert_array_equal(text.state, state)
    text.eval(tokens[5:12])
    assert text.position.n_written == 10 + 2  # the other five were written before


def test_a_reply_that_is_read_again_leaves_room_for_the_others(make, recorded):
    llm = make(n_seq_max=2, n_batch=16)
    talks = [Conversation(llm, temp=0.0, n_predict=60) for _ in range(2)]
    lost = []

    def lose(n):
        if n == 40:
            lost.append(talks[0]._text.n_kv)
            talks[0]._text.lost_kv()

    decodes = recorded(llm, lose)
    say_together({talks[0]: LONG, talks[1]: "hi"})
    assert lost[0] > 4 * 16
    assert all(len(decode) == 2 for decode in decodes[41:46])


def test_a_stream_that_was_left_leaves_nothing(make):
    llm = make(n_seq_max=2)
    for _ in range(5):
        pieces = Conversation(llm, n_predict=9).stream("hello")
        next(pieces)
        pieces.close()
    gc.collect()
    assert len(llm._engine._left) <= 1


def test_a_newcomer_sits_beside_those_that_are_decoded(make, recorded):
    """llama.cpp computes slots in one graph only if no other slot lies between them."""
    llm = make(n_seq_max=4)
    talks = [Conversation(llm, temp=0.0, n_predict=4) for _ in range(4)]
    for talk in [*talks, talks[1]]:  # all slots have a text, and the second's is not the one decoded longest ago
        talk.say("hello")
    held = {talk: talk._text.slot for talk in talks}
    decodes = recorded(llm)
    newcomers = [Conversation(llm, temp=0.0, n_predict=4) for _ in range(2)]
    say_together({talk: "who are you?" for talk in newcomers})
    slots = sorted(talk._text.slot for talk in newcomers)
    assert slots[1] - slots[0] == 1 and max(map(len, decodes)) == 2
    assert held[talks[0]] in slots  # the first had nobody to sit beside


def test_a_text_without_a_slot_waits_for_one(make, recorded, monkeypatch):
    """Another thread has the only one, and its request calls functions of that thread."""
    llm = make(n_seq_max=1)
    engine = llm._engine
    holder, newcomer, once = engine.text(), engine.text(), make()._engine.text()
    holder.eval([5, 6, 7])
    request, tried, take = Request(holder), threading.Event(), engine.slots.take
    request.calls_back = True
    request.ask([9])
    engine._wanted[request] = 0  # its thread has not come to the lock yet

    def taken(*arguments):
        slot = take(*arguments)
        if slot is None:
            tried.set()
        return slot

    monkeypatch.setattr(engine.slots, "take", taken)
    decodes = recorded(llm)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(newcomer.eval, [7, 8])
        assert tried.wait(TIMEOUT)
        assert holder.slot == 0 and newcomer.slot is None and not decodes
        engine.wait([request])
        other.result(TIMEOUT)
    assert decodes == [{0: 1}, {0: 2}]
    once.eval([7, 8])
    np.testing.assert_array_equal(newcomer.state, once.state)


def test_nothing_to_decode_is_no_decode(make, recorded):
    llm = make()
    text = llm._engine.text()
    text.eval([5, 6, 7])
    decodes = recorded(llm)
    assert text.eval([]).n_tokens == 3 and not decodes
    text.lost_kv()  # now there is
    assert text.eval([]).n_tokens == 3 and decodes == [{text.slot: 3}]


def test_what_cannot_go_on_ends_alone(make):
    """What one request asks for next fails: the other in the decode goes on."""

    class Again(Request):
        fails = None

        def follow(self):
            if self.fails is not None:
                raise self.fails
            if self.text.n_tokens < 4:
                self.ask([9])

    llm = make()
    requests = [Again(llm._engine.text()) for _ in range(2)]
    requests[0].fails = ValueError("no more")
    for request in requests:
        request.ask([5, 6])
    while waiting := [request for request in requests if not request.is_over]:
        llm._engine.wait(waiting)
    assert [request.text.n_tokens for request in requests] == [2, 4]
    assert [request.error for request in requests] == [requests[0].fails, None]


def test_who_keeps_the_lock_waits_for_no_other_thread(make):
    """Who could not come before it lets go."""
    llm = make()
    llm._engine.patience = (0.2, 10**9)
    text, pieces = llm._engine.text(), Conversation(llm, n_predict=9).stream("hello")
    text.eval([5, 6])
    in_threads(lambda: next(pieces))
    assert len(llm._engine._left) == 1
    with llm._engine.lock:
        text.eval([7])
    assert len(llm._engine._left) == 1  # not given up as late
    text.eval([8])
    assert len(llm._engine._left) == 0
    pieces.close()
