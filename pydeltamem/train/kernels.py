"""What a training step does between its matrix products: C kernels on a CPU, plain PyTorch elsewhere.

Every function here has both forms. The plain one is the reference of the tests, and runs on a GPU. The C one
(native/deltamem_train) runs for float32 and bfloat16 tensors on a CPU if the package has its library.
Set `FORCE_PLAIN` to run the plain forms everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .recurrence import chunked_recurrence

FORCE_PLAIN = False
PRESENT = -2

LIB_DIR = Path(__file__).resolve().parent.parent / "lib"

Span = tuple[int, int, "Tensor | None"]  # tokens [begin, end) of one text; who sees whom, None: all before and itself


@dataclass(frozen=True)
class Runs:
    """Runs of tokens, each of which reads and writes a state. Run j has the tokens [begin[j], end[j]), and starts from
    the state at the end of run parent[j] < j (-1: an empty state). Every token belongs to one run.

    source: for deferred writes. All tokens of run j read the state at the end of run source[j] < j (-1: an empty one;
    PRESENT: each reads what all tokens before it have written). None: all read the present.
    """

    begin: Sequence[int]
    end: Sequence[int]
    parent: Sequence[int]
    source: Sequence[int] | None = None


def recurrence(runs: Runs, values: Sequence[Tensor]) -> Tensor:
    """The reads [N, H, r] of tokens with q, k, v, keep, erase and write, each float32 [N, H, r]."""
    if _native(*values) and values[0].dtype == torch.float32:
        reads, last = _Recurrence.apply(runs, *values)
        return reads if runs.source is None else _deferred(runs, values[0], last.mT, reads)
    return recurrence_plain(runs, values)


def _deferred(runs: Runs, q: Tensor, last: Tensor, present: Tensor) -> Tensor:
    """The reads [N, H, r] where writes are deferred. last: the states [runs, H, r, r] at the ends of runs. present: the
    reads of what was just written.
    """
    assert runs.source is not None
    lengths = torch.tensor([end - begin for begin, end in zip(runs.begin, runs.end)], device=q.device)
    source = torch.tensor(runs.source, device=q.device).repeat_interleave(lengths)  # of each token
    read = torch.einsum("nhij,nhj->nhi", last[source.clamp_min(0)], q)
    read = torch.where((source < 0)[:, None, None], 0.0, read)
    return torch.where((source == PRESENT)[:, None, None], present, read)


def recurrence_plain(runs: Runs, values: Sequence[Tensor]) -> Tensor:
    """The same, by `chunked_recurrence` over all runs of one depth at once."""
    n_head, rank = values[0].shape[1:]
    depth: list[int] = []
    for parent in runs.parent:
        depth.append(0 if parent < 0 else depth[parent] + 1)
    last: list[Any] = [None] * len(depth)
    reads = values[0].new_zeros(values[0].shape)
    for level in range(max(depth) + 1):
        here = [j for j, d in enumerate(depth) if d == level and runs.end[j] > runs.begin[j]]
        for j, d in enumerate(depth):  # a run without tokens passes its state on
            if d == level and runs.end[j] == runs.begin[j]:
                last[j] = last[runs.parent[j]] if runs.parent[j] >= 0 else values[0].new_zeros(n_head, rank, rank)
        if not here:
            continue
        longest = max(runs.end[j] - runs.begin[j] for j in here)
        rows = [list(range(runs.begin[j], runs.end[j])) for j in here]
        token = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=reads.device)
        there = token >= 0
        q, k, v, keep, erase, write = (x[token.clamp_min(0)] for x in values)
        there_too = there[..., None, None]
        keep, erase, write = torch.where(there_too, keep, 1.0), erase * there_too, write * there_too
        empty = values[0].new_zeros(n_head, rank, rank)
        state = torch.stack([empty if runs.parent[j] < 0 else last[runs.parent[j]] for j in here])
        read, after = chunked_recurrence(state, q, k, v, keep, erase, write)
        reads = reads.index_put((token[there],), read[there])
        for row, j in enumerate(here):
            last[j] = after[row]
    return reads if runs.source is None else _deferred(runs, values[0], torch.stack(last), reads)


class _Recurrence(torch.autograd.Function):
    # The reads, and the states [runs, H, r, r] at the ends of runs, column-major.

    @staticmethod
    def forward(ctx: Any, runs: Runs, *values: Tensor) -> tuple[Tensor, Tensor]:
        values = tuple(x.contiguous() for x in values)
        n_token, n_head, rank = values[0].shape
        ctx.runs, like = _CRuns.of(runs, n_head, rank), values[0]
        reads, change = torch.zeros_like(like), torch.zeros_like(like)
        states = like.new_empty(n_token, n_head, rank, rank)
        last = like.new_empty(len(runs.begin), n_head, rank, rank)
        _call("recurrence", ctypes.byref(ctx.runs), *values, reads, states, change, last)
        ctx.save_for_backward(states, change, *values)
        return reads, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_reads: Tensor, d_last: Tensor) -> tuple[Any, ...]:
        states, change, *values = ctx.saved_tensors
        d_last = d_last.clone(memory_format=torch.contiguous_format)  # it becomes workspace
        found = [torch.zeros_like(x) for x in values]
        _call(
            "recurrence_back", ctypes.byref(ctx.runs), *values, states, change, d_reads.contiguous(), d_last, *found
        )  # fmt: skip
        return (None, *found)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension."""
    if _native(x, weight):
        return _RmsNorm.apply(x, weight, eps)
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (normal * weight.float()).to(x.dtype)


