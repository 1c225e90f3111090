"""The service under the server: one write over requests, restarts and chats; nobody hears another; nothing is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import timedelta

import numpy as np
import pytest

from pydeltamem import DeltaMemError, DeltaMemLlama, InputError, ModelError
from pydeltamem.runtime.chat_format import caught_prompt
from pydeltamem.runtime.history import n_common
from pydeltamem.server import AsyncDeltaMem, history
from pydeltamem.server.history import begins, digests, known_messages
from pydeltamem.server.holds import SessionBusy
from pydeltamem.server.records import (
    NOTHING,
    Conflict,
    Record,
    SessionDamaged,
    SessionUnknown,
    StoreAway,
    StoreError,
    now,
)
from pydeltamem.server.store import Store
from pydeltamem.server.worker import QueueFull
from refusals import refuses

pytestmark = pytest.mark.anyio  # runs the tests that are coroutines

SAME = {"rtol": 0, "atol": 3e-6}  # float32 sums in another order
# letters that no token joins: an answer that is sent back has the tokens that it was sampled with
LETTERS = {"temperature": 0, "grammar": "root ::= [qxz]+"}
GREEDY = {"max_tokens": 6, **LETTERS}
ENDLESS = {"temperature": 0, "grammar": "root ::= [qxz] root"}  # ends when it is cut, and not before
F32 = {"type_k": 0, "type_v": 0}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture
def serving(make_llm, tmp_path):
    """serving(n_seq_max=2, **options): a service on a store in this test's folder."""

    def serve(n_seq_max=2, store=None, n_ctx=512, **options):
        store = Store(f"sqlite:///{tmp_path / 'sessions.db'}") if store is None else store
        return AsyncDeltaMem(make_llm(n_seq_max=n_seq_max, n_ctx=n_ctx, **F32), store, **options)

    return serve


async def say(service, messages, session="ada", **options):
    """Adds the answer to the messages."""
    answer = service.chat(messages, session=session, **{**GREEDY, **options})
    messages.append(assistant(await answer.whole()))
    return answer


def text_of(service, session="ada"):
    return service._shared.live["", session].text.tokens.tolist()


async def state_of(service, session="ada"):
    return (await service.snapshot(session)).state


#
# one write
#


async def test_a_history_that_grows_is_written_once(serving, read_once):
    async with serving() as service:
        messages = []
        for i, said in enumerate(["hello there", "my name is Ada", "and yours"]):
            messages.append(user(said))
            answer = await say(service, messages)
            assert answer.committed.version == i + 1
            assert answer.committed.tokens_written == len(text_of(service))
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("what", ["again", "edit", "edit the first of several", "deeper"])
async def test_going_back_takes_the_memory_back(serving, read_once, what, restart):
    service = serving()
    messages = []
    for said in ["hello there", "my name is Ada", "and yours"]:
        messages.append(user(said))
        await say(service, messages)
    if restart:
        await service.aclose()
        service = serving()
    back = {
        "again": messages[:-1],
        "edit": [*messages[:4], user("something else")],
        "edit the first of several": [*messages[:2], user("something else")],
        "deeper": messages[:3],
    }[what]
    async with service:
        answer = await say(service, back)
        tokens = text_of(service)
        assert answer.committed.tokens_written == len(tokens)
        np.testing.assert_allclose(await state_of(service), read_once(tokens), **SAME)
        assert (await service.get("ada")).turns == {"again": 3, "edit": 3}.get(what, 2)


@pytest.mark.parametrize("what", ["undo", "again", "edit", "deeper"])
async def test_what_is_taken_back_after_a_restart_was_never_there(serving, read_once, what):
    """Undo brings back the memory of before the turn to the last bit, also of a turn that replaced it."""

    messages, before = [], []
    async with serving() as service:
        for said in ["hello there", "my name is Ada", "and yours"]:
            before.append(await state_of(service) if before else 0)
            messages.append(user(said))
            await say(service, messages)
    back = {
        "again": messages[:-1],
        "edit": [*messages[:4], user("something else")],
        "deeper": [*messages[:2], user("something else")],
    }
    async with serving() as service:
        if what in back:
            await say(service, back[what])
        for n in reversed(range(2 if what == "deeper" else 3)):
            record = await service.undo("ada")
            assert record.turns == n
            np.testing.assert_array_equal(await state_of(service), before[n])
        await say(service, [user("hello there")])
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)


async def test_a_restart_writes_nothing_twice(serving, read_once):
    messages = []
    for said in ["hello there", "my name is Ada", "and yours", "well then"]:
        async with serving() as service:  # a server each
            messages.append(user(said))
            answer = await say(service, messages)
            tokens = text_of(service)
            assert answer.committed.tokens_written == len(tokens)
            state = await state_of(service)
    np.testing.assert_allclose(state, read_once(tokens), **SAME)


