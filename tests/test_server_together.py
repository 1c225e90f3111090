"""The service under the server: many turns at once. Nobody hears another, and who goes away ends at the next step."""

from __future__ import annotations

import asyncio
import os
import random
import threading

import numpy as np
import pytest

from pydeltamem import InputError, ModelError
from pydeltamem.server import AsyncDeltaMem, history
from pydeltamem.server.holds import SessionBusy
from pydeltamem.server.records import SessionLimit
from pydeltamem.server.store import Store
from pydeltamem.server.worker import QueueFull
from turns import ENDLESS, F32, GREEDY, LETTERS, SAME, assistant, say, state_of, text_of, user

pytestmark = pytest.mark.anyio  # runs the tests that are coroutines


async def test_a_chat_with_many_runs_of_known_messages(serving, monkeypatch):
    """Found: it was rendered from its beginning twice for each of them, 10 s of a thousand messages, and all waited."""
    rendered = []
    begins = history.begins
    monkeypatch.setattr(history, "begins", lambda render, said, i: rendered.append(i) or begins(render, said, i))

    async with serving(n_ctx=2048) as service:
        await say(service, [user("x"), assistant("a"), user("b")])
        before = (await service.get("ada")).tokens
        several = [message for i in range(3) for message in (user(str(i)), assistant("a"), user("b"))]
        answer = await say(service, [user("y"), *several])
        n_written = answer.committed.tokens_written - before
        assert n_written < answer.n_prompt + answer.n_generated and rendered  # what is known is not written again
        rendered.clear()
        many = [message for i in range(25) for message in (user(f"{i}."), assistant("a"), user("b"))]
        await say(service, [user("z"), *many])
        assert 0 < len(rendered) < 40


def test_the_longest_runs_are_kept():
    marks = [True, False, True, True, True, False, False, True, True]
    assert history.fewer_runs(marks, 2) == [False, False, True, True, True, False, False, True, True]
    assert history.fewer_runs(marks, 3) == marks and history.fewer_runs([], 2) == []
    assert not any(history.fewer_runs(marks, 0))


async def test_a_second_turn_of_a_session_waits_or_is_refused(serving):
    async with serving(turn_timeout=0.1) as service:
        await say(service, [user("hello there")])
        hold = threading.Event()
        service.worker.call(hold.wait)  # nothing is decoded meanwhile
        first = service.chat([user("and yours")], session="ada", **GREEDY)
        await first.start()
        with pytest.raises(SessionBusy):
            await say(service, [user("me too")])
        hold.set()
        await first.whole()
        assert (await say(service, [user("me too")])).committed.version == 3


async def test_sessions_that_begin_at_once_count_for_the_limit(serving):
    """Found: an owner who had one place left could begin as many sessions at once as slots and queue have room."""
    async with serving(n_sessions=2) as service:
        await say(service, [user("hello there")], session="first", owner="x")
        turns = [say(service, [user("hello there")], session=name, owner="x") for name in ("second", "third")]
        turns += [service.fork("first", "fourth", "x"), say(service, [user("hello there")], session="first", owner="x")]
        turns += [say(service, [user("hello there")], session="another", owner="y")]
        results = await asyncio.gather(*turns, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results[:3])[1:] == ["SessionLimit"] * 2
        assert not [result for result in results[3:] if isinstance(result, Exception)]
        assert service.store.count("x") == 2

        begun = next(each.name for each in await service.list("x") if each.name != "first")
        await service.delete(begun, "x")
        empty = {**GREEDY, "max_tokens": 0}
        assert not (await say(service, [user("hello there")], session="none", owner="x", **empty)).counts
        await say(service, [user("hello there")], session="last", owner="x")  # what did not begin takes no place
        with pytest.raises(SessionLimit):  # nor does it keep one
            await say(service, [user("hello there")], session="none", owner="x")
        only_reads = await say(service, [user("hello there")], session="fifth", owner="x", write=False)
        assert only_reads.counts and service.store.count("x") == 2


async def test_the_queue_of_a_session_has_an_end(serving):
    """Found: any number of requests could wait for one session, each with its prompt."""
    async with serving(n_seq_max=1, n_queue=2, turn_timeout=60) as service:
        hold = threading.Event()
        service.worker.call(hold.wait)  # nothing is decoded meanwhile
        turns = [asyncio.create_task(say(service, [user("hello there")])) for _ in range(5)]
        await asyncio.wait(turns, return_when=asyncio.FIRST_EXCEPTION, timeout=30)
        hold.set()
        results = await asyncio.gather(*turns, return_exceptions=True)
        assert [type(result) for result in results if isinstance(result, Exception)] == [QueueFull] * 2
        assert (await service.get("ada")).version == 3


