"""The gated delta rule in PyTorch (docs/explanation/method.md): token by token, and two faster forms for training.

All take a state [B, H, r, r], and q, k, v, keep, erase and write [B, T, H, r]: row i of a head's state has its own
keep, erase and write. They return the reads, [B, T, H, r], each from the state before its token's write, and the state
after all tokens.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def recurrence(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (docs/explanation/method.md), token by token."""
    reads = []
    for q_t, k_t, v_t, keep_t, erase_t, write_t in zip(*(x.unbind(1) for x in (q, k, v, keep, erase, write))):
        reads.append((state @ q_t[..., None])[..., 0])
        predicted = (state @ k_t[..., None])[..., 0]
        change = write_t * v_t - erase_t * predicted
        state = keep_t[..., None] * state + change[..., :, None] * k_t[..., None, :]
    return torch.stack(reads, 1), state


def fused_recurrence(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """The same token by token, with a gradient written by hand: four operations per token forward, four back, the rest
    for all tokens at once. It keeps the states of all tokens, T·H·r² values per sequence. It has no second derivative.
    """
    return _FusedRecurrence.apply(state, q, k, v, keep, erase, write)


class _FusedRecurrence(torch.autograd.Function):
    # In here time comes first and batch and heads are one: columns [T, B·H, r, 1], states [T + 1, B·H, r, r].

    @staticmethod
    def forward(ctx: Any, state: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        n_batch, n_head = state.shape[:2]
        q, k, v, keep, erase, write = (x.transpose(0, 1).flatten(1, 2).contiguous()[..., None] for x in values)
        states = state.new_empty(len(q) + 1, *state.flatten(0, 1).shape)
        states[0] = state.flatten(0, 1)
        written, k_rows = write * v, k.mT
        change = torch.empty_like(v)
        for t, (here, after) in enumerate(itertools.pairwise(states)):
            torch.addcmul(written[t], erase[t], torch.bmm(here, k[t]), value=-1, out=change[t])
            torch.mul(here, keep[t], out=after)
            after.baddbmm_(change[t], k_rows[t])
        ctx.save_for_backward(states, change, q, k, v, keep, erase, write)
        reads = (states[:-1] @ q).unflatten(1, (n_batch, n_head))[..., 0].transpose(0, 1)
        return reads, states[-1].unflatten(0, (n_batch, n_head)).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_reads: Tensor, d_state: Tensor) -> tuple[Tensor, ...]:
        states, change, q, k, v, keep, erase, write = ctx.saved_tensors
        n_batch, n_head = d_state.shape[:2]
        d_reads = d_reads.transpose(0, 1).flatten(1, 2).contiguous()[..., None]
        d_states = d_reads @ q.mT  # by the reads first, then by all that comes after
        d_states = torch.cat([d_states, d_state.flatten(0, 1)[None]])
        d_change, d_predicted, k_rows = torch.empty_like(v), torch.empty_like(v), k.mT
        for t in range(len(q) - 1, -1, -1):
            torch.bmm(d_states[t + 1], k[t], out=d_change[t])
            torch.mul(d_change[t], erase[t], out=d_predicted[t])
            d_states[t].addcmul_(d_states[t + 1], keep[t]).baddbmm_(d_predicted[t], k_rows[t], alpha=-1)

        before, later = states[:-1], d_states[1:]
        found = (
            before.mT @ d_reads,  # q
            later.mT @ change - before.mT @ d_predicted,  # k
            write * d_change,  # v
            (later * before).sum(-1, keepdim=True),  # keep
            -(before @ k) * d_change,  # erase
            v * d_change,  # write
        )
        rest = (x[..., 0].unflatten(1, (n_batch, n_head)).transpose(0, 1) for x in found)
        return d_states[0].unflatten(0, (n_batch, n_head)), *rest


def chunked_recurrence(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    chunk: int = 16,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products over chunks of tokens. Only the states between chunks follow one after the other.

    In a chunk that starts with row s of a state, token t changes the row by u_t k_t, and before it the row is
    s_t = K(t) s + Σ_{τ<t} K(t, τ) u_τ k_τ, where K is the product of the keeps in between. Thus
    u_t = write_t v_t - erase_t (s_t · k_t) is a triangular system in u, solved for u = a - A s with s left open. Reads
    and the row after the chunk are linear in u and s.
    """
    n_token, rank = q.shape[1], q.shape[-1]
    chunk = min(chunk, n_token)

    def fold(x: Tensor, value: float = 0.0) -> Tensor:  # [B, T, H, r] -> [B, chunks, H, C, r], the last chunk filled up
        x = F.pad(x, (0, 0, 0, 0, 0, -n_token % chunk), value=value)
        return x.unflatten(1, (-1, chunk)).transpose(2, 3)

    q, k = fold(q), fold(k)
    v, keep, erase, write = fold(v).mT, fold(keep, 1.0).mT, fold(erase).mT, fold(write).mT  # [B, chunks, H, r, C]

    # Products of the keeps before each token and after the chunk: of all from its start, of those since each token.
    # Not by logarithms: their gradient divides by the keep, and so divides rounding errors by what may be nearly 0.
    marks = torch.eye(chunk + 1, dtype=q.dtype, device=q.device)
    product, products = marks[0].expand(*keep.shape[:-1], -1), []
    for keep_t, mark in zip(keep.unbind(-1), marks[1:]):
        products.append(product)
        product = keep_t[..., None] * product + mark
    since_start, between = torch.stack(products, -2).split([1, chunk], -1)  # [..., C, 1], [..., C, C]: K(t, τ)
    whole, to_end = product.split([1, chunk], -1)
    k_rows, q_rows = k[..., None, :, :], q[..., None, :, :]  # [B, chunks, H, 1, C, r]: the same for every row

    system = erase[..., None] * between * (k @ k.mT)[..., None, :, :]
    right = torch.cat([(write * v)[..., None], erase[..., None] * since_start * k_rows], -1)
    u = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)  # [..., r, C, 1 + r]: a and A

    read = (between * (q @ k.mT)[..., None, :, :]) @ u
    read_fixed, read_linear = read[..., 0], since_start * q_rows - read[..., 1:]
    end = k_rows.mT @ (to_end[..., None] * u)
    identity = torch.eye(rank, dtype=q.dtype, device=q.device)
    end_fixed, end_linear = end[..., 0], whole[..., None] * identity - end[..., 1:]

    starts = []
    for fixed, linear in zip(end_fixed.unbind(1), end_linear.unbind(1)):
        starts.append(state)
        state = fixed + (linear @ state[..., None])[..., 0]
    reads = read_fixed + (read_linear @ torch.stack(starts, 1)[..., None])[..., 0]  # [B, chunks, H, r, C]
    return reads.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :n_token], state
