"""`deltamem serve --rpc`: layers on two RPC servers, and a server that comes back by itself when it has lost one."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from fleet import Replica, RpcServer, free_port, until
from pydeltamem.errors import InputError
from pydeltamem.formats.memory_file import MemorySnapshot
from pydeltamem.server.supervisor import AGAIN, listening, supervise
from pydeltamem.server.worker import ModelLost
from refusals import refuses
from servers import command, in_thread, process

# answers are given, so that nothing depends on the order in which floats are summed
GIVEN = {"temperature": 0, "grammar": 'root ::= "qxzxqz"', "max_tokens": 6}


@pytest.fixture
def rpc_servers(tmp_path):
    """Two that do not run yet."""
    both = RpcServer(tmp_path), RpcServer(tmp_path)
    yield both
    for each in both:
        each.kill()


@pytest.fixture
def running(tmp_path, rpc_servers):
    """A server with layers on both, which need not be ready."""
    named = ",".join(each.endpoint for each in rpc_servers)
    replica = Replica(tmp_path, "server", f"sqlite:///{tmp_path / 'sessions.db'}", "-np", 3, "--rpc", named)
    replica.begin()
    yield replica
    if replica.is_running:
        assert replica.end() == 0
    assert "Traceback" not in replica.log.read_text()


def is_away(running):
    return running.health() == (503, "rpc server away")


def say(running, session, content, **more):
    body = {"messages": [{"role": "user", "content": content}], **GIVEN, **more}
    return httpx.post(f"{running.address}/sessions/{session}/v1/chat/completions", json=body, timeout=60)


def state(running, session):
    answer = httpx.get(f"{running.address}/v1/memories/{session}/file", timeout=60)
    assert answer.status_code == 200
    return MemorySnapshot.from_bytes(answer.content).state


class Client(threading.Thread):
    """Talks in a session of its own until `over`, and sends a turn again until it is answered."""

    def __init__(self, running, name):
        super().__init__()
        self.running, self.name = running, name
        self.over, self.told, self.refused = threading.Event(), [], []

    def run(self):
        while not self.over.is_set():
            answer = say(self.running, self.name, f"message {len(self.told)}", max_tokens=3)
            if answer.status_code == 200:
                self.told.append(answer.json()["memory"]["version"])
            else:
                error = answer.json()["error"]
                self.refused.append((answer.status_code, error["code"], answer.headers.get("Retry-After")))
                self.over.wait(0.1)


class Stuck(RpcServer):
    """A process that waits, and an end while it is waited for, as by Ctrl-C."""

    def command(self):
        return ["sleep", "60"]

    def is_ready(self):
        raise KeyboardInterrupt


def test_a_process_that_is_not_waited_for_does_not_go_on(tmp_path):
    stuck = Stuck(tmp_path)
    with pytest.raises(KeyboardInterrupt), stuck:
        pass
    assert not stuck.is_running


def test_a_lost_rpc_server_is_told_and_comes_back(tmp_path, rpc_servers, running):
    until(lambda: is_away(running))  # nobody is there at first
    for each in rpc_servers:
        each.start()
    until(running.is_ready)
    assert say(running, "ada", "My name is Ada.").json()["memory"]["version"] == 1
    before = state(running, "ada")

    clients = [Client(running, name) for name in ("bo", "carl", "dan")]
    for client in clients:
        client.start()
    until(lambda: all(client.told for client in clients))
    rpc_servers[1].kill()
    until(lambda: all(client.refused for client in clients))
    until(lambda: is_away(running))
    assert httpx.get(f"{running.address}/health/live").status_code == 200  # a restart would not help
    refused = say(running, "ada", "Are you there?")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "rpc_unavailable")
    assert "Retry-After" in refused.headers
    told = [len(client.told) for client in clients]
    rpc_servers[1].start()
    until(lambda: all(len(client.told) > n for client, n in zip(clients, told)))

    assert np.array_equal(state(running, "ada"), before)
    assert say(running, "ada", "I live in Lima.").json()["memory"]["version"] == 2
    after = state(running, "ada")
    for client in clients:
        client.over.set()
        client.join()
        assert client.told == list(range(1, len(client.told) + 1))  # nothing lost, nothing twice
        assert set(client.refused) <= {(503, "rpc_unavailable", "1"), (503, "loading", "1")}

    running.end()
    with process(tmp_path) as alone:
        for content in ("My name is Ada.", "I live in Lima."):
            say(alone, "alone", content)
        # in another batch floats are summed in another order; a turn that was lost, or written twice, would change more
        assert np.abs(state(alone, "alone") - after).max() < 0.1 * np.abs(after - before).max()


def test_an_answer_under_way_says_so(rpc_servers, running):
    for each in rpc_servers:
        each.start()
    until(running.is_ready)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(say, running, "ada", "tell me", grammar="root ::= [a-z ]{900}", max_tokens=900)
        until(lambda: "deltamem_slots_used 1.0" in httpx.get(f"{running.address}/metrics").text)
        rpc_servers[0].kill()
        answer = whole.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "rpc_unavailable")
    rpc_servers[0].start()
    until(running.is_ready)
    assert httpx.get(f"{running.address}/v1/memories/ada").status_code == 404  # it was not committed


def children(popen):
    pids = Path(f"/proc/{popen.pid}/task/{popen.pid}/children").read_text().split()
    return list(map(int, pids))


def test_either_process_that_is_killed(rpc_servers, running):
    """The one that serves begins again; without the one that watches, the other ends, too."""
    for each in rpc_servers:
        each.start()
    until(running.is_ready)
    assert say(running, "ada", "hello").json()["memory"]["version"] == 1
    (first,) = children(running.popen)
    os.kill(first, signal.SIGKILL)
    until(lambda: running.is_ready() and children(running.popen) != [first])
    assert say(running, "ada", "hello again").json()["memory"]["version"] == 2
    (second,) = children(running.popen)
    running.kill()
    until(lambda: not Path(f"/proc/{second}").exists())
    assert running.health() == (0, "")


def refused_start(folder, *options):
    done = subprocess.run(command(folder, "--port", free_port(), *options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def test_what_a_restart_would_not_mend_ends_it(tmp_path, rpc_servers):
    assert "nowhere" in refused_start(tmp_path, "--rpc", "nowhere")
    rpc_servers[0].start()
    wrong = "--rpc", rpc_servers[0].endpoint, "--api-key-file", tmp_path / "none.txt"
    assert "none.txt" in refused_start(tmp_path, *wrong)


def test_what_runs_fails_when_the_model_is_lost():
    with in_thread() as api, concurrent.futures.ThreadPoolExecutor(2) as pool:
        path, hello = "/sessions/ada/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], **GIVEN}
        with api.stalled():
            waits = [pool.submit(api.http.post, path, json=hello), pool.submit(api.http.post, path, json=hello)]
            until(lambda: api.service.worker.n_waiting == 1)
            call = api.service.worker.call(lambda: None)
            api.app.state.server.lose("gone")
            for each in waits:
                answer = each.result(60)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "rpc_unavailable")
                assert "Retry-After" in answer.headers
            with pytest.raises(ModelLost):
                call.result(60)
            with pytest.raises(ModelLost):
                api.service.worker.call(lambda: None)
            assert api.http.get("/health").json() == {"status": "rpc server away"}
            assert api.http.get("/health/live").status_code == 200
            time.sleep(1.1)  # the model is asked at most once a second
            assert api.http.get("/health").json() == {"status": "rpc server away"}


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with refuses(InputError, f"127.0.0.1:{port}"):
            listening("127.0.0.1", port)


def test_it_ends_while_it_waits_for_rpc_servers(running):
    """And answers what it has read to its end."""
    until(lambda: is_away(running))
    body = (b" " * 100_000 for _ in range(20))
    answer = httpx.post(f"{running.address}/v1/chat/completions", content=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "rpc_unavailable")
    assert running.end() == 0


def test_a_server_that_finds_no_rpc_server_is_to_begin_again(tmp_path):
    """It was there when the supervisor looked."""
    ours, its = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener, ours, its:
        given = listener.fileno(), its.fileno()
        options = "--rpc", f"127.0.0.1:{free_port()}", "--supervised", "{},{}".format(*given)
        with subprocess.Popen(command(tmp_path, *options), pass_fds=given, stderr=subprocess.PIPE) as server:
            its.close()
            assert ours.recv(1) == b"1"
            ours.sendall(b"1")
            _, said = server.communicate(timeout=120)
        assert server.returncode == AGAIN and b"Traceback" not in said


def test_a_server_that_hangs_at_its_end_ends():
    code = """
