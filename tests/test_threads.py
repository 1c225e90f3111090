"""Several threads on one model: none crashes, none waits forever, and none changes another's memory.

Tests that could crash or hang run in a process of their own, with a time limit.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LogitsProcessorList

from pydeltamem import Conversation, DeltaMemLlama, InputError, MemoryFileError, ModelError, memory, say_together
from pydeltamem.runtime.lock import FairLock

GREEDY = {"n_predict": 8, "temp": 0.0}
SAID = ["my name is ada", "i live in lima", "what is my name", "good bye"]
TIMEOUT = 300  # seconds; a run takes a few


def load(base, adapter, **options):
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, **options}
    return DeltaMemLlama(base, deltamem_path=adapter, verbose=False, **options)


def at_once(*works):
    """Runs the functions in threads that begin together. Raises the first error."""
    barrier = threading.Barrier(len(works))

    def begin(work):
        barrier.wait(TIMEOUT)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(begin, work) for work in works]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]


def in_a_process(name, *args):
    """Runs a function of this module in a process of its own."""
    code = f"import sys, pydeltamem, test_threads; test_threads.{name}(*sys.argv[1:]); print('all done')"
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *map(str, args)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all done" in result.stdout


@pytest.fixture
def files(base, adapter):
    return base(), adapter("qwen3", "tsw_qo")


# what each thread does; the same alone


def talk(llm, i):
    """A conversation that uses every method. Returns it."""
    mine = Conversation(llm, system=f"you are number {i}", **GREEDY)
    for content in SAID:
        mine.say(f"{content} {i}")
        assert np.isfinite(mine.memory.state).all()
    mine.undo()
    mine.edit(f"and who am i {i}")
    mine.add("user", f"a note of {i}")
    for n, _ in enumerate(mine.stream("tell me more", seed=i, temp=1.0)):
        if n == 2:
            break
    mine.regenerate(seed=i, temp=1.0)
    mine.clear()
    mine.say(f"once more {i}")
    return mine


def ask(llm, i):
    """The model's own text."""
    return llm.create_completion(f"number {i} says", max_tokens=8, temperature=0.0)["choices"][0]["text"]


def side_by_side(base, adapter):
    """Enough slots for all: each ends as if it had been alone."""
    n = 4
    llm, alone = (load(base, adapter, n_seq_max=n + 1) for _ in range(2))
    expected = [talk(alone, i) for i in range(n)]
    for _ in range(2):
        ones = at_once(*(lambda i=i: talk(llm, i) for i in range(n)))
        for mine, other in zip(ones, expected):
            assert mine.messages == other.messages
            np.testing.assert_allclose(mine.memory.state, other.memory.state, rtol=0, atol=1e-6)
            mine.close()


def crowded(base, adapter):
    """Fewer slots than texts, and batches of 16 tokens: the texts take slots from one another."""
    llm = load(base, adapter, n_seq_max=2, n_batch=16, n_ubatch=16)
    llm.memory.write = False
    ones = at_once(
        *(lambda i=i: talk(llm, i) for i in range(3)),
        lambda: [ask(llm, i) for i in range(5)],
        lambda: [llm.detokenize(llm.tokenize(b"hello there " * 20)) for _ in range(200)],
    )
    for mine in ones[:3]:
        assert [message["role"][0] for message in mine.messages] == list("sua")
        assert np.isfinite(mine.memory.state).all() and mine.memory.state.any()


def closed_while_it_speaks(base, adapter):
    """Calls in other threads raise ModelError; nothing that they use is freed."""
    for _ in range(10):
        llm = load(base, adapter, n_seq_max=4)
        begun = threading.Semaphore(0)

        def until_closed(work, begun=begun):
            try:
                while True:
                    work()
                    begun.release()
            except ModelError:
                return

        ada, bob = Conversation(llm, n_predict=30, temp=1.0), Conversation(llm, n_predict=30)
        threads = [
            threading.Thread(target=until_closed, args=[work])
            for work in (
                lambda ada=ada: ada.say("hello"),
                lambda bob=bob: [bob.clear(), list(bob.stream("hello"))],
                lambda llm=llm: ask(llm, 1),
                lambda llm=llm: llm.tokenize(b"hello there " * 500),
                lambda llm=llm: llm.eval([5, 6, 7]) if llm.n_tokens < 400 else llm.reset(),
            )
        ]
        for thread in threads:
            thread.start()
        for _ in range(8):
            begun.acquire()
        llm.close()
        for thread in threads:
            thread.join()
        ada.close(), bob.close()


