"""Whatever is typed in a chat: it goes on, its memory stays finite, and files of other kinds stay as they are."""

from __future__ import annotations

import contextlib
import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import inputs  # noqa: F401 - how many
from pydeltamem import Conversation, DeltaMemError, DeltaMemLlama
from pydeltamem.cli.chat import COMMANDS, Chat
from pydeltamem.models import default_files

PRECIOUS = {"model.gguf": b"GGUF precious", "text": b"precious", "empty": b""}
SAVED = ["a.memory", "b.memory"]

words = st.text(max_size=12) | st.sampled_from(["on", "off", "My name is Anna.", "\udcff", "\0", "x" * 300, "a\nb"])
# names without folders, so that nothing is written elsewhere
files = st.sampled_from([*PRECIOUS, *SAVED, ".", "no/where"]) | words.filter(lambda it: not set(it) & {"/", "\\", "~"})
lines = st.one_of(
    words.filter(lambda it: not it.startswith("/")),
    st.builds("{} {}".format, st.sampled_from(["/save", "/load"]), files),
    st.builds("{} {}".format, st.sampled_from([it for it in COMMANDS if it not in ("/save", "/load")]), words),
    st.builds("/{}".format, words.filter(lambda it: it.split()[:1] not in (["save"], ["load"]))),
)


@pytest.fixture(scope="module")
def llm():
    model, adapters = default_files()
    llm = DeltaMemLlama(model, deltamem_path=adapters["tsw"], n_ctx=256, n_threads=1, n_threads_batch=1)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@given(said=st.lists(lines, max_size=12))
def test_chat(said, llm, folder):
    for path in folder.iterdir():
        path.unlink()
    for name, data in PRECIOUS.items():
        (folder / name).write_bytes(data)
    with contextlib.closing(Conversation(llm, n_predict=2, temp=0.0)) as conversation:
        chat = Chat(conversation)
        out = io.StringIO()
        for line in said:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                try:
                    if not line.startswith("/"):
                        chat.say(line)
                    elif not chat.command(line):
                        assert line[1:].split()[0] in ("quit", "exit")
                except DeltaMemError as error:
                    assert str(error)
            roles = [message["role"] for message in conversation.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert conversation.n_tokens <= llm.n_ctx() and np.isfinite(conversation.memory.state).all()
        out.getvalue().encode()
    for name, data in PRECIOUS.items():
        if data:
            assert (folder / name).read_bytes() == data
