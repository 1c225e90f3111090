"""Random schedules over four conversations against a simple model of what each memory should be.

The model knows no checkpoints, records, batches or places: each conversation has a sequence of its own in another
context, which reads one token per call and keeps the state after every one.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from pydeltamem import _lib
from pydeltamem.conversation import Conversation, chat_prompt, say_together
from session import llama, open_session

N_SCHEDULES = int(os.environ.get("DELTAMEM_SCHEDULES", "40"))  # `make schedules` runs 1,000
N_OPERATIONS = 12
N_CONVERSATIONS = 4
OPERATIONS = [
    "say", "say", "say together", "add", "regenerate", "edit", "undo", "clear", "fork", "save", "load", "reset", "set",
    "drop", "leave",
]  # fmt: skip
SYSTEMS = ["", "be short", "be kind"]
WORDS = ["ada", "lima", "red", "7", "who", "why", "tea", "sun"]


class Simple:
    """What one conversation's memory should be."""

    def __init__(self, session, seq):
        self.session, self.seq = session, seq
        self.memory = llama.llama_get_memory(session.ctx)
        self.tokens, self.states, self.floor = [], [np.zeros_like(session.state(seq))], 0
        self.n_kv = 0
        self.become(self.states[0])

    def become(self, state):
        """Another memory: the text cannot take it back."""
        assert not _lib.llama_deltamem_state_set(self.session.ctx, self.seq, pointer(state), state.size)
        self.states[len(self.tokens)] = state.copy()
        self.floor = len(self.tokens)

    def cut_kv(self, n):
        llama.llama_memory_seq_rm(self.memory, self.seq, n, -1)
        self.n_kv = self.session.n_past[self.seq] = n

    def decode(self, token, write):
        _lib.llama_deltamem_set_write(self.session.ctx, self.seq, write)
        self.session.decode([(token, self.seq)])
        self.n_kv += 1

    def go_on(self, tokens, lost):
        """The text is these tokens from now on. `lost`: the KV cache was."""
        n = common(self.tokens, tokens)
        if n < self.floor:
            n = min(n, len(self.tokens))
        self.back(n)
        if lost:
            self.cut_kv(0)
        for token in self.tokens[self.n_kv :]:  # read again, without writing
            self.decode(token, False)
        for token in tokens[n:]:
            self.decode(token, True)
            self.tokens.append(token)
            self.states.append(self.session.state(self.seq))

    def back(self, n):
        if n == len(self.tokens):
            return
        state = self.states[max(n, self.floor)]
        self.states = [*self.states[:n], state.copy()]
        self.tokens = self.tokens[:n]
        assert not _lib.llama_deltamem_state_set(self.session.ctx, self.seq, pointer(state), state.size)
        self.floor = min(self.floor, n)
        if self.n_kv > n:
            self.cut_kv(n)

    def drop(self, start, end, lost):
        if lost:
            self.cut_kv(0)
        if self.n_kv > end:
            llama.llama_memory_seq_rm(self.memory, self.seq, start, end)
            llama.llama_memory_seq_add(self.memory, self.seq, end, self.n_kv, start - end)
            self.n_kv -= end - start
            self.session.n_past[self.seq] = self.n_kv
        elif self.n_kv > start:
            self.cut_kv(start)
        del self.tokens[start:end]
        self.states = [self.states[end]] * start + self.states[end:]
        self.floor = max(start, self.floor - (end - start))

    def clear(self, n):
        """Another text, which begins with the first n tokens of this one."""
        self.cut_kv(min(self.n_kv, n))
        self.tokens, self.states, self.floor = self.tokens[:n], [self.states[-1]] * (n + 1), n

    def copy_to(self, other, with_kv):
        other.cut_kv(0)
        other.tokens, other.states, other.floor = list(self.tokens), list(self.states), self.floor
        state = self.states[-1]
        assert not _lib.llama_deltamem_state_set(self.session.ctx, other.seq, pointer(state), state.size)
        if with_kv:
            llama.llama_memory_seq_cp(self.memory, self.seq, other.seq, -1, -1)
            other.n_kv = self.session.n_past[other.seq] = self.n_kv