def streams_that_are_dropped(base, adapter):
    """Streams that nobody ends, some in cycles for the garbage collector."""
    llm = load(base, adapter, n_seq_max=4)

    def drop(i):
        mine = Conversation(llm, **GREEDY)
        for n in range(15):
            stream = mine.stream(f"hello {n} {i}")
            next(stream, None)
            cycle = [stream]
            cycle.append(cycle)
            del stream, cycle
            if n % 3 == 0:
                mine.say("and")
            if n % 4 == 0:
                mine.clear()

    at_once(*(lambda i=i: drop(i) for i in range(3)))


def nothing_swallows_the_output(base, adapter):
    """llama_cpp sends the output of the whole process to nowhere while it loads a model or reads a grammar."""
    llm = load(base, adapter, n_seq_max=4)

    def read():
        for _ in range(1000):
            Conversation(llm, grammar='root ::= "a"')

    at_once(read, read, read, *[lambda: [load(base, adapter).close() for _ in range(5)]] * 2)


def forked(base, adapter):
    """A process forked from one that had computed on several threads gives the same reply."""
    llm = load(base, adapter, n_threads=2, n_threads_batch=2)
    mine = Conversation(llm, **GREEDY)
    mine.say("hello")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT // 2)  # instead of waiting forever
    said = "\n".join(mine.say(content) for content in SAID).encode()
    if child == 0:
        os.write(writer, said)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == said
    assert os.waitpid(child, 0)[1] == 0


def forked_while_others_decode(base, adapter):
    """A child of a process whose other threads decode, each in its own text and one in the model's, may use them all.
    So may the parent.
    """
    llm = load(base, adapter, n_seq_max=3, n_batch=16)
    ones = [Conversation(llm, n_predict=30, temp=1.0) for _ in range(2)]
    is_over = threading.Event()

    def until_over(work):
        while not is_over.is_set():
            work()

    threads = [
        threading.Thread(target=until_over, args=[work])
        for work in (
            *(lambda one=one: (one.clear(), one.say("hello " * 20)) for one in ones),
            lambda: (llm.reset(), llm.eval([5] * 300)),
        )
    ]
    for thread in threads:
        thread.start()
    draw = random.Random(0)
    for _ in range(6):
        is_over.wait(draw.uniform(0, 0.1))
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT // 4)  # instead of waiting forever
            try:
                talk(llm, 0)
                for one in ones:
                    one.say("hello")
                    assert one.messages[-1]["role"] == "assistant" and np.isfinite(one.memory.state).all()
                llm.reset()
                ask(llm, 1)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    is_over.set()
    for thread in threads:
        thread.join()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
needs_own_threads = pytest.mark.skipif(
    b"OPENMP = 1" in llama_cpp.llama_print_system_info(), reason="built with OpenMP, whose threads a fork loses"
)


@pytest.mark.parametrize(
    "run",
    [
        side_by_side,
        crowded,
        closed_while_it_speaks,
        streams_that_are_dropped,
        nothing_swallows_the_output,
        pytest.param(forked, marks=[needs_fork, needs_own_threads]),
        pytest.param(forked_while_others_decode, marks=[needs_fork, needs_own_threads]),
    ],
)
def test_in_threads(files, run):
    in_a_process(run.__name__, *files)


# locks


def test_others_speak_between_two_pieces(make):
    """The lock is held for a decode, not for a reply."""
    llm = make(n_seq_max=3)
    ada, bob = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    expected = Conversation(llm, **GREEDY).say("hello")
    stream, own = ada.stream("my name is ada"), llm.generate([5, 6, 7], temp=0.0)
    pieces, tokens = [next(stream)], [next(own)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bob.say, "hello").result(TIMEOUT) == expected
        pieces += pool.submit(list, stream).result(TIMEOUT)  # goes on in another thread
        tokens.append(pool.submit(next, own).result(TIMEOUT))
    assert ada.messages[-1]["content"] == "".join(pieces)
    alone = make()
    generated = alone.generate([5, 6, 7], temp=0.0)
    assert tokens == [next(generated), next(generated)]