async def test_the_queue_has_an_end(serving):
    async with serving(n_seq_max=1, n_queue=1) as service:
        answers = [service.chat([user("hello there")], session=f"s{i}", max_tokens=100, **LETTERS) for i in range(6)]
        results = await asyncio.gather(*(answer.whole() for answer in answers), return_exceptions=True)
        assert any(isinstance(result, QueueFull) for result in results)
        assert any(isinstance(result, str) for result in results)
        assert all(isinstance(result, (str, QueueFull)) for result in results)


@pytest.mark.parametrize("ends", ["answered", "cancelled"])
async def test_a_full_queue_is_no_standstill(serving, ends):
    """Found: between two steps of a server with a full queue, /health/live said that it is stuck."""

    async with serving(n_seq_max=1, n_queue=1) as service:
        hold = threading.Event()
        service.worker.call(hold.wait)  # nothing is decoded meanwhile
        answers = [service.chat([user("hello there")], session=f"s{i}", **GREEDY) for i in range(2)]
        for answer in answers:
            await answer.start()
        assert not await service.can_decode(0.1)
        asked = asyncio.create_task(service.can_decode(60))
        await asyncio.wait([asked], timeout=0.3)
        for answer in answers if ends == "cancelled" else ():
            answer.cancel()
        hold.set()
        assert await asked
        for answer in answers:
            await answer.whole()


async def test_owners_take_turns(serving):
    async with serving(n_seq_max=1) as service:
        ends = []

        async def one(owner, i):
            await service.chat([user("hello there")], session=f"s{i}", owner=owner, **GREEDY).whole()
            ends.append(owner)

        await asyncio.gather(*(one("many", i) for i in range(8)), one("few", 0))
        assert "few" in ends[:4]


async def test_an_answer_that_comes_back_in_other_tokens(serving, read_once):
    """What is sent back differs from what was sampled: it is read as it is now, counts once, and can be undone."""

    async with serving() as service:
        messages = [user("hello there")]
        await say(service, messages, grammar='root ::= "h" "e" "l" "l" "o" " " "I"')
        one = await state_of(service)
        for said in ["my name is Ada", "and yours"]:
            messages.append(user(said))
            answer = await say(service, messages)
            assert answer.committed.tokens_written == len(text_of(service))
            np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)
        assert (await service.get("ada")).turns == 3
        await service.undo("ada")
        assert (await service.undo("ada")).turns == 1
        np.testing.assert_array_equal(await state_of(service), one)


async def test_who_goes_away_ends_within_a_step(serving, read_once):
    """What was said so far counts; and the others notice nothing."""

    async with serving() as service:
        alone = await service.chat([user("and yours")], max_tokens=30, **LETTERS).whole()
        long = service.chat([user("hello there")], session="ada", max_tokens=300, **LETTERS)
        other = asyncio.create_task(service.chat([user("and yours")], max_tokens=30, **LETTERS).whole())
        said = ""
        async for piece in long:
            said += piece.text
            if len(said) > 10:
                break
        await other
        while service._shared.turns:
            await asyncio.sleep(0.01)
        assert other.result() == alone
        assert long.n_generated < 300
        record = await service.get("ada")
        assert record.version == 1
        assert record.tokens == len(text_of(service))
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)


async def test_pieces_that_nobody_took_in_time_come_together(serving):
    """A loop that is behind sends less often, not ever later."""

    async with serving() as service:
        answer = service.chat([user("hello there")], max_tokens=30, **LETTERS)
        pieces = []
        async for piece in answer:
            pieces.append(piece.text)
            while answer.finish_reason is None:
                await asyncio.sleep(0.001)
        assert len(pieces) <= 2
        assert "".join(pieces) == answer.content
        assert answer.n_generated > 2


async def test_closing_cuts_what_runs_too_long_and_commits_it(serving, tmp_path):
    service = serving()
    answer = service.chat([user("hello there")], session="ada", max_tokens=450, **ENDLESS)
    pieces = aiter(answer)
    said = (await anext(pieces)).text
    await service.aclose(0)
    said += "".join([piece.text async for piece in pieces])
    store = Store(f"sqlite:///{tmp_path / 'sessions.db'}")
    assert store.get("", "ada").tokens == answer.committed.tokens_written
    assert 0 < len(said) == answer.n_generated < 450 and answer.finish_reason == "length"
    store.close()


