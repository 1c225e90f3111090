"""deltamem chat: over a pipe, over a terminal, and its conversation as an object."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from pydeltamem.chat import Chat, chat_prompt
from pydeltamem.memory_file import read_memory_file

OPTIONS = ["-n", "12", "--temp", "0", "-c", "512", "-t", "1", "-tb", "1"]


@pytest.fixture
def command(base, adapter):
    """The command line of a chat with the golden Qwen3 and its TSW adapter."""
    model = ["-m", base(), "--deltamem", adapter("qwen3", "tsw_qo")]
    return lambda *args: [sys.executable, "-m", "pydeltamem.cli", "chat", *map(str, [*model, *OPTIONS, *args])]


@pytest.fixture
def piped(command):
    """piped(lines, *args): a whole chat over pipes."""

    def run(lines, *args):
        text = "".join(f"{line}\n" for line in lines)
        return subprocess.run(
            command(*args), input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=300
        )

    return run


def norms(text):
    return [float(value) for value in re.findall(r"\d+: ([\d.e+-]+)", text)]


def test_pipe(piped, tmp_path):
    path, end = tmp_path / "a.memory", tmp_path / "end.memory"
    result = piped(
        [
            "/memory",
            "hello there",
            "/memory",
            f"/save {path}",
            "/reset",
            "/memory",
            "/load",
            "how are you",
            "/quit",
            "not read",
        ],
        *("--system", "be short", "--save-memory", end),
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2  # two replies
    shown = norms(result.stderr)
    assert len(shown) == 12
    assert not any(shown[:4]) and all(shown[4:8]) and not any(shown[8:])
    assert f"memory saved to {path}" in result.stderr and f"memory loaded from {path}" in result.stderr
    assert read_memory_file(end)[0].any()
    assert (read_memory_file(end)[0] != read_memory_file(path)[0]).any()


def test_writes_off_and_end_of_input(piped, tmp_path):
    path = tmp_path / "a.memory"
    result = piped(["/write off", "hello there", "/memory"], "--save-memory", path)
    assert result.returncode == 0, result.stderr
    assert "writes are off" in result.stderr
    assert not any(norms(result.stderr)) and not read_memory_file(path)[0].any()


def test_bad_commands_do_not_end_the_chat(piped, tmp_path):
    (tmp_path / "text").write_text("x" * 100)
    result = piped(
        ["/nothing", "/write maybe", "/load", f"/load {tmp_path / 'text'}", "/save /no/where", "/help", "hi"]
    )
    assert result.returncode == 0
    assert result.stdout.strip()
    for says in (
        "/nothing is no command",
        "/write on",
        "name a file",
        "cut off or not a memory",
        "cannot be saved",
        "/quit",
    ):
        assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_no_memory(piped):
    result = piped(["hello there", "/memory"], "--no-memory")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and "no memory adapter is attached" in result.stderr


# the conversation


def chat_of(llm, system="be short", n_predict=8):
    return Chat(llm, system, {"n_predict": n_predict, "temp": 0.0, "stop": []}, None)


def test_prompt_tokens_are_those_evaluated(llm):
    messages = [{"role": "user", "content": "hello there"}]
    tokens, ends = chat_prompt(llm, messages)
    assert ends["stop"]
    llm.create_chat_completion(messages, max_tokens=1, temperature=0)
    assert llm._input_ids.tolist() == tokens


def test_a_full_context_drops_the_oldest_turns(make_llm, capsys, monkeypatch):
    llm = make_llm(n_ctx=256)
    chat = chat_of(llm)
    written = []
    evaluate = type(llm).eval

    def record(self, tokens, segments=None):
        before = self.memory.state
        evaluate(self, tokens, segments)
        written.append((list(tokens), self.memory.write, not np.array_equal(self.memory.state, before)))

    monkeypatch.setattr(type(llm), "eval", record)
    texts = [f"this is message number {i}" for i in range(12)]
    for line in texts:
        del written[:]
        chat.say(line)
        assert llm.n_tokens < llm.n_ctx()
        if "the oldest" in capsys.readouterr().err:
            break
    else:
        pytest.fail("the context never filled")
    assert chat.turns[-2]["content"] == line and chat.turns[0]["role"] == "user"
    assert chat.turns[0]["content"] != texts[0]
    reread, rest = written[0], written[1]
    assert reread[1:] == (False, False), "dropped text was written again"
    assert rest[1:] == (True, True)
    assert reread[0] + rest[0] == chat_prompt(llm, chat.system + chat.turns[:-1])[0]
    assert line.split()[-1] in llm.detokenize(rest[0]).decode(errors="replace")
    assert texts[0] not in llm.detokenize(reread[0]).decode(errors="replace")
    assert llm.memory.write is True


def test_a_message_longer_than_the_context(make_llm, capsys):
    llm = make_llm(n_ctx=256)
    chat = chat_of(llm)
    chat.say("hello")
    state, turns = llm.memory.state, list(chat.turns)
    chat.say("word " * 300)
    assert "too long for a context of 256 tokens" in capsys.readouterr().err
    assert chat.turns == turns
    np.testing.assert_array_equal(llm.memory.state, state)
    chat.say("hello again")
    assert len(chat.turns) == len(turns) + 2


def test_clear_forgets_the_text_only(llm, capsys):
    chat = chat_of(llm)
    chat.say("hello")
    state = llm.memory.state
    assert chat.command("/clear")
    assert chat.turns == [] and llm.n_tokens == 0
    np.testing.assert_array_equal(llm.memory.state, state)


def test_a_template_that_refuses(llm, capsys):
    chat = chat_of(llm)
    template = Jinja2ChatFormatter("{{ raise_exception('no system prompt, please') }}", eos_token="", bos_token="")
    llm._chat_handlers[llm.chat_format] = template.to_chat_handler()
    chat.say("hello")
    assert "chat template refuses this conversation: no system prompt, please" in capsys.readouterr().err
    assert chat.turns == []


# the terminal


class Terminal:
    """A command on a pseudo-terminal of its own, where the keys of a person arrive."""

    def __init__(self, arguments):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(arguments[0], arguments)
        self.seen = b""

    def expect(self, pattern, timeout=300):
        """Reads until the pattern appears, and forgets what came up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            ready = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"{pattern!r} did not come: {self.seen[-2000:]!r}"
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:  # the other side is closed
                pytest.fail(f"{pattern!r} did not come before the end: {self.seen[-2000:]!r}")
        self.seen = self.seen[match.end() :]

    def send(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self, pattern=None):
        """Ctrl-C at a prompt, until the pattern appears, or the command ends.

        Once is not always enough: input() shows its prompt a moment before a signal can interrupt it.
        """
        for _ in range(60):
            self.send("\x03")
            while select.select([self.fd], [], [], 5)[0]:
                try:
                    self.seen += os.read(self.fd, 65536)
                except OSError:  # the end
                    assert pattern is None, f"{pattern!r} did not come before the end: {self.seen!r}"
                    return
                if pattern and (match := re.search(pattern, self.seen)):
                    self.seen = self.seen[match.end() :]
                    return
        pytest.fail(f"nothing came of Ctrl-C: {self.seen!r}")

    def wait(self):
        while True:  # a full terminal would block the command
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal():
    pytest.importorskip("pty", reason="pseudo-terminals as on POSIX")
    opened = []

    def start(arguments):
        opened.append(Terminal(arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_stops_the_reply_only(terminal, command, tmp_path):
    path = tmp_path / "a.memory"
    term = terminal(command("-n", "-1", "-c", "32768", "--ignore-eos", "--save-memory", path))
    term.expect(rb"/help lists the commands")
    term.expect(rb"> ")
    term.send("hello there\n")
    term.expect(rb"hello there\r\n")  # the echo
    term.expect(rb"[^\r\n]")  # the reply begins
    term.send("\x03")
    term.expect(rb"\[stopped\]")
    term.expect(rb"> ")
    term.send("/memory\n")
    term.expect(rb"norm per layer")
    term.expect(rb"> ")
    term.send("/quit\n")
    assert term.wait() == 0
    assert read_memory_file(path)[0].any()


def test_ctrl_c_twice_at_the_prompt_leaves(terminal, command, tmp_path):
    path = tmp_path / "a.memory"
    term = terminal(command("--save-memory", path))
    term.expect(rb"> ")
    term.interrupt(rb"Ctrl-C again")
    term.expect(rb"> ")
    term.interrupt()
    assert term.wait() == 0
    assert path.exists()


def test_ctrl_d_leaves(terminal, command):
    term = terminal(command())
    term.expect(rb"> ")
    term.send("\x04")
    assert term.wait() == 0
