"""What tests change in how a model decodes and samples, where no public name does."""

from __future__ import annotations


def fail_at(patch, llm, n=1):
    """llama.cpp fails in the n-th decode from here on, and in those after it."""
    decode, left = type(llm._ctx).decode, [n]

    def fail_later(ctx, batch):
        left[0] -= 1
        if left[0] <= 0:
            raise RuntimeError("llama_decode returned 1")
        return decode(ctx, batch)

    patch.setattr(type(llm._ctx), "decode", fail_later)


def go_on(patch, llm, until=lambda: False):
    """No token ends a reply, until that is true."""
    patch.setattr(llm._engine.slots, "is_end", lambda token: until())
