"""The service under the server: each token is written once, over requests, restarts and chats."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import unicodedata
from datetime import timedelta

import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from pydeltamem import InputError
from pydeltamem.runtime.chat_format import caught_prompt
from pydeltamem.runtime.history import n_common
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server import session as sessions
from pydeltamem.server.history import begins, checked_messages, digests, known_messages
from pydeltamem.server.lengths import PromptTooLong
from pydeltamem.server.openai import Chat
from pydeltamem.server.prompts import Prompts
from pydeltamem.server.records import (
    NOTHING,
    Conflict,
    SessionUnknown,
    checked_name,
    name_like,
)
from pydeltamem.server.store import Store
from refusals import refuses
from turns import F32, GREEDY, LETTERS, SAME, assistant, say, state_of, text_of, user

pytestmark = pytest.mark.anyio  # runs the tests that are coroutines


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


@pytest.mark.parametrize("what", ["restart", "slot taken"])
async def test_what_is_decoded_again_is_not_cached(serving, what):
    """Found: usage and metrics counted a text that a session had, although its KV cache was lost."""
    messages = [user("hello there")]
    async with serving(n_seq_max=1) as service:
        await say(service, messages)
        messages.append(user("my name is Ada"))
        assert (await say(service, messages)).n_cached > 0
        if what == "slot taken":
            await say(service, [user("hello there")], session="bob")
            assert (await say(service, [*messages, user("and yours")])).n_cached == 0
    if what == "restart":
        async with serving(n_seq_max=1) as service:
            assert (await say(service, [*messages, user("and yours")])).n_cached == 0


async def test_a_regenerated_answer_decodes_nothing_again(serving, monkeypatch):
    """Found: with eight heads on 30 layers the whole text was decoded again, because the states did not fit."""
    monkeypatch.setattr(sessions, "N_BYTES", 0)
    async with serving() as service:
        messages = []
        for said in ["hello there", "my name is Ada", "and yours", "who are you?"]:
            messages.append(user(said))
            await say(service, messages, max_tokens=30)  # more than the checkpoints that are always kept
        for _ in range(3):
            await say(service, messages[:-1], max_tokens=30)
        assert service._shared.live["", "ada"].text.n_decoded_again == 0


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


async def test_only_reading_decodes_nothing_again(serving, read_once):
    """Found: a title that was asked for beside a long chat had the chat decoded again, and its next turn once more."""
    async with serving(n_seq_max=1) as service:
        messages = [user("my name is Ada")]
        await say(service, messages)
        text, before = text_of(service), await service.get("ada")
        title = await say(service, [*messages, user("a title?")], write=False)
        nothing = await say(service, [*messages, user("a title?")], write=False, max_tokens=0)
        assert title.n_cached == nothing.n_cached == len(text) and title.content
        assert await service.get("ada") == before and text_of(service) == text
        messages.append(user("and yours"))
        assert (await say(service, messages)).n_cached == len(text)
        np.testing.assert_allclose(await state_of(service), read_once(text_of(service)), **SAME)


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


async def test_chats_without_a_session_keep_their_texts(serving):
    """Found: of chats that took turns and had the same system prompt, each took the text of the one before."""
    system = {"role": "system", "content": "be brief and friendly"}
    async with serving(n_seq_max=3) as service:
        chats = [[system, user(f"{name} and so on " * 6)] for name in ("one", "two", "three")]
        first = []
        for i in range(6):
            messages = chats[i % 3]
            answer = service.chat(messages, **GREEDY)
            messages += [assistant(await answer.whole()), user("and yours")]
            first.append(answer.n_prompt)
            assert i < 3 or answer.n_cached >= first[i % 3]


CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ ARGUMENTS }}</tool_call>{% endfor %}{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize(
    ("writes", "written"),
    [
        ("call.function.arguments", ['{ "warm":true}', '{"warm": true}', '{"warm": tr']),
        ("call.function.arguments | tojson", ['{"warm": true}', '{"warm": true}', '"{\\"warm\\": tr"']),
        ("call.function | tojson", ['{"name": "f", "arguments": {"warm": true}}'] * 2),
        ("dict(call.function.arguments | items)", ["{'warm': True}"] * 2),
    ],
)
def test_a_template_gets_arguments_as_it_writes_them(make_llm, writes, written):
    """Found: templates that write JSON by themselves quoted that of a call, and others refused the chat."""
    llm = make_llm()
    llm.chat_handler = Jinja2ChatFormatter(CALLS.replace("ARGUMENTS", writes), "</s>", "").to_chat_handler()
    for given, expected in zip(('{ "warm":true}', {"warm": True}, '{"warm": tr'), written):
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        messages = checked_messages([user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}])
        expected = f"<|user|>a<|assistant|><tool_call>{expected}</tool_call><|assistant|>"
        assert Prompts(llm).text(messages, {}) == expected


async def test_a_template_gets_the_result_of_a_call_with_its_id(serving):
    """Found: Mistral's templates refused a chat whose oldest messages a client had put in other words."""
    template = CALLS.replace(
        "<|{{ m.role }}|>", "<|{{ m.role }}|>{{ 1 / (m.tool_call_id | length) if m.role == 'tool' }}"
    )
    async with serving() as service:
        handler = Jinja2ChatFormatter(template.replace("ARGUMENTS", "call.function.arguments"), "</s>", "")
        service.llm.chat_handler = handler.to_chat_handler()
        call = {"id": "abcdefgh9", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages = [user("hello there"), called, {"role": "tool", "content": "noon", "tool_call_id": "abcdefgh9"}]
        await say(service, messages)
        before = (await service.get("ada")).tokens
        answer = await say(service, [user("in short"), *messages[1:], user("and yours")])
        assert (
            before < answer.committed.tokens_written < before + len(text_of(service))
        )  # what was known is not written


async def test_functions_that_may_not_be_called_stay_in_the_prompt(serving):
    """Found: a chat was decoded and written again from its beginning where tool_choice became "none"."""
    async with serving() as service:
        handler = Jinja2ChatFormatter(CALLS.replace("ARGUMENTS", "call.function.arguments"), "</s>", "")
        service.llm.chat_handler = handler.to_chat_handler()
        tools, messages = [{"type": "function", "function": {"name": "clock"}}], [user("hello there")]
        for choice in ("auto", "none"):
            chat = Chat({"messages": messages, "tools": tools, "tool_choice": choice}, "model")
            answer = service.chat(messages, session="ada", **GREEDY, **chat.options)
            messages = [*messages, assistant(await answer.whole()), user("and yours")]
            assert answer.committed.tokens_written == len(text_of(service))
        assert answer.n_cached > len("hello there") and (await service.get("ada")).turns == 2


def test_what_may_not_be_called_is_text():
    content = '<tool_call>{"name": "clock"}</tool_call>'
    tools = [{"type": "function", "function": {"name": "clock"}}]
    chat = Chat({"messages": [user("one")], "tools": tools, "tool_choice": "none"}, "model")
    assert chat.message(content) == {"role": "assistant", "content": content}


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


@pytest.mark.parametrize("without", [{"max_tokens": 0}, {"write": False}], ids=["an answer", "writing"])
async def test_a_turn_that_does_not_count_leaves_nothing_of_its_origin(serving, without):
    """Found: a session that had not begun kept the memory of the origin, or took none from the next one."""
    async with serving() as service:
        await say(service, [user("My name is Ada.")])
        origin = await service.get("ada")
        for name, first, then in (("bo", origin, None), ("cy", None, origin)):
            await say(service, [user("and yours")], name, origin=first, **without)
            await say(service, [user("and yours")], name, origin=then)
            await say(service, [user("and yours")], f"{name}-2", origin=then)
            np.testing.assert_allclose(await state_of(service, name), await state_of(service, f"{name}-2"), **SAME)
            assert (await service.get(name)).tokens == (await service.get(f"{name}-2")).tokens


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


@pytest.mark.parametrize("case", ["ssw_message", "msw4_deferred", "msw4_replies"])
async def test_a_text_that_was_written_in_segments_or_turns_comes_back(make_llm, tmp_path, case):
    """After a restart the memory is as it would be without one, forwards and backwards."""

    async def said(name, *servers):
        messages = []
        for told in servers:
            async with AsyncDeltaMem(make_llm(case, **F32), Store(f"sqlite:///{tmp_path / name}.db")) as service:
                for text in told:
                    messages = [*messages[: 1 if text is edited else None], user(text)]
                    await say(service, messages)
                end = await state_of(service), text_of(service)
        return end

    told, edited = ["hello there", "my name is Ada", "and yours"], "something else, you know"
    one, text = await said("one", [*told, edited])
    for servers in ([[word] for word in told[:2]] + [[told[2], edited]], [[word] for word in (*told, edited)]):
        other, its_text = await said(str(len(servers)), *servers)
        assert its_text == text
        np.testing.assert_allclose(other, one, **SAME)


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


MARK = "\u0303"  # a tilde above the letter before it


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "../a", "a\nb", "x" * 200, "a b", "\0", f"{MARK}a", MARK, "q" + MARK * 128, f".{MARK}", f"..{MARK}"],
)
async def test_names_that_are_refused(serving, name):
    async with serving() as service:
        with pytest.raises(InputError):
            await service.chat([user("hello")], session=name, **GREEDY).whole()


