"""Conversations laid end to end, in one pass: what `deltamem train` runs.

The earlier turns of every conversation, the beginning that its questions share, and each question with its answer are
runs of one row of tokens. There is no padding, and nothing is decoded twice: attention stays within a text, and the
state passes from the earlier turns to the questions' beginning, and from there to each question on its own. padded.py
computes the same by hooks on the model, for any decoder; it is the reference for this file.

This knows some decoders only (FAMILIES): it uses the weights of the model's modules, and does not call the modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .conversations import Example, n_shared
from .kernels import PRESENT, Runs, Span, attention, recurrence, rms_norm, rotate, swiglu
from .reference import DeltaMem, LayerMemory

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass
class PackedBatch:
    """Examples as one row of N tokens.

    Where writes are deferred, the first tokens are of texts that read an empty memory. What the frozen model makes of
    them depends on no weight of the adapter, so that no gradient goes through them: they only write.
    """

    ids: Tensor  # [N]
    positions: Tensor  # [N]
    writes: Tensor  # [N]: which tokens write
    runs: Runs
    n_frozen: int  # how many tokens those texts have
    frozen: list[Span]  # these texts
    spans: list[Span]  # the others; the first begins at 0
    told: list[tuple[int, int]]  # where earlier turns stand, once or twice
    kept: Tensor  # [K]: the tokens whose logits are needed
    targets: Tensor  # [K]: the tokens that should follow them
    asks: list[int]  # for each question, how many of those belong to its answer

    @classmethod
    def of(
        cls, examples: Sequence[Example], device: str = "cpu", memory: bool = True, granularity: str = "token"
    ) -> PackedBatch:
        """The examples as one batch. memory False: the text stays before every question, for a teacher without an
        adapter. granularity: when tokens are read that write.
        """
        deferred, replies = granularity == "token_deferred", granularity == "reply_deferred"
        ids: list[int] = []
        positions: list[int] = []
        begin: list[int] = []
        end: list[int] = []
        parent: list[int] = []
        source: list[int] = []
        frozen: list[Span] = []
        spans: list[Span] = []
        told: list[tuple[int, int]] = []
        kept: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        reading: list[tuple[int, int]] = []  # runs that do not write

        def run(tokens: Sequence[int], position: int, after: int, reads: int, reply: bool = False) -> int:
            begin.append(len(ids))
            ids.extend(tokens)
            positions.extend(range(position, position + len(tokens)))
            end.append(len(ids))
            parent.append(after)
            source.append(PRESENT if replies and not reply else reads)
            return len(begin) - 1

        read = []  # for each example the run of its frozen text, -1: it has none
        for example in examples:
            is_frozen = deferred and example.earlier and not (example.visible or example.turns)
            read.append(run(example.earlier, 0, -1, -1) if is_frozen else -1)
            if is_frozen:
                frozen.append((begin[-1], end[-1], None))
                told.append((begin[-1], end[-1]))
        n_frozen = len(ids)
        for example, earlier in zip(examples, read):
            visible = example.visible or not memory
            questions = example.continued if visible else [ask.question for ask in example.asks]
            origin = len(ids)
            for _ in range((earlier < 0) + (example.rehearsed and not visible)):
                origin = len(ids)
                turns = [0, *(example.turns if deferred else ()), len(example.earlier)]
                for first, last in itertools.pairwise(turns):
                    earlier = run(example.earlier[first:last], first, earlier, earlier)
                told.append((origin, len(ids)))
                if example.earlier and not visible:  # each time a text of its own
                    spans.append((origin - n_frozen, len(ids) - n_frozen, None))
            position = len(example.earlier) if visible else 0
            origin = origin if visible else len(ids)
            shared = min(n_shared(questions), min(map(len, questions)) - 1)  # each keeps at least one token of its own
            beginning = run(questions[0][:shared], position, earlier, earlier)
            position += shared
            own = []
            for question, ask in zip(questions, example.asks):
                asked = run(question[shared:], position, beginning, earlier)
                replied = run(ask.answer[:-1], position + len(question) - shared, asked, earlier, reply=True)
                own.append((begin[asked], end[replied]))
                kept += range(end[asked] - 1, end[replied])
                targets += ask.answer
                lengths.append(len(ask.answer))
            if not example.ask_writes:
                reading.append((begin[beginning], len(ids)))
            seen = _visible(origin, len(ids), own, device)
            spans.append((origin - n_frozen, len(ids) - n_frozen, seen))
        numbers = (torch.tensor(x, device=device) for x in (ids, positions, kept, targets))
        ids_, positions_, kept_, targets_ = numbers
        writes = torch.full_like(ids_, memory, dtype=torch.bool)
        for start, stop in reading:
            writes[start:stop] = False
        runs = Runs(begin, end, parent, source if deferred or replies else None)
        return cls(ids_, positions_, writes, runs, n_frozen, frozen, spans, told, kept_, targets_, lengths)


def _visible(origin: int, end: int, own: Sequence[tuple[int, int]], device: str) -> Tensor | None:
    """Which tokens attend to which in [origin, end): to all before and themselves, but not to another question."""
    if len(own) == 1:
        return None
    n = end - origin
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    for first, last in own:
        seen[last - origin :, first - origin : last - origin] = False
    return seen


class PackedModel:
    """A frozen decoder and its adapter, for packed batches.

    Args:
        model: of one of FAMILIES; `refusal` says whether it is.
        memory: the adapter of that model. Its hooks may stay: the model's modules are not called.
    """

    def __init__(self, model: Any, memory: DeltaMem):
        self.model, self.memory = model, memory
        config = model.config.get_text_config()
        self.layers = list(model.model.layers)
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.of_layer: dict[int, LayerMemory] = {layer: memory.memories[i] for i, layer in enumerate(memory.layers)}
        self.gate_means: list[Tensor] = []  # the mean write gate of each layer in the latest pass

    @staticmethod
    def refusal(model: Any, memory: DeltaMem) -> str | None:
        """Why this pair cannot be packed; None if it can."""
        config = model.config.get_text_config()
        if config.model_type not in FAMILIES:
            return f"the packed form knows {', '.join(FAMILIES)}, not {config.model_type}"
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        if any(kind != "full_attention" for kind in kinds):
            return "the packed form knows full attention only"
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            return "the packed form knows no sliding window"
        rope = str(model.model.rotary_emb.rope_type)
        if "dynamic" in rope or rope == "longrope":  # here it would be the length of the longest one
            return f"the packed form knows no RoPE by the length of a text, which is {rope}"
        if memory.config.memory_write_granularity not in ("token", "token_deferred", "reply_deferred"):
            return "the packed form writes per token only"
        if getattr(config, "hidden_act", "silu") != "silu":
            return f"the packed form knows silu, not {config.hidden_act}"
        return None

    def logits(self, batch: PackedBatch, memory: bool = True) -> Tensor:
        """Logits of what follows each of `batch.kept`, [K, vocab]. memory False: of the frozen model alone."""
        n = batch.n_frozen
        written = self._frozen(batch) if n else {}
        if memory:
            self.gate_means = []
        angles = self._angles(batch.ids[n:], batch.positions[n:])
        x = F.embedding(batch.ids[n:], self.model.model.embed_tokens.weight)
        for i, layer in enumerate(self.layers):
            h = _norm(layer.input_layernorm, x)
            parameters = self.of_layer.get(i) if memory else None
            read = None if parameters is None else self._read(parameters, batch, written.get(i), h)
            x = self._layer(layer, x, h, batch.spans, angles, parameters, read)
        return self.model.lm_head(_norm(self.model.model.norm, x[batch.kept - n]))

    @torch.no_grad()
    def _frozen(self, batch: PackedBatch) -> dict[int, Tensor]:
        """The attention inputs of the tokens that depend on no weight of the adapter, by layer with memory."""
        ids, found = batch.ids[: batch.n_frozen], {}
        angles = self._angles(ids, batch.positions[: batch.n_frozen])
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        for i, layer in enumerate(self.layers):
            h = _norm(layer.input_layernorm, x)
            if i in self.of_layer:
                found[i] = h
            if len(found) < len(self.of_layer):
                x = self._layer(layer, x, h, batch.frozen, angles)
        return found

    def _angles(self, ids: Tensor, positions: Tensor) -> list[Tensor]:
        like = self.model.model.embed_tokens.weight[:1]
        turns = self.model.model.rotary_emb(like.expand(len(ids), -1)[None], positions[None])
        return [part[0, :, : self.size // 2].float().contiguous() for part in turns]

    def _read(self, parameters: LayerMemory, batch: PackedBatch, written: Tensor | None, h: Tensor) -> Tensor:
        """The reads [N, H·r] of a layer's tokens, after frozen ones with these attention inputs."""
        n = 0 if written is None else len(written)
        rows = h if written is None else torch.cat([written, h])
        inputs = F.linear(rows, parameters.packed_weight().to(h.dtype)).float()
        values = [x[0] for x in parameters.activate(inputs[None], batch.writes[None])]
        n_write = batch.writes.sum().clamp_min(1) * values[5][0].numel()
        self.gate_means.append(values[5].sum() / n_write)
        return recurrence(batch.runs, values).flatten(1).to(h.dtype)[n:]

    def _layer(
        self,
        layer: Any,
        x: Tensor,
        h: Tensor,
        spans: Sequence[Span],
        angles: Sequence[Tensor],
        parameters: LayerMemory | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """What a layer makes of x [N, n_embd]. h: its attention's input. read: corrects its projections."""
        x = x + self._attention(layer.self_attn, h, spans, angles, parameters, read)
        h, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
        return x + mlp.down_proj(swiglu(mlp.gate_proj(h), mlp.up_proj(h)))

    def _attention(
        self,
        block: Any,
        h: Tensor,
        spans: Sequence[Span],
        angles: Sequence[Tensor],
        parameters: LayerMemory | None,
        read: Tensor | None,
    ) -> Tensor:
        projected = {head: _linear(getattr(block, f"{head}_proj"), h) for head in "qkv"}
        if parameters is not None and read is not None:
            for head in set(parameters.config.delta_heads) & set("qkv"):
                projected[head] = projected[head] + parameters.delta(head, read)
        q, k, v = (projected[head].unflatten(-1, (-1, self.size)) for head in "qkv")
        if hasattr(block, "q_norm"):
            q, k = _norm(block.q_norm, q), _norm(block.k_norm, k)
        if getattr(block, "use_rope", True):
            q, k = (rotate(part, *angles) for part in (q, k))
        out = _linear(block.o_proj, attention(q, k, v, spans, block.scaling).flatten(1))
        if parameters is not None and read is not None and "o" in parameters.config.delta_heads:
            out = out + parameters.delta("o", read)
        return out


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _linear(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)  # not the module: its hooks belong to padded.py