@pytest.mark.parametrize("how", ["eval", "say", "generate"])
def test_others_speak_between_two_batches_of_a_prompt(make, monkeypatch, how):
    llm = make(n_seq_max=3, n_batch=16, n_ubatch=16)
    ada, bob = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    long = "hello " * 70
    read = {
        "eval": lambda: llm.eval([5] * 400),
        "say": lambda: ada.say(long),
        "generate": lambda: next(llm.generate([5] * 400)),
    }[how]
    order, begun = [], threading.Event()
    decode = type(llm._ctx).decode

    def recorded(ctx, batch):
        order.append(threading.current_thread().name)
        decode(ctx, batch)
        begun.set()

    monkeypatch.setattr(type(llm._ctx), "decode", recorded)
    reader = threading.Thread(target=read, name="reader")
    reader.start()
    assert begun.wait(TIMEOUT)
    speaker = threading.Thread(target=lambda: bob.say("hello", n_predict=1), name="speaker")
    speaker.start()
    for thread in (reader, speaker):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert order.index("speaker") < len(order) - 1 - order[::-1].index("reader")


@pytest.mark.parametrize("what", ["n_tokens", "write"])
def test_nobody_sets_anything_in_the_middle_of_a_call(make, read_once, what):
    """It waits for the end of the call, which is whole."""
    llm, threads = make(n_batch=4), []

    def change():
        setattr(*((llm, "n_tokens", 2) if what == "n_tokens" else (llm.memory, "write", False)))

    def between(_):
        if not threads:
            threads.append(threading.Thread(target=change))
            threads[0].start()
            time.sleep(0.1)

    llm._engine.stepped = between
    llm.eval(range(20, 40))
    threads[0].join(TIMEOUT)
    assert llm.n_tokens == (2 if what == "n_tokens" else 20) and llm.memory.write == (what == "n_tokens")
    np.testing.assert_allclose(llm._text.position.checkpoint.state, read_once(range(20, 40)), rtol=0, atol=2e-6)


def test_nobody_is_overtaken_for_ever(make):
    """A thread that decodes again and again lets another one in between."""
    llm = make(n_seq_max=3)
    ada, bob = Conversation(llm, temp=0.0), Conversation(llm, temp=0.0)
    ended, n_before, halfway = [], [], threading.Event()

    def keep_on(_, scores):
        scores[list(ends)] = -np.inf
        return scores

    ends = {token for token in range(llm.n_vocab()) if llm._engine.slots.is_end(token)}
    options = {"logits_processor": LogitsProcessorList([keep_on])}

    def speak():
        for n, _ in enumerate(ada.stream("hello", n_predict=300, **options)):
            if n == 20:
                halfway.set()
            if not ended:
                n_before.append(n)

    thread = threading.Thread(target=speak)
    thread.start()
    assert halfway.wait(TIMEOUT)
    bob.say("hello", n_predict=8, **options)
    ended.append(True)
    thread.join(TIMEOUT)
    assert not thread.is_alive() and n_before[-1] < 150


def test_a_turn_is_whole(make):
    """Threads that speak in one conversation take turns."""
    llm = make(n_seq_max=2)
    ada = Conversation(llm, **GREEDY)
    replies = at_once(*(lambda i=i: ada.say(f"this is {i}") for i in range(4)))
    assert [message["role"][0] for message in ada.messages] == list("uaua" * 2)
    assert sorted(message["content"] for message in ada.messages[1::2]) == sorted(replies)
    one = Conversation(llm, **GREEDY)
    for message in ada.messages[::2]:
        one.say(message["content"])
    assert one.messages == ada.messages
    np.testing.assert_allclose(one.memory.state, ada.memory.state, rtol=0, atol=1e-6)


def test_a_completion_is_whole(make):
    """So do threads that ask the model itself."""
    llm, alone = make(n_seq_max=2), make()
    for model in (llm, alone):
        model.memory.write = False
    expected = [ask(alone, i) for i in range(4)]
    assert at_once(*(lambda i=i: ask(llm, i) for i in range(4))) == expected

    async def workers():
        return await asyncio.gather(*(asyncio.to_thread(ask, llm, i) for i in range(4)))

    assert asyncio.run(workers()) == expected


