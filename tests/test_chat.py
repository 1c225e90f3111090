"""deltamem chat: over a pipe, at a terminal, and its conversation as an object."""

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

from decoding import go_on
from pydeltamem.cli import prompt
from pydeltamem.cli.chat import HELP, Chat, describe
from pydeltamem.cli.main import main
from pydeltamem.conversation import Conversation
from pydeltamem.errors import InputError, MemoryFileError
from pydeltamem.formats.memory_file import read_memory_file
from refusals import check_names, refused, refuses

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


def test_a_model_without_a_chat_template(base, tmp_path):
    """The chat says so, and goes on: llama_cpp takes Llama 2's form."""
    bare, key = tmp_path / "bare.gguf", b"tokenizer.chat_template"
    for model, notes in ((base(), 0), (bare, 1)):
        if notes:
            with open(base(), "rb") as file:
                bare.write_bytes(file.read().replace(key, key[:-1] + b"x"))
        command = [sys.executable, "-m", "pydeltamem.cli", "chat", "-m", str(model), *OPTIONS]
        result = subprocess.run(command, input="hello\n", capture_output=True, encoding="utf-8", timeout=300)
        assert result.returncode == 0 and result.stdout.strip()
        assert result.stderr.count(f"{bare}: ") == notes


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
    said = result.stderr.splitlines()[1:]  # the first line says which memory
    for line, name in zip(said, ("/nothing", "/write on", None, tmp_path / "text", "/no/where")):
        check_names(line, [name] if name else [])
    assert len(said) == 5 + len(HELP.splitlines()) and "Traceback" not in result.stderr


def test_no_memory(piped):
    result = piped(["hello there", "/memory"], "--no-memory")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and "--deltamem" in result.stderr.splitlines()[1]


@pytest.mark.parametrize("name", ["again", "undo", "reset", "clear", "rehearse", "memory", "help", "quit", "exit"])
def test_a_message_that_begins_with_a_command_changes_nothing(llm, name, capsys):
    chat = chat_of(llm)
    chat.say("hello")
    capsys.readouterr()
    state, messages = chat.conversation.memory.state, list(chat.conversation.messages)
    with refuses(InputError, f"/{name}"):
        chat.command(f"/{name} my password, how?")
    assert (chat.conversation.memory.state == state).all() and chat.conversation.messages == messages
    shown = capsys.readouterr()
    assert not shown.out and not shown.err
    chat.conversation.close()


def test_going_back(piped, tmp_path):
    again, plain = tmp_path / "again.memory", tmp_path / "plain.memory"
    result = piped(["hello there", "how are you", "/again", "/edit good bye"], "--save-memory", again, "--seed", "1")
    assert result.returncode == 0, result.stderr
    assert piped(["hello there", "good bye"], "--save-memory", plain, "--seed", "1").returncode == 0
    np.testing.assert_allclose(read_memory_file(again)[0], read_memory_file(plain)[0], rtol=0, atol=1e-4)
    nothing = piped(["/undo", "/again", "/edit"])
    assert nothing.returncode == 0 and len(nothing.stderr.splitlines()) == 4 and not nothing.stdout


