"""Two replicas, one PostgreSQL, one HAProxy, all real: one turn at a time, and nothing lost with whatever ends."""

from __future__ import annotations

import concurrent.futures
import json
import threading

import httpx
import pytest

import fleet_kills
from fleet import fleet, haproxy_program, postgresql_folder, until
from pydeltamem.server.store import Store

pytestmark = pytest.mark.skipif(
    postgresql_folder() is None or haproxy_program() is None,
    reason="no PostgreSQL or HAProxy: `make fleet-tools` installs them",
)

LETTERS = {"temperature": 0, "grammar": "root ::= [a-z ]*"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """PostgreSQL, two replicas and HAProxy. The second replica does not wait for another's turn."""
    folder = tmp_path_factory.mktemp("fleet")
    with fleet(folder, "-np", 2, "--drain", 3, of_one=("--turn-timeout", 60), of_two=("--turn-timeout", 0.2)) as those:
        yield those


@pytest.fixture
def database(running):
    return running[0]


@pytest.fixture
def replicas(running):
    """Both, ready."""
    for replica in running[1]:
        until(replica.is_ready)
    return running[1]


@pytest.fixture
def balancer(running, replicas):
    until(running[2].is_ready)
    return running[2]


@pytest.fixture
def session(request):
    """A name of this test's own."""
    return request.node.name


def url(server, session):
    return f"{server.address}/sessions/{session}/v1/chat/completions"


def asked(content, n=4, **more):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": n, **LETTERS, **more}


def say(server, session, content="hello", n=4):
    return httpx.post(url(server, session), json=asked(content, n), timeout=60)


def version(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["memory"]["version"]


class Long:
    """An answer that has begun and goes on."""

    def __init__(self, server, session):
        self.has_begun, self.last, self.error = threading.Event(), None, None
        self._thread = threading.Thread(target=self._read, args=(url(server, session),))
        self._thread.start()
        assert self.has_begun.wait(60)
        assert self.error is None

    def _read(self, address):
        body = asked("tell me", 800, stream=True, grammar="root ::= [a-z ]{800}")
        try:
            with httpx.stream("POST", address, json=body, timeout=120) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self.last = json.loads(line.removeprefix("data: "))
                        self.has_begun.set()
        except Exception as error:
            self.error = error
        self.has_begun.set()

    def end(self):
        """Its last chunk."""
        self._thread.join(120)
        assert self.error is None
        return self.last


@pytest.fixture
def elsewhere(database, session):
    """A third server, which has a turn of the session under way until this is called."""
    store = Store(database.url)
    assert store.lease("", session, "elsewhere", 60).version == 0
    yield lambda: store.release("", session, "elsewhere")
    store.close()


def test_a_turn_waits_for_that_of_another_server(replicas, session, elsewhere):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(say, replicas[0], session)
        refused = say(replicas[1], session)  # it does not wait
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_busy")
        assert not waits.done()
        elsewhere()
        assert version(waits.result()) == 1
    assert version(say(replicas[1], session)) == 2


def test_turns_at_two_replicas_come_one_after_the_other(replicas, session):
    long = Long(replicas[1], session)
    second = say(replicas[0], session)
    assert long.end()["memory"]["version"] == 1
    assert version(second) == 2


def test_each_replica_has_what_the_other_committed(replicas, session):
    messages = []
    for i in range(6):
        messages.append({"role": "user", "content": f"message {i}"})
        asked = {"messages": messages, "max_tokens": 3, **LETTERS}
        answer = httpx.post(url(replicas[i % 2], session), json=asked, timeout=60)
        assert version(answer) == i + 1
        messages.append(answer.json()["choices"][0]["message"])
    about = [httpx.get(f"{replica.address}/v1/memories/{session}").json() for replica in replicas]
    assert about[0] == about[1] and about[0]["turns"] == 6


def test_a_session_stays_at_one_replica(replicas, balancer, session):
    def ready(replica):
        lines = httpx.get(f"{replica.address}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("deltamem_sessions_ready "))

    before = sum(map(ready, replicas))
    for _ in range(3):
        for i in range(4):
            assert say(balancer, f"{session}{i}").status_code == 200
    assert sum(map(ready, replicas)) == before + 4


def test_a_database_that_is_away_is_told_and_comes_back(database, replicas, session):
    one = replicas[0]
    assert version(say(one, session)) == 1
    database.kill()
    refused = say(one, session)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert "Retry-After" in refused.headers
    assert one.health() == (503, "store unavailable")
    assert httpx.get(f"{one.address}/health/live").status_code == 200
    assert httpx.get(f"{one.address}/metrics").status_code == 200
    database.start()
    until(one.is_ready)
    assert version(say(one, session)) == 2


def test_a_turn_is_committed_though_the_database_was_away(database, replicas, session):
    long = Long(replicas[0], session)
    database.kill()
    while long._thread.is_alive() and long.last["choices"][0]["finish_reason"] is None:
        if replicas[0].health()[0] == 503:
            break
    database.start()
    last = long.end()
    assert last["memory"]["version"] == 1
    until(replicas[1].is_ready)
    about = httpx.get(f"{replicas[1].address}/v1/memories/{session}").json()
    assert (about["version"], about["tokens"]) == (1, last["memory"]["tokens_written"])


def test_a_replica_that_was_killed_is_replaced_by_the_other(replicas, balancer, session):
    assert version(say(balancer, session)) == 1
    long = Long(replicas[0], session)
    replicas[0].kill()
    try:
        long._thread.join(60)
        # its lease has to expire first
        until(lambda: say(replicas[1], session, "and again").status_code == 200)
        assert httpx.get(f"{replicas[1].address}/v1/memories/{session}").json()["turns"] == 2
    finally:
        replicas[0].start()


def test_a_rolling_update_drops_no_turn(replicas, balancer, session):
    """Both are restarted one after the other, while clients talk; none of them sees it."""
    over = threading.Event()

    def client(i):
        n = 0
        with httpx.Client(timeout=60) as http:
            while not over.is_set():
                answer = http.post(url(balancer, f"{session}{i}"), json=asked(f"message {n}"))
                n += 1
                assert answer.status_code == 200, answer.text
                assert answer.json()["memory"]["version"] == n
        return n

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, i) for i in range(4)]
        try:
            for replica in replicas:
                assert replica.end() == 0
                replica.start()
                until(balancer.is_ready)
                threading.Event().wait(1.5)  # HAProxy asks each second who is there
        finally:
            over.set()
        assert all(each.result() > 2 for each in clients)


def test_where_nobody_is_the_balancer_says_so(replicas, balancer, session):
    for replica in replicas:
        replica.kill()
    try:
        until(lambda: not balancer.is_ready())
        refused = say(balancer, session)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert refused.json()["error"]["code"] == "no_replica"
    finally:
        for replica in replicas:
            replica.start()


def test_kills_lose_nothing_and_write_nothing_twice():
    """`make fleet-kills` kills more."""
    few = ["--minutes", "0.4", "--clients", "4", "--kills", "2", "--database-kills", "1", "--balancer-kills", "1"]
    assert fleet_kills.main([*few, "--rest", "0.5"]) == 0


def test_the_comparison_finds_two_at_once():
    assert fleet_kills.two_at_once([("a", 0, 2), ("b", 0, 1)], [("a", 2.5, 3), ("b", 1, 2)]) == []
    assert len(fleet_kills.two_at_once([("a", 0, 2), ("b", 0, 1)], [("a", 1.5, 3), ("b", 1, 2)])) == 1