import time
from pydeltamem.server import supervisor
supervisor._ENDS = 0.1
supervisor.end_soon()
time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == AGAIN


#
# the supervisor, with a program in the place of its server
#


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """supervised(code): what the supervisor of this server returns. `its` is the server's socket to the supervisor."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(code):
        program = tmp_path / "server"
        begin = f"#!{sys.executable}\nimport os, select, signal, socket, sys, time\nfrom pathlib import Path\n"
        program.write_text(f"{begin}its = socket.socket(fileno=int(sys.argv[-1].split(',')[1]))\n{code}")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        return supervise(listening("127.0.0.1", 0), [])

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_model_that_is_lost_at_the_end_does_not_begin_again(supervised):
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: os._exit({AGAIN}))
its.sendall(b"1")
its.recv(1)
its.sendall(b"1")
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    assert supervised(code) == 0


def test_a_signal_while_a_server_begins_ends_that_one(supervised, monkeypatch):
    begin = subprocess.Popen

    def begun(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", begun)
    assert supervised("time.sleep(60)") == 128 + signal.SIGTERM


def test_a_server_that_ends_before_it_has_heard_begins_again(supervised, tmp_path):
    """What it has not read breaks the connection."""
    code = f"""
if Path({str(tmp_path / "once")!r}).exists():
    sys.exit(3)
Path({str(tmp_path / "once")!r}).touch()
its.sendall(b"1")
select.select([its], [], [])
os._exit({AGAIN})
"""
    assert supervised(code) == 3