def pointer(state):
    return np.ascontiguousarray(state, dtype=np.float32).ctypes.data_as(_lib.float_p)


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class World:
    """Four conversations in three places, and the simple model of each."""

    def __init__(self, llm, session, folder, seed):
        self.llm, self.folder = llm, folder
        self.random = random.Random(seed)
        self.log = []
        self.conversations = [
            Conversation(llm, system=self.random.choice(SYSTEMS), n_predict=self.random.randint(1, 6), temp=1.0)
            for _ in range(N_CONVERSATIONS)
        ]
        self.simple = [Simple(session, i) for i in range(N_CONVERSATIONS)]
        for simple in self.simple:
            simple.cut_kv(0)
        self.saved = {}

    def words(self, unlike=""):
        """What is said next. What it takes the place of begins with another letter: so they part where it begins."""
        first = self.random.choice([letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != unlike[:1]])
        return " ".join([first, *self.random.choices(WORDS, k=self.random.randint(0, 3))])

    def lost(self, i):
        text = self.conversations[i]._text
        return text.seat is None or text.n_kv == 0 < text.n_tokens

    def goes_on(self, indices, act):
        """What `act` reads and writes, mirrored in the simple models."""
        lost = [self.lost(i) for i in indices]
        act()
        for i, was_lost in zip(indices, lost):
            conversation = self.conversations[i]
            text = conversation._text
            # where the prompt is known already, its last token is read again
            said = [m for m in conversation.messages if m["role"] != "assistant"]
            n = len(conversation.messages) - (conversation.messages[-1]["role"] == "assistant")
            prompt = chat_prompt(self.llm, conversation.messages[:n])[0] if said else []
            simple = self.simple[i]
            if common(simple.tokens, prompt) == len(prompt) and prompt:
                simple.back(min(len(simple.tokens), len(prompt) - 1))
            simple.go_on(text.tokens.tolist(), was_lost)

    def step(self):
        i = self.random.randrange(N_CONVERSATIONS)
        conversation, simple = self.conversations[i], self.simple[i]
        has_turn = any(m["role"] == "user" for m in conversation.messages)
        options = {"seed": self.random.randrange(2**31)}
        operation = self.random.choice(OPERATIONS)
        self.log.append(f"{operation} {i}")
        if operation == "say":
            self.goes_on([i], lambda: conversation.say(self.words(), **options))
        elif operation == "say together":
            indices = self.random.sample(range(N_CONVERSATIONS), self.random.randint(2, 3))
            self.log[-1] += f" -> {indices}"
            asked = {self.conversations[j]: self.words() for j in indices}
            self.goes_on(indices, lambda: say_together(asked, **options))
        elif operation == "add":
            for role in ("user", "assistant"):
                self.goes_on([i], lambda role=role: conversation.add(role, self.words()))
        elif operation == "regenerate" and has_turn:
            self.goes_on([i], lambda: conversation.regenerate(**options))
        elif operation == "edit" and has_turn:
            said = [m["content"] for m in conversation.messages if m["role"] == "user"][-1]
            self.goes_on([i], lambda: conversation.edit(self.words(unlike=said), **options))
        elif operation == "undo" and has_turn and simple.floor == 0:
            conversation.undo()
            simple.back(conversation.n_tokens)
        elif operation == "clear":
            conversation.clear()
            simple.clear(common(simple.tokens, conversation._ended_tokens()))
        elif operation == "fork":
            j = (i + 1) % N_CONVERSATIONS
            self.conversations[j] = None  # its place is free
            seated = conversation._text.seat is not None
            self.conversations[j] = conversation.fork()
            simple.copy_to(self.simple[j], seated and self.conversations[j]._text.seat is not None)
        elif operation == "save":
            conversation.memory.save(self.folder / f"{i}.memory")
            self.saved[i] = simple.states[-1]
        elif operation == "load" and self.saved:
            j = self.random.choice(list(self.saved))
            conversation.memory.load(self.folder / f"{j}.memory")
            simple.become(self.saved[j])
        elif operation == "reset":
            conversation.memory.reset()
            simple.become(np.zeros_like(simple.states[0]))
        elif operation == "set":
            state = np.random.default_rng(self.random.randrange(2**31)).standard_normal(simple.states[0].shape)
            conversation.memory.state = state
            simple.become(state.astype(np.float32))
        elif operation == "leave":
            self.llm._seats.leave(conversation._text)
        elif operation == "drop":
            self.drop(i)

    def drop(self, i):
        """The oldest turn leaves the text, if there is another one and the text has reached it."""
        conversation, simple = self.conversations[i], self.simple[i]
        n, first = conversation._n_oldest_turn(), len(conversation._system())
        prompt = conversation._prompt()
        start, end = (len(conversation._ended_tokens(k)) for k in (first, first + n))
        n_read = common(simple.tokens, prompt)
        if n == 0 or end > n_read:
            return
        lost = self.lost(i)
        conversation._drop(n)
        if n_read < len(prompt):
            simple.back(n_read)  # what is worded differently now
        simple.drop(start, end, lost)

    def check(self):
        for conversation, simple in zip(self.conversations, self.simple):
            assert conversation._text.tokens.tolist() == simple.tokens, "; ".join(self.log)
            # float32 sums in another order, over a text of some hundred tokens
            np.testing.assert_allclose(
                conversation.memory.state, simple.states[-1], rtol=0, atol=1e-5, err_msg="; ".join(self.log)
            )


@pytest.fixture(scope="module")
def session(base, adapter):
    with open_session(base(), adapter("qwen3", "tsw_qo"), n_seq=N_CONVERSATIONS, n_ctx=2048, unified=False) as session:
        yield session


def test_schedules(make_llm, session, tmp_path):
    llm = make_llm(n_seq_max=3, n_ctx=512, type_k=0, type_v=0)
    for seed in range(N_SCHEDULES):
        world = World(llm, session, tmp_path, seed)
        for _ in range(N_OPERATIONS):
            world.step()
            world.check()
        world.conversations.clear()
