"""What the tests of `Conversation` share."""

from __future__ import annotations

GREEDY = {"n_predict": 8, "temp": 0.0}
SAME = {"rtol": 0, "atol": 2e-6}  # float32 sums in another order


def roles(conversation):
    """The first letters of its messages' roles."""
    return "".join(message["role"][0] for message in conversation.messages)