async def test_another_chat_keeps_the_memory(serving):
    async with serving() as service:
        first, second = [user("hello there")], [user("quite another thing")]
        await say(service, first)
        tokens = text_of(service)
        answer = await say(service, second)
        own = text_of(service)
        assert answer.committed.tokens_written == len(tokens) + len(own) - n_common(tokens, own)

        # back to the first one: its history is in the memory already
        first.append(user("and yours"))
        answer = await say(service, first)
        whole = text_of(service)
        n_new = len(whole) - len(caught_prompt(service.llm, first[:-2]).prompt)
        written = answer.committed.tokens_written - (len(tokens) + len(own) - 1)
        assert 0 < written <= n_new + 8  # the new message and the answer, with their marks
        assert (await service.get("ada")).turns == 3


async def test_a_history_without_its_oldest_messages_is_not_written_again(serving):
    async with serving() as service:
        messages = []
        for said in ["hello there", "my name is Ada", "and yours"]:
            messages.append(user(said))
            await say(service, messages)
        before = (await service.get("ada")).tokens
        trimmed = [*messages[2:], user("well then")]
        answer = await say(service, trimmed)
        n_new = len(caught_prompt(service.llm, [user("well then")]).prompt)
        assert 0 < answer.committed.tokens_written - before <= n_new + 8 + GREEDY["max_tokens"]


async def test_hello_again_does_not_lose_the_memory(serving):
    """A request of one message that opens as the present chat may begin another: a long chat is not taken back."""

    async with serving() as service:
        messages = []
        for said in ["hello there", "my name is Ada"]:
            messages.append(user(said))
            await say(service, messages)
        before = await service.get("ada")
        await say(service, [user("hello there")])
        after = await service.get("ada")
        assert after.turns == before.turns + 1
        assert after.tokens >= before.tokens


async def test_only_reading_leaves_the_session_as_it_is(serving):
    async with serving() as service:
        messages = [user("my name is Ada")]
        await say(service, messages)
        before = await service.get("ada")
        for asked in ([*messages, user("who am I")], [user("who am I")]):
            answer = await say(service, list(asked), write=False)
            assert answer.committed.version == before.version
        after = await service.get("ada")
        assert after == before


async def test_without_a_session_the_memory_is_the_requests_own(serving):
    async with serving() as service:
        messages = [user("hello there")]
        alone = await service.chat(messages, **GREEDY).whole()
        await say(service, [user("my name is Ada")])
        assert await service.chat(messages, **GREEDY).whole() == alone
        longer = [*messages, assistant(alone), user("and yours")]
        answer = service.chat(longer, **GREEDY)
        await answer.whole()
        assert answer.n_cached > 0  # its beginning was decoded already
        assert answer.committed.session is None
        assert [record.name for record in await service.list()] == ["ada"]


async def test_raw_prompts_continue_their_text(serving, read_once):
    async with serving() as service:
        prompt = "once upon a time"
        for _ in range(3):
            answer = service.complete(prompt, session="ada", **GREEDY)
            last = prompt
            prompt += await answer.whole() + " and then"
        assert (await service.get("ada")).turns == 3
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)
        await service.complete(last, session="ada", **GREEDY).whole()
        assert (await service.get("ada")).turns == 3  # the last one, once more
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)


async def test_undo_fork_reset_and_files(serving):
    async with serving() as service:
        messages = [user("hello there")]
        await say(service, messages)
        one = await state_of(service)
        messages.append(user("my name is Ada"))
        await say(service, messages)
        two = await state_of(service)

        await service.fork("ada", "bob")
        with pytest.raises(Conflict):
            await service.fork("ada", "bob")
        undone = await service.undo("ada")
        assert undone.turns == 1
        np.testing.assert_array_equal(await state_of(service), one)
        np.testing.assert_array_equal(await state_of(service, "bob"), two)

        again = [*messages[:2], user("my name is Ada")]
        await say(service, again)
        np.testing.assert_allclose(await state_of(service), two, **SAME)

        await service.replace("carl", await service.snapshot("bob"))
        np.testing.assert_array_equal(await state_of(service, "carl"), two)
        await service.undo("bob")
        await service.undo("bob")
        assert not (await state_of(service, "bob")).any()
        with pytest.raises(InputError):
            await service.undo("bob")
        await service.reset("ada")
        assert not (await state_of(service)).any()
        await service.delete("carl")
        with pytest.raises(SessionUnknown):
            await service.get("carl")
        with pytest.raises(SessionUnknown, match="carl"):
            await service.rename("carl", "dora")