class _RmsNorm(torch.autograd.Function):  # the weight is frozen
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        n = x.shape[-1]
        y, scale = torch.empty_like(x), x.new_empty(x.numel() // n, dtype=torch.float32)
        _call("rms_norm", x, weight, y, scale, scale.numel(), n, ctypes.c_float(eps), *_kind(x))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _call("rms_norm_back", d_y.contiguous(), x, weight, scale, d_x, scale.numel(), x.shape[-1], *_kind(x))
        return d_x, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return _Swiglu.apply(gate, up) if _native(gate, up) else F.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _call("swiglu", gate, up, y, gate.numel(), *_kind(gate))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _call("swiglu_back", d_y.contiguous(), gate, up, d_gate, d_up, gate.numel(), *_kind(gate))
        return d_gate, d_up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: rotates the pairs (i, i + m) of x [N, H, 2·m] by angles of this cosine and sine, float32
    [N, m].
    """
    if _native(x):
        return _Rotate.apply(x, cosine.contiguous(), sine.contiguous())
    a, b = x.float().chunk(2, -1)
    c, s = cosine[:, None], sine[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _Rotate._turn(x, cosine, sine, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Any, ...]:
        cosine, sine = ctx.saved_tensors
        return _Rotate._turn(d_y, cosine, sine, -1.0), None, None

    @staticmethod
    def _turn(x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        n, n_head, size = x.shape
        _call("rotate", x, cosine, sine, y, n, n_head, size // 2, ctypes.c_float(sign), *_kind(x))
        return y


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """Attention within each of several texts end to end: q [N, heads, d], k and v [N, kv heads, d] -> [N, heads, d]."""
    if _native(q, k, v) and _flash() is not None:
        return _Attention.apply(q, k, v, spans, scale)
    n_group = q.shape[1] // k.shape[1]
    out = []
    for begin, end, visible in spans:
        of_q, of_k, of_v = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        of_k, of_v = of_k.repeat_interleave(n_group, 1), of_v.repeat_interleave(n_group, 1)
        read = F.scaled_dot_product_attention(
            of_q, of_k, of_v, attn_mask=visible, is_causal=visible is None, scale=scale
        )
        out.append(read[0].transpose(0, 1))
    return torch.cat(out)


class _Attention(torch.autograd.Function):
    # Forward by PyTorch's own kernel, which keeps the scores in float32. Its gradient is made for few long texts: here
    # the heads that share keys use one product, and there is no padding.

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
        out, log_sums = torch.empty_like(q), []
        n_group, flash = q.shape[1] // k.shape[1], _flash()
        assert flash is not None  # `attention` asks before
        for begin, end, visible in spans:
            of_q = q[begin:end].transpose(0, 1)[None]
            of_k, of_v = (
                x[begin:end].transpose(0, 1)[:, None].expand(-1, n_group, -1, -1).flatten(0, 1)[None] for x in (k, v)
            )
            bias = None
            if visible is not None:
                bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)
            read, log_sum = flash(of_q, of_k, of_v, 0.0, visible is None, attn_mask=bias, scale=scale)
            out[begin:end] = read[0].transpose(0, 1)
            n, given = end - begin, log_sum[0].float()  # [heads, n], or the other way round
            log_sums.append((given if given.shape[-1] == n and given.shape[0] == q.shape[1] else given.mT).contiguous())
        ctx.spans, ctx.scale, ctx.log_sums = spans, scale, log_sums
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out = ctx.saved_tensors
        n_kv, size = k.shape[1:]
        n_group = q.shape[1] // n_kv
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        inner = (d_out.float() * out.float()).sum(-1)  # [N, heads]
        for (begin, end, visible), log_sum in zip(ctx.spans, ctx.log_sums):
            n = end - begin
            of_q, above = (x[begin:end].transpose(0, 1).reshape(n_kv, n_group * n, size) for x in (q, d_out))
            of_k, of_v = (x[begin:end].transpose(0, 1).contiguous() for x in (k, v))
            scores = _product_less(of_q, of_k, (log_sum / ctx.scale).view(n_kv, -1))
            d_probs = _product_less(above, of_v, inner[begin:end].mT.reshape(n_kv, -1))
            _call(
                "attention_back", scores, d_probs, None if visible is None else visible.to(torch.uint8),
                n_kv * n_group, n, ctypes.c_float(ctx.scale), *_kind(q),
            )  # fmt: skip
            d_v[begin:end] = torch.bmm(scores.mT, above).transpose(0, 1)
            d_k[begin:end] = torch.bmm(d_probs.mT, of_q).transpose(0, 1)
            d_q[begin:end] = torch.bmm(d_probs, of_k).reshape(n_kv * n_group, n, size).transpose(0, 1)
        return d_q, d_k, d_v, None, None


def _product_less(x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
    """x yᵀ less a number for each row: x [B, n, d], y [B, m, d], float32 shift [B, n] -> [B, n, m] as x and y.

    The shift is part of the product, as features whose other factors are one, so it comes off before the result is
    rounded: bfloat16 would round a score of 100 by up to 0.25, and at a scale of 1/8 its probability by 3 %.
    """
    high = shift.to(x.dtype)
    low = (shift - high.float()).to(x.dtype)
    ones = y.new_ones(*y.shape[:2], 2)
    return torch.bmm(torch.cat([x, -high[..., None], -low[..., None]], -1), torch.cat([y, ones], -1).mT)


def _flash() -> Callable[..., tuple[Tensor, Tensor]] | None:
    return getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


#
# the library
#


class _CRuns(ctypes.Structure):
    """struct deltamem_train_runs."""

    _fields_ = (
        ("n_runs", ctypes.c_int64),
        ("begin", ctypes.POINTER(ctypes.c_int32)),
        ("end", ctypes.POINTER(ctypes.c_int32)),
        ("parent", ctypes.POINTER(ctypes.c_int32)),
        ("n_heads", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )

    @classmethod
    def of(cls, runs: Runs, n_head: int, rank: int) -> _CRuns:
        n = len(runs.begin)
        arrays = [(ctypes.c_int32 * n)(*values) for values in (runs.begin, runs.end, runs.parent)]
        return cls(n, *(ctypes.cast(x, ctypes.POINTER(ctypes.c_int32)) for x in arrays), n_head, rank)


# A wheel holds the kernels for these processors too, by what PyTorch calls them; the best comes first.
_LEVELS = {"AVX512": ("-x86-64-v4", "-x86-64-v3"), "AVX2": ("-x86-64-v3",)}


@functools.cache
def library() -> Any:
    """The kernels' library; None if the package was built without it."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    for level in (*_LEVELS.get(torch.backends.cpu.get_cpu_capability(), ()), ""):
        path = LIB_DIR / f"{prefix}deltamem-train{level}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:
                return None
    return None


def _native(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: all of one type, which a kernel is told once."""
    return (
        not FORCE_PLAIN
        and all(x.device.type == "cpu" for x in tensors)
        and {x.dtype for x in tensors} in ({torch.float32}, {torch.bfloat16})
        and library() is not None
    )


def _kind(x: Tensor) -> tuple[int, int]:
    """The last two arguments of an element-wise kernel: whether values are bfloat16, and threads."""
    return int(x.dtype == torch.bfloat16), torch.get_num_threads()


def _call(name: str, *arguments: Any) -> None:
    """Calls a kernel. Tensors must be contiguous and are passed by address. Whole numbers are passed as int64. The last
    two of an element-wise kernel are int, which may be passed wider in every calling convention that we build for.
    """
    given: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            assert x.is_contiguous(), name
            given.append(ctypes.c_void_p(x.data_ptr()))
        else:
            given.append(ctypes.c_int64(x) if isinstance(x, int) else x)
    getattr(library(), f"deltamem_train_{name}")(*given)