def test_turns_together(make):
    """Threads that speak to the same conversations, in whichever order."""
    llm = make(n_seq_max=3)
    ada, bob = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    at_once(
        *(lambda: say_together({ada: "hello", bob: "there"}) for _ in range(2)),
        *(lambda: say_together({bob: "good", ada: "bye"}) for _ in range(2)),
    )
    for one in (ada, bob):
        assert [message["role"][0] for message in one.messages] == list("uaua" * 2)


def test_a_stream_ends_when_another_thread_speaks(make):
    llm = make(n_seq_max=2)
    ada = Conversation(llm, **GREEDY)
    stream = ada.stream("my name is ada")
    first = next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ada.say, "hello").result(TIMEOUT)
    assert list(stream) == []
    assert ada.messages[1]["content"].startswith(first) and len(ada.messages) == 4


def test_the_models_text_is_changed_by_another_thread(make):
    llm = make()
    generated = llm.generate([5, 6, 7], temp=0.0)
    next(generated)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(llm.eval, [8, 9]).result(TIMEOUT)
    with pytest.raises(InputError):
        next(generated)


def test_a_callback_does_not_wait_for_ever(make):
    """It runs with the lock held that the other thread waits for."""
    llm = make(n_seq_max=3)
    ada, bob = Conversation(llm, **GREEDY), Conversation(llm, **GREEDY)
    is_bobs, may_look = threading.Event(), threading.Event()
    raised = []

    def look(_, scores):
        may_look.set()
        is_bobs.wait(TIMEOUT)
        with pytest.raises(InputError):
            _ = bob.memory.state
        raised.append(True)
        return scores

    def speak():
        with bob._text.turn:  # as in the middle of a call
            assert may_look.wait(TIMEOUT)
            is_bobs.set()
            bob.say("hello")

    thread = threading.Thread(target=speak)
    thread.start()
    ada.say("hello", logits_processor=LogitsProcessorList([look]), n_predict=1)
    thread.join(TIMEOUT)
    assert raised and not thread.is_alive() and len(bob.messages) == 2


def test_a_memory_file_outlives_an_adapter_that_comes_as_it_is_saved(make, tmp_path):
    """Attaching empties the memory: that of the file stays."""
    llm, path = make(), tmp_path / "ada.memory"
    with Conversation(llm, memory_file=path, **GREEDY) as ada, ThreadPoolExecutor(1) as pool:
        ada.say("hello")
        before = path.read_bytes()
        with llm._engine.lock:  # as in a decode
            saved = pool.submit(ada.save)
            time.sleep(0.1)
            llm.memory.attach()
        with pytest.raises(MemoryFileError):
            saved.result(TIMEOUT)
        assert path.read_bytes() == before


def test_an_adapter_that_is_fetched_keeps_nobody_waiting(make, monkeypatch):
    llm = make()
    fetched = memory.adapter_file

    def fetch(*arguments):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(llm.eval, [5, 6, 7]).result(TIMEOUT)
        return fetched(*arguments)

    monkeypatch.setattr(memory, "adapter_file", fetch)
    llm.memory.attach(llm.deltamem_path)
    assert llm.n_tokens == 3 and llm.memory.n_written == 0


def test_a_seed_is_of_one_reply(make):
    """What one is told does not show in another: a seed of one is not that of the next."""
    llm, alone = make(n_seq_max=2, seed=3), make(seed=3)
    Conversation(llm, n_predict=1, temp=1.0).say("hello", seed=11)
    options = {"n_predict": 12, "temp": 2.0}
    assert Conversation(llm, **options).say("hello") == Conversation(alone, **options).say("hello")


@pytest.mark.skipif(
    not hasattr(signal, "setitimer") or not hasattr(threading.RLock(), "_recursion_count"),
    reason="no timer that interrupts, or a Python that does not count how often a lock is held",
)
def test_an_interrupt_leaves_no_lock_behind():
    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    lock, draw, n = FairLock(), random.Random(3), 0
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while n < 1000:
            try:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(2e-5, 2e-4))
                with lock:
                    while True:
                        with lock:
                            pass
            except Interrupt:
                n += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not lock._is_owned()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