@pytest.mark.parametrize("restart", [False, True])
async def test_a_session_that_begins_as_another_one(serving, read_once, restart):
    """It goes on with text, memory and turns of that, which stays: with its KV cache, or read again."""

    service = serving()
    chat = [user("My name is Ada.")]
    await say(service, chat)
    before, origin = await state_of(service), await service.get("ada")
    chat.append(user("and yours"))
    if restart:
        await service.aclose()
        service = serving()
    async with service:
        first, second = list(chat), list(chat)
        for n, (name, some) in enumerate((("bo", first), ("cy", second)), 1):
            await say(service, some, name, origin=origin)
            assert service.n_ready == n  # it took over what was ready of the other one
        assert first == second
        for name in ("bo", "cy"):
            np.testing.assert_allclose(await state_of(service, name), read_once(text_of(service, name)), **SAME)
            record = await service.get(name)
            assert (record.version, record.turns, record.tokens) == (1, 2, len(text_of(service, name)))
        np.testing.assert_array_equal(await state_of(service), before)
        assert (await service.get("ada")).version == origin.version

        await say(service, [*second, user("again")], "cy", origin=origin)  # which is there: it goes on by itself
        assert (await service.get("cy")).turns == 3
        await service.undo("bo")
        np.testing.assert_array_equal(await state_of(service, "bo"), before)


async def test_a_session_that_begins_as_another_one_was(serving, read_once):
    """That one has gone on since: its text is not taken from it."""

    async with serving() as service:
        chat = [user("My name is Ada.")]
        await say(service, chat)
        origin, other = await service.get("ada"), [*chat, user("and mine")]
        await say(service, [*chat, user("and yours")])
        tokens = text_of(service)
        await say(service, other, "bo", origin=origin)
        assert (await service.get("bo")).turns == 2
        np.testing.assert_allclose(await state_of(service, "bo"), read_once(text_of(service, "bo")), **SAME)
        assert text_of(service) == tokens
        with refuses(InputError, "ada"):
            await say(service, [*chat], "cy", origin=dataclasses.replace(origin, adapter="ab" * 32))


@pytest.mark.parametrize("cut", [False, True])
async def test_a_session_that_begins_as_one_in_use(serving, cut):
    """It does not take the text of that from under it; and nothing is left of a turn that does not count."""

    async with serving() as service:
        chat = [user("My name is Ada.")]
        await say(service, chat)
        origin = await service.get("ada")
        long = service.chat(
            [*chat, user("and yours")], session="ada", max_tokens=40, temperature=0, grammar="root ::= [qxz] root"
        )
        await long.start()
        other = service.chat([*chat, user("and mine")], session="bo", origin=origin, **GREEDY)
        if cut:
            other.cancel()
        await asyncio.gather(other.whole(), long.whole())
        assert long.n_generated == 40 and (await service.get("ada")).turns == 2
        assert [record.name for record in await service.list()].count("bo") == (not cut)


async def test_a_session_that_was_emptied_is_as_a_new_one(serving):
    async with serving() as service:
        await say(service, [user("my name is Ada")])
        await service.reset("ada")
        for name in ("ada", "new"):
            await say(service, [user("and yours")], session=name)
        np.testing.assert_allclose(await state_of(service), await state_of(service, "new"), **SAME)
        assert (await service.get("ada")).tokens == (await service.get("new")).tokens


