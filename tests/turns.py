"""Turns, by which tests of the service under the server say something, and what comes of them."""

from __future__ import annotations

SAME = {"rtol": 0, "atol": 3e-6}  # float32 sums in another order
# letters that no token joins: an answer that is sent back has the tokens that it was sampled with
LETTERS = {"temperature": 0, "grammar": "root ::= [qxz]+"}
GREEDY = {"max_tokens": 6, **LETTERS}
ENDLESS = {"temperature": 0, "grammar": "root ::= [qxz] root"}  # ends when it is cut, and not before
F32 = {"type_k": 0, "type_v": 0}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


async def say(service, messages, session="ada", **options):
    """Adds the answer to the messages."""
    answer = service.chat(messages, session=session, **{**GREEDY, **options})
    messages.append(assistant(await answer.whole()))
    return answer


def text_of(service, session="ada"):
    return service._shared.live["", session].text.tokens.tolist()


async def state_of(service, session="ada"):
    return (await service.snapshot(session)).state