async def test_messages_that_a_template_leaves_out(make_llm):
    """Found: a hundred thousand of them were hashed in the thread that decodes, and kept with the turn."""
    async with AsyncDeltaMem(make_llm(**F32, chat_format="chatml")) as service:
        left_out = {"role": "narrator", "content": ""}
        await say(service, [*[left_out] * 100, user("hello there")])
        with refuses(PromptTooLong, str(service.llm.n_ctx() + 1)):
            await say(service, [*[left_out] * service.llm.n_ctx(), user("and yours")])


async def test_a_name_in_another_spelling_is_the_same(serving):
    """Found: a Korean name in the form of macOS's file names was another session, and one with an é was refused."""

    def apart(name):
        assert unicodedata.normalize("NFD", name) != name
        return unicodedata.normalize("NFD", name)

    async with serving() as service:
        for name in ("한글", "Zoë"):
            answer = await say(service, [user("hello there")], session=apart(name))
            assert answer.committed.session == name and service.n_turns(apart(name)) == 0
            await say(service, [user("and yours")], session=name)
            assert (await service.get(apart(name))).version == 2
            assert (await service.fork(apart(name), apart(f"{name}2"))).name == f"{name}2"
            await service.rename(apart(f"{name}2"), apart(f"{name}3"))
            with pytest.raises(Conflict):
                await service.fork(name, apart(f"{name}3"))
            await service.replace(apart(f"{name}3"), await service.snapshot(apart(name)))
            await service.undo(apart(name))
            await service.forget_text(apart(name))
            await service.reset(apart(name))
            assert {each.name for each in await service.list()} == {name, f"{name}3"}
            for each in (name, f"{name}3"):
                await service.delete(apart(each))
        with pytest.raises(InputError):
            await say(service, [user("hello")], session="a" + "\u0301\u0323" * 1_000_000)