async def test_nothing_is_done_to_a_session_that_has_gone_on(serving):
    async with serving() as service:
        messages = [user("hello there")]
        stale = [*messages, user("somebody else")]
        one = (await say(service, messages, seen=NOTHING)).committed.identity
        messages.append(user("my name is Ada"))
        two = (await say(service, messages, seen=one)).committed.identity
        before = await service.get("ada")
        assert before.identity == two and (one.version, two.version) == (1, 2)
        later, made_again = two._replace(version=3), two._replace(created=two.created + timedelta(seconds=1))
        for seen in (NOTHING, one, later, made_again):
            with pytest.raises(Conflict):
                await say(service, list(stale), seen=seen)
            with pytest.raises(Conflict):
                await service.undo("ada", seen=seen)
            with pytest.raises(Conflict):
                await service.forget_text("ada", seen=seen)
        assert await service.get("ada") == before
        undone = await service.undo("ada", seen=two)
        assert undone.version == 3
        forgotten = await service.forget_text("ada", seen=undone.identity)
        assert forgotten.text == b""
        await service.delete("ada")
        with pytest.raises(Conflict):
            await say(service, list(stale), seen=forgotten.identity)
        assert await service.list() == []


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("said", [["hello there"], ["hello there", "my name is Ada"], ["another chat"]])
async def test_a_turn_replaces_the_last_one(serving, read_once, said, restart):
    """It counts, or all is as before: the same as undo and another turn, in one commit."""

    service = serving()
    if said == ["another chat"]:
        await say(service, [user("well then")])
    messages = []
    for text in said:
        messages.append(user(text))
        await say(service, messages)
    before = await service.get("ada")
    await service.fork("ada", "twin")
    if restart:
        await service.aclose()
        service = serving()
    async with service:
        new = [*messages[:-2], user("something else")]
        with pytest.raises(InputError):
            await say(service, [*messages[:-2], user("too long " * 2000)], replaces_last=True)
        empty = await say(service, list(new), replaces_last=True, max_tokens=0)
        assert not empty.counts and empty.committed.version == before.version
        assert empty.committed.tokens_written == before.tokens
        await say(service, list(new), replaces_last=True, write=False)
        assert await service.get("ada") == before

        await service.undo("twin")
        await say(service, list(new), "twin")
        answer = await say(service, list(new), replaces_last=True)
        assert answer.committed.version == before.version + 1
        if len(said) == 2 and not restart:  # what stays is not decoded again
            assert answer.n_cached >= before.history[-1].position
        after = await service.get("ada")
        assert after.turns == before.turns and len(after.history) == len(before.history)
        np.testing.assert_allclose(await state_of(service), await state_of(service, "twin"), **SAME)
        if said != ["another chat"]:
            np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)
        np.testing.assert_array_equal((await service.undo("ada")).tokens, (await service.undo("twin")).tokens)
        await service.reset("ada")
        with pytest.raises(InputError):  # there is none
            await say(service, list(new), replaces_last=True)


async def test_a_turn_whose_memory_is_no_longer_kept_cannot_be_taken_back(make_llm):
    async with AsyncDeltaMem(make_llm(n_seq_max=2, **F32), Store.temporary(n_undo=2)) as service:
        messages = []
        for i in range(4):
            messages.append(user(f"this is number {i}"))
            await say(service, messages)
        for _ in range(2):
            await service.undo("ada")
        with pytest.raises(InputError, match="ada"):
            await service.undo("ada")
        assert (await service.get("ada")).turns == 2


async def test_a_text_that_does_not_fit_a_smaller_context_leaves_its_memory(make_llm, tmp_path):
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    messages = [user("my name is Ada " * 30)]
    async with AsyncDeltaMem(make_llm(n_seq_max=2, **F32), Store(url)) as service:
        await say(service, messages)
        before = await service.get("ada")
        assert len(text_of(service)) > 256
    async with AsyncDeltaMem(make_llm(n_seq_max=2, n_ctx=256, **F32), Store(url)) as service:
        answer = await say(service, [user("and yours")], write=False)
        assert await service.get("ada") == before
        answer = await say(service, [user("and yours")])
        assert answer.n_cached == 0
        assert answer.committed.tokens_written == before.tokens + len(text_of(service))


async def test_a_text_that_was_written_in_segments_comes_back(make_llm, tmp_path):
    """After a restart the memory is as it would be without one, forwards and backwards."""

    async def said(n_servers):
        store, messages = f"sqlite:///{tmp_path / f'{n_servers}.db'}", []
        told = ["hello there", "my name is Ada", "and yours"]
        for i in range(n_servers):
            async with AsyncDeltaMem(make_llm("ssw_message", **F32), Store(store)) as service:
                for text in told if n_servers == 1 else told[i : i + 1]:
                    messages.append(user(text))
                    await say(service, messages)
                if i + 1 == n_servers:
                    await say(service, [*messages[:2], user("something else")])
                    return await state_of(service), text_of(service)

    (one, text), (three, other) = await said(1), await said(3)
    assert text == other
    np.testing.assert_allclose(three, one, **SAME)


async def test_a_forgotten_text_leaves_the_memory(serving):
    async with serving() as service:
        messages = [user("my name is Ada")]
        await say(service, messages)
        state = await state_of(service)
        await service.forget_text("ada")
        np.testing.assert_array_equal(await state_of(service), state)
        answer = await say(service, [user("who am I")])
        assert answer.n_cached == 0
        assert answer.committed.tokens_written > answer.n_prompt


async def test_sessions_of_another_owner_are_invisible(serving):
    async with serving() as service:
        await say(service, [user("my name is Ada")], owner="a")
        assert not await service.list("b")
        with pytest.raises(SessionUnknown):
            await service.get("ada", "b")
        await say(service, [user("hello there")], owner="b")
        assert (await service.get("ada", "b")).version == 1
        assert (await service.get("ada", "a")).version == 1


