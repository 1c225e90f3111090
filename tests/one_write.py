"""What the tests of the rule of one write share: tokens, and what they ask a model."""

from __future__ import annotations

import numpy as np

TOKENS = [14, 17, 40, 99, 7, 63, 120, 14, 17, 88, 200, 31]
OTHER = [9, 8, 77, 6, 50, 4]
GREEDY = {"max_tokens": 10, "temperature": 0}

# float32 sums in another order: a token alone or within a batch
SAME = {"rtol": 0, "atol": 2e-6}


def texts(llm):
    return llm.input_ids[: llm.n_tokens].tolist()


def take(generator, n):
    return [token for _, token in zip(range(n), generator)]


def user(*contents):
    """Messages: a system prompt, then user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": "system", "content": "be short"}] + [
        {"role": role, "content": content} for role, content in zip(roles, contents)
    ]


def answer(llm, messages):
    return llm.create_chat_completion(messages, **GREEDY)["choices"][0]["message"]["content"]


def different(a, b):
    return np.abs(a - b).max() > 1e-4


def fail(*_):
    raise ValueError("no")


def one_decode(request, n_max):
    """Reads the first n_max tokens of a request, as the engine does."""
    with request.text.lock:
        assert request.plan([])
        piece, job = request.piece(n_max)
        [result] = request.text.slots.decode([job])
        request.did_decode(piece, result)


def read_twice(llm, *ingests):
    """The memory of a model that read a text, forgot it and read it again. Each ingest: tokens, and options of eval."""
    for _ in range(2):
        llm.reset()
        for tokens, options in ingests:
            llm.eval(tokens, **options)
    return llm.memory.state
