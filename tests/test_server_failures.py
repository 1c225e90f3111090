"""The service under the server: what fails, here or in another process, loses nothing that a client was told."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from pydeltamem import DeltaMemError, DeltaMemLlama, InputError, ModelError
from pydeltamem.server import AsyncDeltaMem
from pydeltamem.server.holds import SessionBusy
from pydeltamem.server.records import (
    Conflict,
    Record,
    SessionDamaged,
    StoreAway,
    StoreError,
    now,
)
from pydeltamem.server.store import Store
from pydeltamem.server.worker import QueueFull
from refusals import refuses
from turns import ENDLESS, F32, GREEDY, LETTERS, say, text_of, user

pytestmark = pytest.mark.anyio  # runs the tests that are coroutines


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


@pytest.mark.parametrize("error", [StoreAway, RuntimeError])
async def test_a_lease_is_prolonged_as_long_as_its_turn_goes_on(serving, monkeypatch, error):
    """And no longer: those of turns that are over are not asked for again."""
    monkeypatch.setattr(Store, "is_local", False)
    prolonged, prolong = [], Store.prolong

    def note(store, holder, seconds, sessions):
        prolonged.append(list(sessions))
        if len(prolonged) == 1:  # the next one may reach it
            raise error("the database is away")
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