async def test_what_is_cached_without_a_session_is_of_its_owner(serving):
    """Nobody can tell by it what another one asked. As many texts are kept as there are slots."""

    async with serving() as service:

        async def n_cached(content, owner):
            answer = service.chat([user(content)], owner=owner, **GREEDY)
            await answer.whole()
            return answer.n_cached

        said = "my name is Ada and I live in Lima"
        assert [await n_cached(said, owner) for owner in "ab"] == [0, 0]
        assert await n_cached(said, "a") > 0
        assert [await n_cached("who are you?", owner) for owner in "cd"] == [0, 0]
        assert await n_cached(said, "a") == 0


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a\nb", "x" * 200, "a b", "\0"])
async def test_names_that_are_refused(serving, name):
    async with serving() as service:
        with pytest.raises(InputError):
            await service.chat([user("hello")], session=name, **GREEDY).whole()


async def test_options(serving):
    async with serving() as service:
        with pytest.raises(InputError, match=r"temprature.*temperature"):
            service.chat([user("hello")], temprature=0)
        known = {"seed": 1, "max_tokens": 6, "grammar": LETTERS["grammar"]}
        default = await service.chat([user("hello")], **known).whole()
        assert await service.chat([user("hello")], temperature=None, stop=None, **known).whole() == default


async def test_a_response_format_of_a_json_schema(serving):
    """Found: of OpenAI's type json_schema nothing was followed, and nothing said."""
    wanted = {"type": "json_schema", "json_schema": {"name": "letters", "schema": {"enum": ["qx", "xq"]}}}
    async with serving() as service:
        answer = await service.chat([user("hello")], response_format=wanted, temperature=0).whole()
        assert json.loads(answer) in ("qx", "xq")
        with refuses(InputError, "response_format", "yaml"):
            service.chat([user("hello")], response_format={"type": "yaml"})


def test_a_message_begins_with_the_space_that_its_first_word_takes():
    """Without it the first word of a new message would count as read, and not be written."""

    def render(messages):
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return [hash(token) for token in re.findall(r" ?[A-Za-z]+|.|\n", text)]

    messages = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    tokens = render(messages)
    assert begins(render, messages, 0) == tokens.index(hash(" Hello"))
    assert begins(render, messages, 1) == tokens.index(hash(" Hi"))


def test_which_messages_are_known():
    said = [{"role": "system", "content": "be brief"}, user("one"), assistant("1"), user("two"), assistant("2")]
    known = set(digests(said))
    assert known_messages([*said, user("three")], known) == [True] * 5 + [False]
    assert known_messages([said[0], *said[3:], user("three")], known) == [True, True, True, False]
    assert known_messages([user("new"), *said[3:]], known) == [False, False, True]
    assert known_messages([said[0], user("other")], known) == [True, False]
    parts = [{"role": "user", "content": [{"type": "text", "text": "one "}]}]
    assert digests(parts) == digests([user("one")])


#
# several at once
#


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


#
# what fails
#


async def test_a_store_that_fails_leaves_the_turn_out(serving, monkeypatch):
    async with serving() as service:
        messages = [user("hello there")]
        await say(service, messages)
        before = await service.get("ada")
        commit = service.store.commit

        def fail(*arguments, **options):
            raise StoreError("disk full")

        monkeypatch.setattr(service.store, "commit", fail)
        with pytest.raises(StoreError):
            await say(service, [*messages, user("my name is Ada")])
        monkeypatch.setattr(service.store, "commit", commit)
        assert await service.get("ada") == before
        answer = await say(service, [*messages, user("my name is Ada")])
        assert answer.committed.version == 2
        assert answer.committed.tokens_written == len(text_of(service))


@pytest.mark.parametrize("patience", [60, 0])
async def test_a_turn_waits_for_a_store_that_went_away(serving, monkeypatch, patience):
    async with serving(store_timeout=patience) as service:
        messages = [user("hello there")]
        await say(service, messages)
        before, commit, away = await service.get("ada"), service.store.commit, [1, 1]

        def fail(*arguments, **options):
            if away:
                away.pop()
                raise StoreAway("the database is away")
            return commit(*arguments, **options)

        monkeypatch.setattr(service.store, "commit", fail)
        if patience:
            answer = await say(service, [*messages, user("my name is Ada")])
            assert not away and answer.committed.version == 2
            assert (await service.get("ada")).tokens == len(text_of(service))
        else:
            with pytest.raises(StoreAway):
                await say(service, [*messages, user("my name is Ada")])
            assert await service.get("ada") == before


