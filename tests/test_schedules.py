"""Random schedules over four conversations and the model's own text, against a simple model of each memory.

The model knows no checkpoints, records, batches or slots. Each conversation has its own sequence in another context,
which decodes one token per call, or one ingest in segments, and keeps the state after each.
"""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest

from native_context import llama, open_context
from pydeltamem.conversation import Conversation, say_together
from pydeltamem.runtime import library
from pydeltamem.runtime.chat_format import chat_prompt

N_SCHEDULES = int(os.environ.get("DELTAMEM_SCHEDULES", "40"))  # `make schedules` runs 1,000
N_OPERATIONS = 12
N_CONVERSATIONS = 4
OPERATIONS = [
    "say", "say", "say together", "add", "regenerate", "edit", "undo", "clear", "fork", "save", "load", "reset", "set",
    "drop", "leave", "rehearse", "own text", "own text",
]  # fmt: skip
CASES = [("tsw_qo", 512), ("tsw_qo", 16), ("ssw_message", 512), ("ssw_message", 16)]  # adapter and n_batch
SYSTEMS = ["", "be short", "be kind"]
WORDS = ["ada", "lima", "red", "7", "who", "why", "tea", "sun"]


class Simple:
    """What one conversation's memory should be."""

    def __init__(self, context, seq, by_segment):
        self.context, self.seq, self.by_segment = context, seq, by_segment
        self.memory = llama.llama_get_memory(context.ctx)
        self.tokens, self.states, self.floor = [], [np.zeros_like(context.state(seq))], 0
        self.begun = []  # for each token: where its ingest began
        self.n_kv = 0
        self.become(self.states[0])

    def become(self, state):
        """Another memory: the text cannot take it back."""
        assert not library.llama_deltamem_state_set(self.context.ctx, self.seq, pointer(state), state.size)
        self.states[len(self.tokens)] = state.copy()
        self.floor = len(self.tokens)

    def cut_kv(self, n):
        llama.llama_memory_seq_rm(self.memory, self.seq, n, -1)
        self.n_kv = self.context.n_past[self.seq] = n

    def decode(self, token, write):
        assert not library.llama_deltamem_set_write(self.context.ctx, self.seq, write)
        self.context.decode([(token, self.seq)])
        self.n_kv += 1

    def decode_segment(self, tokens):
        n = len(tokens)
        assert not library.llama_deltamem_set_write(self.context.ctx, self.seq, True)
        self.context.decode([(token, self.seq) for token in tokens], [0] * n, [0] * (n - 1) + [1])
        self.n_kv += n

    def ingest(self, tokens):
        """One ingest, of one segment."""
        n, before = len(tokens), self.states[-1]
        self.begun += [len(self.tokens)] * n
        self.tokens += tokens
        self.decode_segment(tokens)
        self.states += [before] * (n - 1) + [self.context.state(self.seq)]

    def read_again(self, lost):
        """What the KV cache lacks, without writing."""
        if lost:
            self.cut_kv(0)
        for token in self.tokens[self.n_kv :]:
            self.decode(token, False)

    def start_over(self):
        """All is read again as it was the first time, with writing."""
        state = self.states[self.floor]
        assert not library.llama_deltamem_state_set(self.context.ctx, self.seq, pointer(state), state.size)
        self.cut_kv(0)
        for token in self.tokens[: self.floor]:
            self.decode(token, False)
        starts = [i for i, begun in enumerate(self.begun) if begun == i >= self.floor]
        for start, end in itertools.pairwise([*starts, len(self.tokens)]):
            self.decode_segment(self.tokens[start:end])

    def go_on(self, prompt, text, lost):
        """Reads a prompt, at least its last token, and then what follows it in the text. `lost`: the KV cache was."""
        n = min(common(self.tokens, prompt), len(prompt) - 1)
        if n < len(self.tokens):
            n = max(self.begun[n], min(n, self.floor))
        self.back(n, lost)
        self.read_again(lost)
        if self.by_segment:
            self.ingest(prompt[n:])
            n = len(prompt)
        for token in text[n:]:
            self.decode(token, True)
            self.begun.append(len(self.tokens))
            self.tokens.append(token)
            self.states.append(self.context.state(self.seq))

    def back(self, n, lost):
        """Goes back to n. The rest of an ingest that is cut is read again. Returns whether something was read."""
        if n == len(self.tokens):
            return False
        begun = max(self.begun[n], min(n, self.floor))
        left = self.tokens[begun:n]
        state = self.states[max(begun, self.floor)]
        self.states = [*self.states[:begun], state.copy()]
        self.tokens, self.begun = self.tokens[:begun], self.begun[:begun]
        assert not library.llama_deltamem_state_set(self.context.ctx, self.seq, pointer(state), state.size)
        self.floor = min(self.floor, begun)
        if self.n_kv > begun:
            self.cut_kv(begun)
        if left:
            if lost:
                self.start_over()
            self.ingest(left)
        return bool(left)

    def drop(self, start, end, lost):
        if lost:
            self.cut_kv(0)
        if self.n_kv > end:
            llama.llama_memory_seq_rm(self.memory, self.seq, start, end)
            llama.llama_memory_seq_add(self.memory, self.seq, end, self.n_kv, start - end)
            self.n_kv -= end - start
            self.context.n_past[self.seq] = self.n_kv
        elif self.n_kv > start:
            self.cut_kv(start)
        # the memory can go back to where an ingest ended
        boundaries = [i for i, begun in enumerate([*self.begun, len(self.tokens)]) if begun == i >= end]
        self.floor = max(self.floor, boundaries[0]) - (end - start)
        del self.tokens[start:end], self.begun[start:end]
        self.begun = [i if i < start else max(start, i - (end - start)) for i in self.begun]
        self.states = [self.states[end]] * start + self.states[end:]

    def clear(self, n):
        """Another text, which begins with the first n tokens of this one."""
        self.cut_kv(min(self.n_kv, n))
        self.tokens, self.states, self.floor = self.tokens[:n], [self.states[-1]] * (n + 1), n
        self.begun = self.begun[:n]

    def rehearse(self):
        """All is read once more as it was the first time, into the present memory."""
        self.cut_kv(0)
        self.floor, self.states = 0, [self.states[-1]]
        starts = [i for i, begun in enumerate(self.begun) if begun == i]
        for start, end in itertools.pairwise([*starts, len(self.tokens)]):
            if self.by_segment:
                self.decode_segment(self.tokens[start:end])
            else:
                self.decode(self.tokens[start], True)
            self.states += self.states[-1:] * (end - start - 1) + [self.context.state(self.seq)]

    def copy_to(self, other, with_kv):
        other.cut_kv(0)
        other.tokens, other.states, other.floor = list(self.tokens), list(self.states), self.floor
        other.begun = list(self.begun)
        state = self.states[-1]
        assert not library.llama_deltamem_state_set(self.context.ctx, other.seq, pointer(state), state.size)
        if with_kv:
            llama.llama_memory_seq_cp(self.memory, self.seq, other.seq, -1, -1)
            other.n_kv = self.context.n_past[other.seq] = self.n_kv