def test_names_like_those_of_files():
    for name, like in {
        "ada (1)": "ada-1",
        " a/b\n- ": "a-b",
        "हिन्दी": "हिन्दी",
        "Zoe\u0308": "Zo\u00eb",
        "?": "",
    }.items():
        assert name_like(name) == like and (not like or checked_name(like) == like)


@pytest.mark.parametrize("name", ["हिन्दी", "ภาษาไทยที่ดี", "தமிழ்", f"a{MARK}q{MARK}-1"])
async def test_names_in_scripts_whose_vowels_are_marks(serving, name):
    """Found: they were refused as having other characters than letters."""
    async with serving() as service:
        await say(service, [user("hello there")], session=name)
        (listed,) = await service.list()
        assert listed.name == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize("llm", [None, "base.gguf"])
def test_what_is_no_model(llm):
    with refuses(InputError, llm):
        AsyncDeltaMem(llm)


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
            await service.chat([user("hello")], response_format={"type": "yaml"}).start()


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


def test_a_call_in_other_words_is_known():
    """Found: what stood behind a call was written again if a client had read its arguments and written them anew."""

    def called(arguments):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return digests([user("one"), {"role": "assistant", "content": None, "tool_calls": [call]}])

    assert called('{ "warm":true}') == called('{"warm": true}')
    assert len({called(each)[1] for each in ('{"warm": true}', '{"warm": false}', '{"warm": tr', "", None)}) == 5