@pytest.mark.parametrize("what", ["queue", "store"])
async def test_a_turn_that_never_began_leaves_the_text_ready(serving, monkeypatch, what):
    """Otherwise a server that is busy would decode whole texts again for those that it refused."""

    async with serving(n_seq_max=2, n_queue=1) as service:
        messages, more = [user("hello there")], []
        before = await say(service, messages)
        hold, identity = threading.Event(), service.store.identity

        def fail(*arguments, **options):
            raise StoreError("the disk fails")

        if what == "queue":
            service.worker.call(hold.wait)  # nothing is decoded meanwhile
            more = [service.chat([user("hello there")], session=f"s{i}", **GREEDY) for i in range(3)]
            for each in more:
                await each.start()
        else:
            monkeypatch.setattr(service.store, "identity", fail)
        refused = asyncio.create_task(say(service, [*messages, user("my name is Ada")]))
        await asyncio.wait([refused], timeout=1)
        hold.set()
        with pytest.raises((QueueFull, StoreError)):
            await refused
        for each in more:
            await each.whole()
        monkeypatch.setattr(service.store, "identity", identity)
        assert service.n_ready == 1 + len(more)
        after = await say(service, [*messages, user("my name is Ada")])
        assert after.committed.tokens_written == len(text_of(service))
        assert after.n_cached >= before.n_prompt or more  # the others took its slot


@pytest.mark.parametrize("what", ["memory", "text"])
async def test_a_damaged_session_is_named(serving, what):
    async with serving() as service:
        await say(service, [user("hello there")])
        await say(service, [user("hello there")], session="bob")
        service.store.commit(dataclasses.replace(service.store.get("", "ada"), **{what: b"damaged"}))
        with pytest.raises(StoreError, match="ada"):
            await say(service, [user("hello there")])
        assert (await service.get("ada")).version == 2
        await say(service, [user("hello there")], session="bob")


@pytest.mark.parametrize("what", ["memory", "text", "state"])
async def test_a_damaged_session_is_named_whatever_is_asked_of_it(serving, what):
    """Its store is to blame, not the file or the values that the caller gave."""

    async with serving() as service:
        messages = []
        for said in ("hello there", "my name is Ada"):
            messages.append(user(said))
            await say(service, messages)
        record = service.store.get("", "ada")
        last = dataclasses.replace(record.history[-1], state=b"damaged", created=now())
        damage = {"history": (*record.history[:-1], last)} if what == "state" else {what: b"damaged"}
        damaged = service.store.commit(dataclasses.replace(record, **damage))
        with refuses(SessionDamaged, "ada"):
            await service.undo("ada")
        if what == "memory":
            with refuses(SessionDamaged, "ada"):
                await service.snapshot("ada")
        assert await service.get("ada") == damaged
        assert (await service.reset("ada")).turns == 0


async def test_a_turn_that_cannot_be_packed_fails_alone(serving, monkeypatch):
    """What fails after the last decode fails the turn, not the thread that decodes for all."""

    async with serving() as service:
        await say(service, [user("hello there")])
        before = await service.get("ada")

        def fail(*arguments):
            raise MemoryError("full")

        monkeypatch.setattr("pydeltamem.server.session.finished", fail)
        with pytest.raises(MemoryError):
            await say(service, [user("and yours")])
        monkeypatch.undo()
        assert await service.get("ada") == before
        assert (await say(service, [user("and yours")])).committed.version == 2


async def test_a_call_that_nobody_waits_for_any_more_is_not_made(serving):
    async with serving() as service:
        hold, called = threading.Event(), []
        service.worker.call(hold.wait)
        calls = [service.worker.call(lambda i=i: called.append(i)) for i in range(2)]
        assert calls[0].cancel()
        hold.set()
        await asyncio.wrap_future(calls[1])
        assert called == [1]


async def test_a_model_that_is_closed_in_the_middle_fails_what_runs(serving):
    service = serving()
    answer = service.chat([user("hello there")], session="ada", max_tokens=450, **ENDLESS)
    pieces = aiter(answer)
    await anext(pieces)
    service.worker.call(service.llm.close)
    with pytest.raises(DeltaMemError):
        async for _ in pieces:
            pass
    await service.aclose()


@pytest.mark.parametrize("how", ["said", "undone", "refused"])
async def test_a_lease_ends_with_its_use(serving, monkeypatch, how):
    """However the use of a session ends, another process need not wait for the lease to expire."""
    monkeypatch.setattr(Store, "is_local", False)

    async with serving() as service:
        messages = [user("hello there")]
        await say(service, messages)
        if how == "undone":
            await service.undo("ada")
        elif how == "refused":
            with pytest.raises(InputError):
                await service.chat(messages, session="ada", logit_bias={-1: 1}).whole()
            await say(service, messages, write=False)
        assert service.store.lease("", "ada", "another", 60)