def test_again_says_something_else(piped):
    """And the seed still decides all of it."""

    def replies(*args):
        result = piped(["hello there", "/again"], "--temp", "1.5", "-n", "24", *args)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first, other = replies("--seed", "7"), replies()
    for said in (first, other):
        assert said[: len(said) // 2] != said[len(said) // 2 :]
    assert replies("--seed", "7") == first != replies("--seed", "8") and replies() != other


def test_each_reply_has_a_seed_of_its_own(llm):
    def replies(seed):
        conversation = Conversation(llm, n_predict=16, temp=1.5)
        conversation.memory.write = False
        chat, said = Chat(conversation, seed=seed), []
        chat.say("hello there")
        for command in ("/again", "/again", "/edit hello there"):
            said.append(conversation.messages[-1]["content"])
            chat.command(command)
        said.append(conversation.messages[-1]["content"])
        conversation.close()
        return said

    first = replies(7)
    assert len(set(first)) == 4
    assert replies(7) == first and replies(8) != first and replies(None) != replies(None)


def test_reading_only(piped, tmp_path):
    path = tmp_path / "a.memory"
    result = piped(["hello there"], "-n", "0", "--save-memory", path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\n" and re.fullmatch(r"memory: .*tsw_qo.*\n", result.stderr)
    assert read_memory_file(path)[0].any()


def test_undo(piped, tmp_path):
    undone, plain = tmp_path / "undone.memory", tmp_path / "plain.memory"
    # the end of the message, after the reply, is decoded with the next message: so both go on
    assert piped(["hello there", "how are you", "/undo", "good bye"], "--save-memory", undone).returncode == 0
    assert piped(["hello there", "good bye"], "--save-memory", plain).returncode == 0
    np.testing.assert_allclose(read_memory_file(undone)[0], read_memory_file(plain)[0], rtol=0, atol=1e-4)


# the memory file


def test_memory_is_kept_from_chat_to_chat(piped, tmp_path):
    path = tmp_path / "a.memory"
    assert piped(["hello there"], "--memory", path).returncode == 0
    first, metadata = read_memory_file(path)
    result = piped(["/memory", "how are you"], "--memory", path)
    assert result.returncode == 0, result.stderr
    assert all(norms(result.stderr)) and len(norms(result.stderr)) == 4
    state, now = read_memory_file(path)
    assert (state != first).any()
    assert int(now["tokens_written"]) > int(metadata["tokens_written"]) > 0
    assert now["created"] == metadata["created"]
    assert os.listdir(tmp_path) == ["a.memory"]


def test_memory_is_saved_after_each_turn(command, tmp_path):
    path = tmp_path / "a.memory"
    chat = subprocess.Popen(
        command("--memory", path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        for line in (b"hello there\n", b"how are you\n"):
            before = read_memory_file(path)[0] if path.exists() else np.zeros(1)
            chat.stdin.write(line)
            chat.stdin.flush()
            deadline = time.monotonic() + 300
            while not path.exists() or np.array_equal(read_memory_file(path)[0], before) or not path.stat().st_size:
                assert time.monotonic() < deadline and chat.poll() is None
                time.sleep(0.05)
        second = subprocess.run(command("--memory", path), capture_output=True, text=True, timeout=300, input="")
        assert second.returncode == 1
        check_names(second.stderr.splitlines()[-1], [path, f"process {chat.pid}"])
    finally:
        chat.kill()
        chat.wait()
    assert read_memory_file(path)[0].any()
    assert subprocess.run(command("--memory", path), capture_output=True, timeout=300, input=b"").returncode == 0


def test_a_bad_memory_file_is_refused(piped, tmp_path):
    path = tmp_path / "a.memory"
    path.write_text("no memory")
    result = piped(["hello"], "--memory", path)
    refused(result, path)
    assert path.read_text() == "no memory"
    for option in (["--no-memory"], ["--load-memory", path], ["--save-memory", path]):
        result = piped([], "--memory", path, *option)
        refused(result, "--memory", option[0])


def expected(llm, *contents):
    """The memory of a conversation in which this was said, without replies."""
    conversation = Conversation(llm, n_predict=0)
    for content in contents:
        conversation.say(content)
    return conversation.memory.state


def test_the_first_line_says_which_memory(piped, adapter, base, tmp_path):
    name = adapter("qwen3", "tsw_qo").name
    first = piped([]).stderr.splitlines()[0]
    assert name in first and "empty" in first
    path = tmp_path / "a.memory"
    assert str(path) in piped(["hello"], "--memory", path).stderr.splitlines()[0]
    assert str(path) in piped([], "--load-memory", path).stderr.splitlines()[0]
    assert "only read" in piped([], "--no-write").stderr.splitlines()[0]
    assert "none" in piped([], "--no-memory").stderr.splitlines()[0]
    plain = [sys.executable, "-m", "pydeltamem.cli", "chat", "-m", str(base()), *OPTIONS]
    result = subprocess.run(plain, input="", capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "none" in result.stderr.splitlines()[0]


def test_a_line_of_a_pipe_is_a_turn(piped, llm, tmp_path):
    """As it stands, also with a backslash at its end, or \\r within it; but that is no part of a line's end."""
    path = tmp_path / "a.memory"
    assert piped(["one\\", "10 %\r20 %\r"], "-n", "0", "--save-memory", path).returncode == 0
    np.testing.assert_allclose(read_memory_file(path)[0], expected(llm, "one\\", "10 %\r20 %"), rtol=0, atol=1e-5)


def test_replies_of_the_package_model_begin_with_a_word(capsys):
    from pydeltamem import DeltaMemLlama
    from pydeltamem.models import default_files

    model, adapters = default_files()
    llm = DeltaMemLlama(model, deltamem_path=adapters["tsw"], n_ctx=256, n_threads=1)
    chat = chat_of(llm, system="", n_predict=12)
    chat.say("My name is Anna.")
    chat.command("/again")
    assert chat.conversation.messages[-1]["content"].startswith(" ")  # as the model knows it
    for line in capsys.readouterr().out.splitlines():
        assert line == line.lstrip() != ""
    llm.close()


def test_a_command_in_the_wrong_letters(llm):
    with refuses(InputError, "/memry", "/memory"):
        chat_of(llm).command("/memry")


def test_names_of_files_begin_at_home(llm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    chat = chat_of(llm)
    chat.command("/save ~/a.memory")
    assert os.listdir(tmp_path) == ["a.memory"]


def test_an_edit_of_several_lines(llm):
    chat = chat_of(llm, n_predict=2)
    chat.say("hello")
    chat.command("/edit one\ntwo")
    assert chat.conversation.messages[-2]["content"] == "one\ntwo"


# the chat as an object


def chat_of(llm, system="be short", n_predict=8, **options):
    return Chat(Conversation(llm, system=system, n_predict=n_predict, temp=0.0), **options)


@pytest.mark.parametrize("attached", [True, False])
def test_a_full_context_is_told(make_llm, capsys, attached):
    llm = make_llm(n_ctx=256)
    if not attached:
        llm.memory.detach()
    chat = chat_of(llm)
    for i in range(12):
        chat.say(f"this is message number {i}")
        if "the oldest" in (told := capsys.readouterr().err):
            break
    else:
        pytest.fail("the context never filled")
    assert ("memory" in told) == attached
    assert chat.conversation.messages[1]["content"] != "this is message number 0"


def test_what_is_said_of_a_memory(llm, make_llm):
    assert describe(llm.memory).startswith("4 layers, 1 head of rank 8, 1.0 kB, 0 tokens written, writes are on; ")
    assert "4 layers, 4 heads of rank 8" in describe(make_llm("msw4_qo").memory)


def test_clear_forgets_the_text_only(llm):
    chat = chat_of(llm)
    chat.say("hello")
    state = chat.conversation.memory.state
    assert chat.command("/clear")
    assert [m["role"] for m in chat.conversation.messages] == ["system"]
    assert chat.conversation.n_tokens == len(chat.conversation._ended_tokens())
    np.testing.assert_array_equal(chat.conversation.memory.state, state)


@pytest.mark.parametrize("way", ["/rehearse", "--rehearse"])
def test_a_text_is_rehearsed_before_it_goes(llm, make_llm, tmp_path, capsys, way):
    chat, other = chat_of(llm, rehearses=way == "--rehearse"), make_llm()
    chat.conversation.open(tmp_path / "a.memory")
    chat.say("hello")
    tokens = chat.conversation.tokens
    if way == "/rehearse":
        assert chat.command(way)
        assert chat.conversation.n_tokens == len(tokens)
    chat.command("/clear")
    assert f" {len(tokens)} tokens" in capsys.readouterr().err  # before: it may take minutes
    for _ in range(2):
        other.reset()
        other.eval(tokens)
    state = chat.conversation.memory.state
    np.testing.assert_allclose(state, other.memory.state, rtol=0, atol=2e-3)  # F16 KV cache, batches of other sizes
    np.testing.assert_array_equal(read_memory_file(tmp_path / "a.memory")[0], state)
    chat.conversation.close()


def test_a_file_that_failed_is_not_the_default(llm, tmp_path):
    chat, path, typo = chat_of(llm), tmp_path / "a.memory", tmp_path / "typo.memory"
    chat.say("hello")
    chat.command(f"/save {path}")
    chat.say("how are you")
    for line in (f"/load {typo}", f"/save {tmp_path / 'no' / 'where'}"):
        with pytest.raises(MemoryFileError):
            chat.command(line)
    chat.command("/save")
    assert os.listdir(tmp_path) == ["a.memory"]
    np.testing.assert_array_equal(read_memory_file(path)[0], chat.conversation.memory.state)


def test_an_undo_that_is_refused(llm):
    chat = chat_of(llm)
    chat.say("hello")
    chat.say("there")
    chat.command("/reset")
    messages = list(chat.conversation.messages)
    with refuses(InputError):
        chat.command("/undo")
    assert chat.conversation.messages == messages


def test_commands_are_saved(llm, tmp_path):
    """Killed after a command, the memory file holds what the command did."""
    path, other = tmp_path / "a.memory", tmp_path / "other.memory"
    chat = chat_of(llm)
    chat.conversation.open(path)
    chat.say("hello")
    chat.command(f"/save {other}")
    chat.say("a secret")
    for line in ("/undo", "/reset", f"/load {other}"):
        before = read_memory_file(path)[0]
        chat.command(line)
        state = read_memory_file(path)[0]
        assert (state != before).any()
        np.testing.assert_array_equal(state, chat.conversation.memory.state)
    chat.conversation.close()


def test_a_reply_that_cannot_be_saved_is_shown(llm, tmp_path, capsys):
    path = tmp_path / "a.memory"
    chat = chat_of(llm)
    chat.conversation.open(path)
    path.unlink()
    path.mkdir()
    with refuses(MemoryFileError, path):
        chat.say("hello")
    assert capsys.readouterr().out == chat.conversation.messages[-1]["content"] + "\n"


# the terminal


PROMPT = rb"(?s)\x1b\[\?2004h.*?>.*?\x1b\[\?25h"  # bracketed paste is on from here; the prompt; the cursor


class Terminal:
    """A command on its own pseudo-terminal, which gets the keys of a person."""

    def __init__(self, arguments):
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")  # no terminal here reports where the cursor is
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes background processes ignore it
            os.execv(arguments[0], arguments)
        self.seen = b""

    def expect(self, pattern, timeout=60):
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
        while True:  # the command would block at a full terminal
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


@pytest.fixture
def turns(terminal, command, tmp_path):
    """turns(*keys): the memory after a chat at a terminal where these keys were pressed, each at a prompt of its own.

    Nothing is generated, so a conversation of the same turns has the same memory.
    """

    def run(*keys):
        path = tmp_path / "turns.memory"
        term = terminal(command("-n", "0", "--save-memory", path))
        for key in keys:
            term.expect(PROMPT)
            term.send(key)
        term.expect(PROMPT)
        term.send("\x04")
        assert term.wait() == 0
        return read_memory_file(path)[0]

    return run


PASTE = "\x1b[200~", "\x1b[201~"


@pytest.mark.parametrize(
    "keys",
    [
        f"{PASTE[0]}one\ntwo\nthree{PASTE[1]}\r",
        f"{PASTE[0]}one\rtwo\rthree\r{PASTE[1]}\r",
        "one\x1b\rtwo\x1b\rthree\r",  # Alt-Enter
        "one\\\rtwo\\\rthree\r",
        "one\\\ntwo\\\nthree\n",
    ],
)
def test_several_lines_are_one_turn(turns, llm, keys):
    np.testing.assert_allclose(turns(keys), expected(llm, "one\ntwo\nthree"), rtol=0, atol=1e-5)


def test_each_line_that_is_typed_is_a_turn(turns, llm):
    np.testing.assert_allclose(turns("one\r", "two\r"), expected(llm, "one", "two"), rtol=0, atol=1e-5)


def test_ctrl_c_throws_away_what_was_typed(turns, llm):
    """And does not leave, however often."""
    np.testing.assert_allclose(turns("two\x03", "three\x03", "one\r"), expected(llm, "one"), rtol=0, atol=1e-5)


def test_ctrl_z_is_no_text(turns, llm):
    """It suspends; here nobody could resume, so the system goes on at once."""
    np.testing.assert_allclose(turns("\x1a", "one\r"), expected(llm, "one"), rtol=0, atol=1e-5)


def test_tab_completes_commands(terminal, command, tmp_path):
    (tmp_path / "ada.memory").touch()
    term = terminal(command())
    term.expect(PROMPT)
    term.send("/me\t\r")
    term.expect(rb"norm per layer")
    term.expect(PROMPT)
    term.send("/write of\t\r")
    term.expect(rb"writes are off")
    term.expect(PROMPT)
    term.send(f"/load {tmp_path}/ad\t\r")
    term.expect(rb"ada.memory: ")  # cut off, as it is empty
    term.expect(PROMPT)
    term.send("/q\t\r")
    assert term.wait() == 0


def test_replies_go_to_a_file_and_the_prompt_to_the_terminal(terminal, command, tmp_path):
    out = tmp_path / "out"
    inner = " ".join(f"'{part}'" for part in command())
    term = terminal(["/bin/sh", "-c", f"{inner} > '{out}'"])
    term.expect(PROMPT)
    term.send("hello there\r")
    term.expect(PROMPT)
    term.send("\x04")
    assert term.wait() == 0
    assert out.read_bytes().strip() and b"\x1b" not in out.read_bytes()


def test_nothing_but_replies_goes_to_a_file_if_nobody_sees_the_prompt(terminal, command, tmp_path):
    out, err = tmp_path / "out", tmp_path / "err"
    inner = " ".join(f"'{part}'" for part in command("--memory", tmp_path / "a.memory"))
    term = terminal(["/bin/sh", "-c", f"{inner} > '{out}' 2> '{err}'"])
    term.send("hello there\n\x04")
    assert term.wait() == 0
    reply = subprocess.run(command(), input=b"hello there\n", capture_output=True, timeout=300).stdout
    assert out.read_bytes() == reply and b"\x1b" not in err.read_bytes()
    assert read_memory_file(tmp_path / "a.memory")[0].any()


def test_the_demo_reads_as_the_chat_does(terminal):
    term = terminal([sys.executable, "-m", "pydeltamem.cli", "demo", "--interactive", "--strategy", "msw"])
    term.expect(PROMPT)
    term.send(f"{PASTE[0]}My name is Anna.\nI live in Lima.{PASTE[1]}\r")
    term.expect(rb"the memory changed by")
    term.expect(PROMPT)
    term.send("/q\t\r")
    assert term.wait() == 0


def test_ctrl_c_stops_the_reply_only(terminal, command, tmp_path):
    path = tmp_path / "a.memory"
    term = terminal(command("-n", "-1", "-c", "32768", "--ignore-eos", "--save-memory", path))
    term.expect(rb"/help lists the commands")
    term.expect(PROMPT)
    term.send("hello there\n")
    term.expect(rb"\x1b\[\?2004l[^\x1b]")  # the prompt is left, the reply begins
    term.send("\x03")
    term.expect(rb"\[stopped\]")
    term.expect(PROMPT)
    term.send("/memory\n")
    term.expect(rb"norm per layer")
    term.expect(PROMPT)
    term.send("/quit\n")
    assert term.wait() == 0
    assert read_memory_file(path)[0].any()


def test_ctrl_c_in_a_command_stops_that_only(base, adapter, monkeypatch, capsys):
    def interrupted(chat):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "rehearse", interrupted)
    monkeypatch.setattr(prompt, "said", lambda commands: iter(["/rehearse", "/memory"]))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["chat", "-m", str(base()), "--deltamem", str(adapter("qwen3", "tsw_qo")), *OPTIONS]) == 0
    assert "norm per layer" in capsys.readouterr().err


def test_ctrl_c_ends_a_chat_over_a_pipe(command, tmp_path):
    """Nobody could say otherwise that it is to end before the end of its input."""
    path = tmp_path / "a.memory"
    with subprocess.Popen(
        command("-n", "-1", "-c", "32768", "--ignore-eos", "--save-memory", path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as chat:
        chat.stdin.write(b"hello there\n" * 3)
        chat.stdin.flush()
        assert chat.stdout.read(20)
        chat.send_signal(signal.SIGINT)
        _, err = chat.communicate(timeout=300)
    assert chat.returncode == 130 and b"Traceback" not in err
    assert read_memory_file(path)[0].any()


def test_ctrl_c_twice_at_the_prompt_leaves(terminal, command, tmp_path):
    path = tmp_path / "a.memory"
    term = terminal(command("--save-memory", path))
    term.expect(PROMPT)
    term.interrupt(rb"Ctrl-C again")
    term.expect(PROMPT)
    term.interrupt()
    assert term.wait() == 0
    assert path.exists()


def test_ctrl_d_leaves(terminal, command):
    term = terminal(command())
    term.expect(PROMPT)
    term.send("\x04")
    assert term.wait() == 0


def test_a_reply_that_the_context_cuts_is_told(make_llm, capsys, monkeypatch):
    llm = make_llm(n_ctx=64, n_batch=64)
    go_on(monkeypatch, llm)
    options = {"n_predict": -1, "temp": 0.0}
    with Conversation(llm, **options) as conversation:
        Chat(conversation).say("hello there")
        shown = capsys.readouterr()
        assert conversation.finish_reason == "length" and "full" in shown.err and shown.out.strip()
        Chat(conversation).say("")
        conversation.clear()
        Chat(Conversation(llm, **{**options, "n_predict": 3})).say("hello there")
        assert "full" not in capsys.readouterr().err