async def test_a_cut_ends_what_runs_and_fails_what_has_no_token(serving):
    async with serving(n_seq_max=1) as service:
        answer = service.chat([user("hello there")], session="ada", max_tokens=450, **ENDLESS)
        waits = service.chat([user("hello there")], session="bo", **GREEDY)
        pieces = aiter(answer)
        said = (await anext(pieces)).text
        await waits.start()
        service.cut()
        said += "".join([piece.text async for piece in pieces])
        assert 0 < len(said) == answer.n_generated < 450 and answer.finish_reason == "length"
        for late in (waits, service.chat([user("hello there")], session="carl", **GREEDY)):
            with pytest.raises(ModelError):
                await late.whole()
        (record,) = await service.list()
        assert (record.name, record.version, record.tokens) == ("ada", 1, answer.committed.tokens_written)


def before_each_decode(service, monkeypatch, act):
    """Calls `act` before each step of the service."""
    slots = service.llm._engine.slots
    decode = slots.decode

    def decoded(*arguments):
        act()
        return decode(*arguments)

    monkeypatch.setattr(slots, "decode", decoded)


async def test_a_cut_while_a_prompt_is_decoded_leaves_the_session(make_llm, monkeypatch):
    async with AsyncDeltaMem(make_llm(n_seq_max=2, n_batch=32, **F32)) as service:
        await say(service, [user("hello there")])
        before = await service.get("ada")
        before_each_decode(service, monkeypatch, service.cut)
        with pytest.raises(ModelError):
            await service.chat([user("word " * 120)], session="ada", **GREEDY).whole()
        assert await service.get("ada") == before


EMPTY = {
    "the end at once": {"grammar": 'root ::= ""'},
    "no tokens": {"max_tokens": 0},
    "a stop string at once": {"stop": ["q", "x", "z"]},
}


@pytest.mark.parametrize("chat", ["goes on", "goes back", "begins"])
@pytest.mark.parametrize("how", list(EMPTY))
async def test_an_empty_answer_leaves_the_session(serving, read_once, how, chat):
    async with serving() as service:
        messages = []
        for said in ["hello there", "my name is Ada"]:
            messages.append(user(said))
            await say(service, messages)
        before, text = await service.get("ada"), text_of(service)
        asked = {
            "goes on": [*messages, user("go on")],
            "goes back": [*messages[:2], user("something else")],
            "begins": [user("quite another thing")],
        }[chat]
        empty = service.chat(asked, session="ada", **{**GREEDY, **EMPTY[how]})
        assert await empty.whole() == "" and not empty.counts
        assert empty.finish_reason == ("length" if how == "no tokens" else "stop")
        assert (empty.committed.version, empty.committed.tokens_written) == (before.version, before.tokens)
        assert await service.get("ada") == before and text_of(service) == text

        messages.append(user("and yours"))
        answer = await say(service, messages)
        tokens = text_of(service)
        assert answer.counts and answer.committed.tokens_written == len(tokens)
        np.testing.assert_allclose(await state_of(service), read_once(tokens), **SAME)


@pytest.mark.parametrize("how", list(EMPTY))
async def test_an_empty_answer_begins_no_session(serving, how):
    async with serving() as service:
        for session in ("ada", None):
            answer = service.chat([user("hello there")], session=session, **{**GREEDY, **EMPTY[how]})
            assert await answer.whole() == "" and not answer.counts
        assert await service.list() == []
        assert (await say(service, [user("hello there")])).committed.version == 1


async def test_cancelled_before_its_first_token_it_does_not_count(serving):
    async with serving() as service:
        await say(service, [user("hello there")])
        before = await service.get("ada")
        hold = threading.Event()
        service.worker.call(hold.wait)  # nothing is decoded meanwhile
        answer = service.chat([user("word " * 120)], session="ada", **GREEDY)
        await answer.start()
        answer.cancel()
        hold.set()
        assert await answer.whole() == ""
        assert await service.get("ada") == before
        await say(service, [user("hello there"), assistant("x"), user("go on")])

        answer = service.chat([user("well then")], session="ada", **GREEDY)
        before = await service.get("ada")
        answer.cancel()  # before it began
        assert await answer.whole() == ""
        assert await service.get("ada") == before