async def test_a_session_that_another_process_holds_is_busy(serving, monkeypatch):
    monkeypatch.setattr(Store, "is_local", False)

    async with serving(turn_timeout=0.1) as service:
        assert service.store.lease("", "ada", "another", 60)
        for use in (lambda: say(service, [user("hello there")]), lambda: service.reset("ada")):
            with refuses(SessionBusy, "ada"):
                await use()
        service.store.release("", "ada", "another")
        assert (await say(service, [user("hello there")])).committed.version == 1
        assert service.n_turns("ada") == 0


async def test_a_lease_is_prolonged_as_long_as_its_turn_goes_on(serving, monkeypatch):
    """And no longer: those of turns that are over are not asked for again."""
    monkeypatch.setattr(Store, "is_local", False)
    prolonged, prolong = [], Store.prolong

    def note(store, holder, seconds, sessions):
        prolonged.append(list(sessions))
        if len(prolonged) == 1:  # the next one may reach it
            raise StoreAway("the database is away")
        prolong(store, holder, seconds, sessions)

    async def is_prolonged(name):
        while len(prolonged) < 2 or prolonged[-1] != [("", name)]:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(Store, "prolong", note)

    async with serving(lease=0.03) as service:
        for name in ("ada", "bob"):
            hold = threading.Event()
            service.worker.call(hold.wait)  # nothing is decoded meanwhile
            answer = service.chat([user("hello there")], session=name, **GREEDY)
            await answer.start()
            try:
                await asyncio.wait_for(is_prolonged(name), 60)
            finally:
                hold.set()
            assert await answer.whole()


async def test_another_process_has_changed_the_session(serving):
    async with serving() as service:
        messages = [user("hello there")]
        await say(service, messages)
        other = Store(service.store.url)
        other.commit(other.get("", "ada"))  # version 2
        answer = await say(service, [*messages, user("go on")])
        assert answer.committed.version == 3  # it was loaded again
        slow = service.chat([*messages, user("go on")], session="ada", max_tokens=60, **LETTERS)
        await slow.start()
        other.commit(other.get("", "ada"))
        with pytest.raises(Conflict):
            await slow.whole()
        other.close()


@pytest.mark.parametrize("is_local", [True, False])
async def test_a_session_that_another_process_made_again_is_another(serving, monkeypatch, is_local):
    """At the same version: what this process has of the deleted one is nothing to it."""
    monkeypatch.setattr(Store, "is_local", is_local)

    async with serving() as service:
        await say(service, [user("hello there")], session="bob")
        await service.fork("bob", "ada")
        answer = await say(service, [user("my name is Ada")])
        assert answer.committed.version == 2
        other = Store(service.store.url)
        assert other.delete("", "ada")
        new = other.get("", "bob")
        new = other.commit(Record("", "ada", adapter=new.adapter, memory=new.memory, tokens=new.tokens))
        new = other.commit(new)
        assert new.version == 2
        await say(service, [user("and yours")], write=False)
        assert other.get("", "ada") == new
        answer = await say(service, [user("and yours")])
        assert answer.committed.version == 3 and other.get("", "ada").created == new.created
        assert other.get("", "ada").tokens == answer.committed.tokens_written == new.tokens + len(text_of(service))
        other.close()


async def test_a_fork_is_a_session_of_its_own(serving):
    async with serving() as service:
        await say(service, [user("hello there")])
        forks = []
        for _ in range(2):
            forks.append(await service.fork("ada", "bob"))
            await service.delete("bob")
        assert len({(await service.get("ada")).created, *(fork.created for fork in forks)}) == 3


@pytest.mark.parametrize("how", ["fork", "rename"])
async def test_a_name_that_a_turn_is_about_to_take_is_taken(serving, how):
    """Found: the turn lost its session, and what it had said."""

    async with serving() as service:
        await say(service, [user("hello there")])
        hold = threading.Event()
        service.worker.call(hold.wait)  # nothing is decoded meanwhile
        first = service.chat([user("and yours")], session="bob", **GREEDY)
        await first.start()
        named = asyncio.create_task(getattr(service, how)("ada", "bob"))
        await asyncio.wait([named], timeout=0.3)
        hold.set()
        await first.whole()
        assert first.committed.version == 1
        with pytest.raises(Conflict):
            await named
        assert {record.name: record.version for record in await service.list()} == {"ada": 1, "bob": 1}


