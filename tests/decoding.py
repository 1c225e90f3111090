"""What tests change in how a model decodes and samples, where no public name does."""

from __future__ import annotations

import signal


def fail_at(patch, llm, n=1):
    """llama.cpp fails in the n-th decode from here on, and in those after it."""
    decode, left = type(llm._ctx).decode, [n]

    def fail_later(ctx, batch):
        left[0] -= 1
        if left[0] <= 0:
            raise RuntimeError("llama_decode returned 1")
        return decode(ctx, batch)

    patch.setattr(type(llm._ctx), "decode", fail_later)


def press_at(patch, llm, n=1):
    """Ctrl-C is pressed while llama.cpp computes the n-th batch from here on."""
    decode, left = type(llm._ctx).decode, [n]

    def decode_and_press(ctx, batch):
        left[0] -= 1
        decode(ctx, batch)
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(type(llm._ctx), "decode", decode_and_press)


def go_on(patch, llm, until=lambda: False):
    """No token ends a reply, until that is true."""
    patch.setattr(llm._engine.slots, "is_end", lambda token: until())