def is_lost(text):
    """Whether it has to be read again."""
    return text.slot is None or text.n_kv == 0 < text.n_tokens


def pointer(state):
    return np.ascontiguousarray(state, dtype=np.float32).ctypes.data_as(library.float_p)


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class World:
    """Four conversations in three slots, and the simple model of each."""

    def __init__(self, llm, context, folder, seed):
        self.llm, self.folder = llm, folder
        self.random = random.Random(seed)
        self.log = []
        self.conversations = [
            Conversation(llm, system=self.random.choice(SYSTEMS), n_predict=self.random.randint(1, 6), temp=1.0)
            for _ in range(N_CONVERSATIONS)
        ]
        self.simple = [Simple(context, i, llm.memory.by_segment) for i in range(N_CONVERSATIONS)]
        self.was_lost = False  # the own text, since it began
        self.own = Simple(context, N_CONVERSATIONS, False)  # llm.generate and llm.eval give no segments
        llm.reset()
        llm.memory.reset()
        for simple in (*self.simple, self.own):
            simple.cut_kv(0)
        self.saved = {}

    def words(self, unlike=""):
        """What is said next. It begins with another letter than what it replaces, so they differ from there on."""
        first = self.random.choice([letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter != unlike[:1]])
        return " ".join([first, *self.random.choices(WORDS, k=self.random.randint(0, 3))])

    def lost(self, i):
        return is_lost(self.conversations[i]._text)

    def goes_on(self, indices, act):
        """Turns, mirrored in the simple models."""
        lost = [self.lost(i) for i in indices]
        act()
        for i, was_lost in zip(indices, lost):
            conversation = self.conversations[i]
            prompt = chat_prompt(self.llm, conversation.messages[:-1])
            self.simple[i].go_on(prompt, conversation.tokens, was_lost)

    def add(self, i, role):
        conversation, simple, lost = self.conversations[i], self.simple[i], self.lost(i)
        conversation.add(role, self.words())
        read = conversation._ended_tokens()
        if common(simple.tokens, read) < len(read):
            simple.go_on(read, read, lost)

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
                self.add(i, role)
        elif operation == "regenerate" and has_turn:
            self.goes_on([i], lambda: conversation.regenerate(**options))
        elif operation == "edit" and has_turn:
            said = [m["content"] for m in conversation.messages if m["role"] == "user"][-1]
            self.goes_on([i], lambda: conversation.edit(self.words(unlike=said), **options))
        elif operation == "undo" and has_turn and simple.floor == 0:
            lost = self.lost(i)
            conversation.undo()
            simple.back(conversation.n_tokens, lost)
        elif operation == "clear":
            conversation.clear()
            simple.clear(common(simple.tokens, conversation._ended_tokens()))
        elif operation == "fork":
            j = (i + 1) % N_CONVERSATIONS
            self.conversations[j] = None  # its slot is free
            had_slot = conversation._text.slot is not None
            self.conversations[j] = conversation.fork()
            simple.copy_to(self.simple[j], had_slot and self.conversations[j]._text.slot is not None)
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
            self.llm._engine.slots.leave(conversation._text)
        elif operation == "rehearse":
            conversation.memory.rehearse()
            simple.rehearse()
        elif operation == "drop":
            self.drop(i)
        elif operation == "own text":
            self.own_text()

    def own_text(self):
        """llm.generate, llm.eval, n_tokens set back, llm.reset."""
        llm, simple, lost = self.llm, self.own, is_lost(self.llm._text)
        operation = self.random.choice(["generate", "generate", "eval", "back", "reset"])
        new = [self.random.randrange(6, 250) for _ in range(self.random.randint(1, 9))]
        # Once it has lost its slot it only goes on: what it attends to after going back depends on whether there was
        # a checkpoint, and the simple model knows none.
        self.was_lost |= lost
        n = len(simple.tokens) if self.was_lost or operation == "eval" else self.random.randint(0, len(simple.tokens))
        self.log[-1] += f": {operation} {n}"
        if operation == "reset":
            llm.reset()
            simple.clear(0)
            self.was_lost = False
        elif operation == "generate":
            prompt = simple.tokens[:n] + new
            n = common(simple.tokens, prompt)
            generator = llm.generate(prompt, temp=1.0)
            read = [*prompt, *(token for _, token in zip(range(self.random.randint(1, 5)), generator))][:-1]
            generator.close()
            self.own_goes_on(n, read, lost)
        else:
            llm.n_tokens = n
            llm.eval(new)
            self.own_goes_on(n + common(simple.tokens[n:], new), simple.tokens[:n] + new, lost, n)

    def own_goes_on(self, n_common, tokens, lost, n=None):
        """Its text is these tokens now, n_common of them as before, and it was set back to n."""
        simple = self.own
        n = n_common if n is None else n
        if n_common <= 1 and n < len(simple.tokens):
            simple.clear(n)  # another text
        simple.go_on([*tokens[:n], *tokens[n : n + 1]], tokens, lost)

    def drop(self, i):
        """The oldest turn leaves the text, if there is another one and the text has reached it."""
        conversation, simple = self.conversations[i], self.simple[i]
        n, first = conversation._n_oldest_turn(), len(conversation._system())
        prompt = conversation._whole(conversation.messages)
        start, end = (len(conversation._ended_tokens(k)) for k in (first, first + n))
        n_read = common(simple.tokens, prompt)
        if n == 0 or end > n_read:
            return
        lost = self.lost(i)
        conversation._drop(n)
        if n_read < len(prompt):
            lost = not simple.back(n_read, lost) and lost  # tokens that the template now words differently
        simple.drop(start, end, lost)

    def check(self):
        for conversation, simple in zip(self.conversations, self.simple):
            self.agree(conversation, simple)
        self.agree(self.llm, self.own)

    def agree(self, owner, simple):
        assert list(owner.eval_tokens if owner is self.llm else owner.tokens) == simple.tokens, "; ".join(self.log)
        # float32 sums in another order, over a text of some hundred tokens
        np.testing.assert_allclose(
            owner.memory.state, simple.states[-1], rtol=0, atol=1e-5, err_msg="; ".join(self.log)
        )


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{case}-{n_batch}" for case, n_batch in CASES])
def test_schedules(base, adapter, make_llm, tmp_path, case):
    name, n_batch = CASES[case]
    llm = make_llm(name, n_seq_max=3, n_ctx=512, n_batch=n_batch, type_k=0, type_v=0)
    with open_context(
        base(), adapter("qwen3", name), n_seq=N_CONVERSATIONS + 1, n_ctx=5 * 512, unified=False
    ) as context:
        for seed in range(case, N_SCHEDULES, len(CASES)):
            world = World(llm, context, tmp_path, seed)
            for _ in range(N_OPERATIONS):
                world.step()
                world.check()
            world.conversations.clear()