@pytest.mark.parametrize("chat", ["goes on", "begins"])
async def test_cancelled_while_its_prompt_is_decoded_it_does_not_count(make_llm, monkeypatch, chat):
    async with AsyncDeltaMem(make_llm(n_seq_max=2, n_batch=32, **F32)) as service:
        messages = [user("hello there")]
        await say(service, messages)
        before, text = await service.get("ada"), text_of(service)
        new = [user("word " * 120)]
        answer = service.chat(new if chat == "begins" else messages + new, session="ada", **GREEDY)
        before_each_decode(service, monkeypatch, answer.cancel)
        assert await answer.whole() == "" and answer.committed.version == before.version
        monkeypatch.undo()
        assert await service.get("ada") == before and text_of(service) == text
        answer = await say(service, [*messages, user("go on")])
        assert answer.committed.tokens_written == len(text_of(service))


async def test_a_session_that_joins_waits_for_no_step(serving):
    """It is in the queue while another step runs, whether it was ready in memory or not."""

    async with serving() as service:
        await say(service, [user("hello there")], session="ready")
        held, hold = threading.Event(), threading.Event()
        service.worker.call(lambda: (held.set(), hold.wait(60)))  # in place of a step
        assert held.wait(60)
        try:
            answers = [service.chat([user("hello there")], session=name, **GREEDY) for name in ("ready", "new")]
            for answer in answers:
                await asyncio.wait_for(answer.start(), 30)
            assert service.worker.n_waiting == 2
        finally:
            hold.set()
        assert all([await answer.whole() for answer in answers])
        assert {record.name: record.version for record in await service.list()} == {"ready": 2, "new": 1}


def schedule(seed, n_sessions, n_turns):
    """Random turns: (session, kind, number)."""
    draw = random.Random(seed)
    kinds = ["say"] * 8 + ["again", "edit", "new", "forget", "cancel", "wrong", "undo", "read"]
    return [(draw.randrange(n_sessions), draw.choice(kinds), draw.randrange(1000)) for _ in range(n_turns)]


WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "my",
    "name",
    "is",
    "Ada",
    "where",
    "do",
    "you",
    "live",
    "tell",
    "me",
    "more",
    "of",
    "it",
    "please",
]


async def play(service, name, turns, chats):
    """Plays the turns of one session. `chats`: its messages, changed. Returns the answers."""
    said = []
    for _, kind, number in turns:
        draw = random.Random(number)
        words = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
        messages = list(chats[-1]) if chats else []
        if kind == "new" or not messages:
            messages, kind = [], "new"
        if kind in ("again", "edit") and len(messages) >= 2:
            last = messages[-2]["content"]
            messages = [*messages[:-2], user(last if kind == "again" else words)]
        elif kind == "forget":
            await service.forget_text(name)
            messages = [user(words)]
        elif kind == "undo":
            try:
                await service.undo(name)
            except InputError:
                continue
            chats.append([])
            continue
        elif kind == "wrong":
            with pytest.raises(InputError):
                await service.chat(messages, session=name, temperature=-1).whole()
            with pytest.raises(InputError):
                await service.chat([user("word " * 3000)], session=name, **GREEDY).whole()
            continue
        else:
            messages.append(user(words))
        if len(messages) > 12:
            messages = messages[-3:]
        if kind == "read":
            said.append(await service.chat(messages, session=name, write=False, **GREEDY).whole())
            continue
        answer = service.chat(messages, session=name, max_tokens=1 + number % 7, **LETTERS)
        said.append(await answer.whole())
        chats.append([*messages, assistant(said[-1])])
    return said


# `make server-schedules` plays more
N_TURNS = int(os.environ.get("DELTAMEM_SERVER_TURNS", "120"))
N_SESSIONS, N_SLOTS = (8, 3) if N_TURNS < 1000 else (16, 4)


@pytest.mark.parametrize("seed", range(1, 3))
def test_nobody_hears_another(serving, make_llm, tmp_path, seed):
    """Random turns of several at once, in fewer slots: answers and memories are those of each one alone."""
    n_sessions = N_SESSIONS
    turns = schedule(seed, n_sessions, N_TURNS)

    async def together():
        async with serving(n_seq_max=N_SLOTS, n_live=4) as service:
            said = await asyncio.gather(
                *(play(service, f"s{i}", [t for t in turns if t[0] == i], []) for i in range(n_sessions))
            )
            return said, [await state_of(service, f"s{i}") for i in range(n_sessions)]

    async def alone(i):
        store = Store(f"sqlite:///{tmp_path / f'alone{i}.db'}")
        async with serving(n_seq_max=1, store=store) as service:
            said = await play(service, f"s{i}", [t for t in turns if t[0] == i], [])
            return said, await state_of(service, f"s{i}")

    said, states = asyncio.run(together())
    for i in range(n_sessions):
        expected, state = asyncio.run(alone(i))
        assert said[i] == expected
        np.testing.assert_allclose(states[i], state, **SAME)