async def test_a_turn_of_a_session_that_was_made_again_meanwhile_is_refused(serving):
    async with serving() as service:
        await say(service, [user("hello there")])
        other = Store(service.store.url)
        slow = service.chat([user("go on")], session="ada", max_tokens=60, **LETTERS)
        await slow.start()
        other.delete("", "ada")
        new = other.commit(Record("", "ada", adapter=service.adapter))
        with pytest.raises(Conflict):
            await slow.whole()
        assert other.get("", "ada") == new
        other.close()


async def test_two_that_swap_their_names_wait_for_nobody(serving):
    async with serving() as service:
        for name in ("ada", "bo"):
            await say(service, [user("hello there")], session=name)
        both = service.rename("ada", "bo"), service.rename("bo", "ada")
        assert [type(each) for each in await asyncio.gather(*both, return_exceptions=True)] == [Conflict] * 2


async def test_a_session_of_another_adapter_is_refused(make_llm, tmp_path):
    url = f"sqlite:///{tmp_path / 'sessions.db'}"

    async with AsyncDeltaMem(make_llm(**F32), Store(url)) as service:
        await say(service, [user("hello there")])
    async with AsyncDeltaMem(make_llm("msw4_qo", **F32), Store(url)) as service:
        with pytest.raises(InputError, match="ada"):
            await say(service, [user("hello there")])
        await say(service, [user("hello there")], session="bob")


def test_a_store_of_a_newer_format_is_refused(tmp_path):
    import sqlalchemy as sa

    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    Store(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE about SET value = '99'")
    engine.dispose()
    with pytest.raises(StoreError, match=r"sessions\.db"):
        Store(url)
    with pytest.raises(InputError, match="nosuch"):
        Store("nosuch://x")
    (tmp_path / "text.db").write_text("this is no database, but a text of some length" * 100)
    with pytest.raises(StoreError, match=r"text\.db"):
        Store(f"sqlite:///{tmp_path / 'text.db'}")


def test_a_store_whose_table_is_gone_is_named(tmp_path):
    import sqlalchemy as sa

    store = Store(f"sqlite:///{tmp_path / 'sessions.db'}")
    engine = sa.create_engine(store.url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE sessions")
    engine.dispose()
    with pytest.raises(StoreError, match=r"sessions\.db"):
        store.get("", "ada")
    store.close()


def test_a_killed_server_has_what_it_told(tmp_path, base, adapter):
    """Killed under load, again and again: each session is at the last turn that was told, or one after it."""
    script = textwrap.dedent(
        """
        import asyncio, random, sys
        from pydeltamem import DeltaMemLlama
        from pydeltamem.server import AsyncDeltaMem
        from pydeltamem.server.store import Store

        async def main(base, adapter, url):
            llm = DeltaMemLlama(base, deltamem_path=adapter, n_ctx=512, n_seq_max=2, n_threads=1, n_threads_batch=1)
            async with AsyncDeltaMem(llm, Store(url)) as service:
                async def client(name):
                    messages = []
                    while True:
                        messages = messages[-6:] + [{"role": "user", "content": f"say {random.random()}"}]
                        answer = service.chat(messages, session=name, max_tokens=4)
                        messages.append({"role": "assistant", "content": await answer.whole()})
                        print(name, answer.committed.version, answer.committed.tokens_written, flush=True)
                await asyncio.gather(*map(client, "abcd"))

        asyncio.run(main(*sys.argv[1:]))
        """
    )
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    told = {}
    for _ in range(int(os.environ.get("DELTAMEM_SERVER_KILLS", "3"))):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(base()), str(adapter("qwen3", "tsw_qo")), url],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        n = random.randint(4, 24)
        for line in process.stdout:
            name, version, tokens = line.split()
            told[name] = int(version), int(tokens)
            n -= 1
            if n == 0:
                break
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0]
        for line in rest.splitlines(keepends=True):
            if line.endswith("\n"):
                name, version, tokens = line.split()
                told[name] = int(version), int(tokens)
        store = Store(url)
        for name, (version, tokens) in told.items():
            record = store.get("", name)
            assert version <= record.version <= version + 1
            assert record.version > version or record.tokens == tokens
        store.close()


def test_it_needs_nothing_of_a_stopped_worker(make_llm):
    async def run():
        service = AsyncDeltaMem(make_llm(**F32))
        assert await service.can_decode()
        await say(service, [user("hello there")])
        snapshot = await service.snapshot("ada")
        service.worker.stop()
        with pytest.raises(ModelError):
            await say(service, [user("and yours")])
        with pytest.raises(ModelError):
            await service.replace("bob", snapshot)
        assert [record.version for record in await service.list()] == [1]
        await service.aclose()
        assert not await service.can_decode()

    asyncio.run(run())
    assert DeltaMemLlama  # imported before the server
