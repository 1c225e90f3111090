"""δ-mem in PyTorch, on any Hugging Face decoder, by hooks. The native side is tested against it.

    memory = DeltaMem.from_checkpoint(model, "adapter")
    model(input_ids)                            # every token reads and writes
    with memory.segments(ids): model(input_ids) # segment adapters: one ingest
    memory.write = False                        # tokens only read
    memory.save_checkpoint("trained")           # the published format

A hook runs whenever its layer does. Gradient checkpointing runs layers twice, and so would write twice.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, ModelError, OutputError
from ..formats import kinds
from ..formats.checkpoint import (
    ANY_OF,
    ARCHIVED,
    CONFIG,
    HEADS,
    INITIAL,
    MAX_RANK,
    MAX_STATE_HEADS,
    WEIGHTS,
    Checkpoint,
    Config,
    read_config,
    read_fields,
)
from ..formats.disk_errors import disk_errors
from ..formats.outputs import check_disk, make_folder, writing
from .attention import Attention, find_attention
from .recurrence import chunked_recurrence, recurrence

OUTPUT_INITS = ("zero", "random", "base_slice", "base_slice_fixed")


@dataclass(frozen=True)
class DeltaMemConfig(Config):
    """The published configuration, by default the released adapter's. The last five fields choose initial weights."""

    rank: int = 8
    alpha: float = 16.0
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: str = "standard"
    rankwise_gates: bool = True
    num_state_heads: int = 1
    memory_write_granularity: str = "token"
    target_layers: tuple[int, ...] = ()
    delta_heads: tuple[str, ...] = ("q", "o")
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = 1e-6
    trainable_delta_scale: bool = False
    delta_scale_max: float = 2.0
    delta_scale_granularity: str = "layer"
    delta_scale_parameterization: str = "alpha_over_rank"
    beta_bias_init: float = -1.5
    output_init: str = "zero"  # one of OUTPUT_INITS
    base_slice_ref_width: int = 8
    online_gain: float = 0.05  # factor on the corrections, unless they are zero
    delta_scale_init: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in {**ANY_OF, "output_init": OUTPUT_INITS}.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} = {getattr(self, name)!r} is unknown: it must be {' or '.join(allowed)}")
        for name, most in (("rank", MAX_RANK), ("num_state_heads", MAX_STATE_HEADS)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} = {getattr(self, name)} must be from 1 to {most}")
        if not self.delta_heads or not set(self.delta_heads) <= set(HEADS):
            raise InputError(f"delta_heads = {self.delta_heads!r} must be some of q, k, v, o")
        object.__setattr__(self, "delta_heads", tuple(head for head in HEADS if head in self.delta_heads))
        object.__setattr__(self, "target_layers", tuple(sorted(set(self.target_layers))))


class LayerMemory(nn.Module):
    """One layer's parameters, under their published names and in float32, and the computations with them."""

    memory_q_proj: nn.Parameter  # [H·r, n_embd], and so are those of k and v
    memory_k_proj: nn.Parameter
    memory_v_proj: nn.Parameter
    beta_proj: nn.Parameter  # [gates, n_embd]
    beta_bias: nn.Parameter  # [gates]
    lambda_proj: nn.Parameter  # where λ is not coupled
    lambda_bias: nn.Parameter
    delta_q_proj: nn.Parameter  # [rows of the projection, H·r]
    delta_k_proj: nn.Parameter
    delta_v_proj: nn.Parameter
    delta_o_proj: nn.Parameter
    delta_scale_raw: nn.Parameter  # where it is trained
    delta_o_rmsnorm_weight: nn.Parameter  # where there is a norm

    dropout = 0.0  # share of the input's features that a sequence does without, while training

    def __init__(self, config: DeltaMemConfig, attention: Attention):
        super().__init__()
        self.config = config
        like: dict[str, Any] = {"dtype": torch.float32, "device": attention.inputs[0].weight.device}

        def add(name: str, values: Tensor, active: bool = True) -> None:  # what has no effect is saved, but not trained
            setattr(self, name, nn.Parameter(values, requires_grad=active))

        def random(*shape: int) -> Tensor:
            return nn.init.kaiming_uniform_(torch.empty(shape, **like), a=math.sqrt(5))

        n_embd, n_read, n_gate = attention.inputs[0].in_features, config.n_read, config.n_gate
        for name in "qkv":
            add(f"memory_{name}_proj", random(n_read, n_embd))
        for name, bias in (("beta", config.beta_bias_init), ("lambda", -config.beta_bias_init)):
            if name == "beta" or not config.couple_lambda:
                active = name == "beta" or config.separate_lambda
                add(f"{name}_proj", torch.zeros(n_gate, n_embd, **like), active)
                add(f"{name}_bias", torch.full((n_gate,), bias, **like), active)
        for head in HEADS:
            active = head in config.delta_heads
            values = torch.zeros(attention.rows[head], n_read, **like)
            if active and config.output_init == "random":
                values = random(*values.shape) * config.online_gain
            elif active and config.output_init != "zero":
                fixed = config.output_init == "base_slice_fixed"
                width = min(config.rank, config.base_slice_ref_width) if fixed else config.rank
                columns = F.normalize(attention.weight(head).detach()[:, :width].float(), dim=0, eps=1e-6)
                values[:, : columns.shape[1]] = columns * config.online_gain
            add(f"delta_{head}_proj", values, active)
        if config.delta_o_rmsnorm:
            add("delta_o_rmsnorm_weight", torch.ones(attention.rows["o"], **like), config.has_o_norm)
        if config.trainable_delta_scale:
            share = min(max(config.delta_scale_init / config.delta_scale_max, 1e-6), 1 - 1e-6)
            n_scale = len(HEADS) if config.delta_scale_granularity == "head" else 1
            add("delta_scale_raw", torch.full((n_scale,), math.log(share / (1 - share)), **like))

    def packed_weight(self) -> Tensor:
        """The matrix that projects h to q, k, v and gates, [3·H·r + gates, n_embd]."""
        weights: list[Tensor] = [self.memory_q_proj, self.memory_k_proj, self.memory_v_proj, self.beta_proj]
        return torch.cat(weights + ([self.lambda_proj] if self.config.separate_lambda else []))

    def project(self, h: Tensor) -> Tensor:
        """h [..., n_embd] -> [..., 3·H·r + gates]. Linear: the mean of the results is the result of the mean of h."""
        weight = self.packed_weight()
        h = h.to(weight.dtype)
        if self.dropout and self.training:
            h = h * F.dropout(
                torch.ones_like(h[..., :1, :]), self.dropout
            )  # the same features for all tokens of a sequence
        return F.linear(h, weight)

    def activate(self, projected: Tensor, writes: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, keep, erase and write [B, T, H, r] of projections [B, T, ...]; writes [B, T]: which tokens write."""
        config, n_read, n_gate = self.config, self.config.n_read, self.config.n_gate
        q, k, v, *gates = projected.split([n_read] * 3 + [n_gate] * (1 + config.separate_lambda), -1)
        q, k, v = (x.unflatten(-1, (config.num_state_heads, config.rank)) for x in (q, k, v))
        if config.normalize_qk:
            q, k = (F.normalize(torch.tanh(x), dim=-1, eps=1e-6) for x in (q, k))

        biases = [self.beta_bias, self.lambda_bias] if config.separate_lambda else [self.beta_bias]
        gates = [torch.sigmoid(gate + bias) for gate, bias in zip(gates, biases)]
        beta, *rest = (gate.unflatten(-1, (config.num_state_heads, -1)).expand_as(q) for gate in gates)
        if config.state_update_mode == "no_lambda":
            keep = torch.ones_like(beta)
        else:
            keep = 1 - beta if config.couple_lambda else rest[0]
        erase = keep * beta if config.state_update_mode == "lambda_outside" else beta
        writes = writes[..., None, None]
        return q, k, v, torch.where(writes, keep, 1.0), erase * writes, beta * writes

    def delta(self, head: str, read: Tensor) -> Tensor:
        """The correction of a projection's output, [..., rows], from a read [..., H·r], in the read's type."""
        config = self.config
        weight = getattr(self, f"delta_{head}_proj") * (config.alpha / config.rank)
        delta = F.linear(read, weight.to(read.dtype))
        if config.trainable_delta_scale:
            raw = self.delta_scale_raw[HEADS.index(head) if config.delta_scale_granularity == "head" else 0]
            delta = delta * (torch.sigmoid(raw) * config.delta_scale_max)
        if head == "o" and config.delta_o_rmsnorm:
            mean_square = delta.pow(2).mean(-1, keepdim=True)
            scale = torch.rsqrt(mean_square + config.delta_o_rmsnorm_eps) * self.delta_o_rmsnorm_weight
            delta = delta * scale.to(delta.dtype)
        return delta


def torch_save(values: Any, temporary: Path, path: Path) -> None:
    """torch.save into the temporary file of `path`. Raises OutputError."""
    try:
        with disk_errors(path):
            torch.save(values, temporary)
    except RuntimeError as error:  # also of a full disk
        check_disk(path, temporary)
        raise OutputError(f"{path}: cannot be written: {error}") from error


#
# the memory of a model
#


class DeltaMem(nn.Module):
    """δ-mem on a Hugging Face decoder: the adapter's parameters, the state, and hooks on the model's projections.

    Args:
        model: any decoder of transformers. Its weights stay as they are; the caller freezes them.
        config: the released adapter's settings by default.
        recurrence: `chunked_recurrence`, `fused_recurrence` or `recurrence`, for runs of more than one token.

    Attributes:
        layers: the layers that carry memory, ascending.
        write: False: tokens read and do not write.
        state: [L, B, H, r, r], differentiable; assigning sets it. It takes the batch size of the tokens that it meets.
            A state of one sequence fits every batch size. Detach it to cut backpropagation through time.

    Raises ModelError if the attention of a layer is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DeltaMemConfig | None = None,
        recurrence: Callable[..., tuple[Tensor, Tensor]] = chunked_recurrence,
    ):
        super().__init__()
        self.config = config or DeltaMemConfig()
        self.recurrence = recurrence
        self.write = True
        attentions = find_attention(model)
        self.layers = list(self.config.target_layers or attentions)
        missing = [i for i in self.layers if i not in attentions]
        if missing or not self.layers:
            which = f"layer {missing[0]}" if missing else "any layer"
            raise ModelError(f"{type(model).__name__}: has no attention in {which}: no adapter can be put there")
        memories = nn.ModuleList(LayerMemory(self.config, attentions[i]) for i in self.layers)
        self.memories = cast("Sequence[LayerMemory]", memories)
        self._states: list[Tensor | None] = [None] * len(self.layers)
        self._reads: dict[int, Tensor] = {}  # of the layers' latest call
        self._ingest: _Ingest | None = None
        self._hooks: list[RemovableHandle] = []
        for i, layer in enumerate(self.layers):
            self._install(i, attentions[layer])

    @property
    def state(self) -> Tensor:
        size = (1, self.config.num_state_heads, self.config.rank, self.config.rank)
        states = [self.memories[0].beta_bias.new_zeros(size) if state is None else state for state in self._states]
        return torch.stack([state.to(states[0].device) for state in states])

    @state.setter
    def state(self, state: Tensor) -> None:
        expected = (len(self.layers), None, self.config.num_state_heads, self.config.rank, self.config.rank)
        if state.ndim != 5 or any(want not in (None, have) for want, have in zip(expected, state.shape)):
            shape = ", ".join("B" if size is None else str(size) for size in expected)
            raise InputError(f"a state has shape {list(state.shape)}, expected [{shape}]")
        self._states = [layer.to(m.beta_bias) for layer, m in zip(state.unbind(0), self.memories)]

    def reset(self) -> None:
        """Empties the memory, which then fits any batch size."""
        self._states = [None] * len(self.layers)

    def remove(self) -> None:
        """Takes the hooks off: the plain model again."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def segments(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Iterator[None]:
        """One ingest of any number of model calls: ids [T] or [B, T] give the segment that each token writes into.

        Tokens with id -1 do not write. All tokens read the state as it was before the ingest. At the end of the block
        each segment writes the mean of its tokens once, in the order of the ids. An exception drops the ingest. With
        token granularity the other tokens write one by one, as without ids. Where writes are deferred, the ingest is a
        turn: the other tokens write one by one, and all read the state as it was before; each call without ids is a
        turn of its own.

        Raises InputError if the calls have not as many tokens as there are ids.
        """
        ids = torch.as_tensor(ids)
        if ids.ndim not in (1, 2) or ids.is_floating_point():
            raise InputError(f"segments has shape {list(ids.shape)}, expected whole numbers [T] or [B, T]")
        if self._ingest:
            raise InputError("an ingest is open: leave its segments(...) first")
        self._ingest = ingest = _Ingest(ids.reshape(-1, ids.shape[-1]), len(self.layers))
        try:
            yield
            if any(done != ids.shape[-1] for done in ingest.done):
                raise InputError(f"segments: {ids.shape[-1]} ids, but the model decoded {max(ingest.done)} tokens")
            for i, memory in enumerate(self.memories):
                if (total := ingest.sums[i]) is not None:
                    self._run(i, memory.activate(*_means(total)))
        finally:
            self._ingest = None

    @classmethod
    def from_checkpoint(cls, model: nn.Module, directory: str | Path, **arguments: Any) -> DeltaMem:
        """Loads a published checkpoint directory onto the model. Raises CheckpointError or ModelError."""
        checkpoint = Checkpoint(directory)
        memory = cls(model, DeltaMemConfig(**asdict(checkpoint.config)), **arguments)
        fields = read_fields(checkpoint.directory / CONFIG)
        if fields.get("output_init") not in OUTPUT_INITS:
            fields.pop("output_init", None)
        # for the record: initial weights are not needed
        memory.config = replace(memory.config, **{name: fields[name] for name in INITIAL if name in fields})
        with torch.no_grad():
            for layer, name, parameter in memory._named():
                if parameter.requires_grad or f"model.layers.{layer}.self_attn.{name}" in checkpoint.tensors:
                    parameter.copy_(torch.tensor(checkpoint.take(layer, name, tuple(parameter.shape))))
        checkpoint.check_all_taken()
        return memory

    def save_checkpoint(self, directory: str | Path) -> None:
        """Writes the published format. Raises CheckpointError, and OutputError if it cannot be written."""
        directory = Path(directory)
        tensors = {f"model.layers.{i}.self_attn.{name}": p.detach().cpu().clone() for i, name, p in self._named()}
        fields = json.dumps({**ARCHIVED, **asdict(self.config)}, indent=2)
        make_folder(directory)
        with (
            writing(directory / WEIGHTS[0], kinds.PYTORCH) as weights,
            writing(directory / CONFIG, kinds.CONFIG) as config,
        ):
            torch_save(tensors, weights, directory / WEIGHTS[0])
            config.write_text(fields, encoding="utf-8")
            read_config(config)

    def _named(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        for layer, memory in zip(self.layers, self.memories):
            for name, parameter in memory.named_parameters():
                yield layer, name, parameter

    def _install(self, i: int, attention: Attention) -> None:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._reads[i] = self._read(i, args[0])

        def correct(heads: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                parts = list(output.split([attention.rows[head] for head in heads], -1))
                for part, head in enumerate(heads):
                    if head in self.config.delta_heads:
                        delta = self.memories[i].delta(head, self._reads[i])
                        parts[part] = parts[part] + delta.to(output.dtype)
                return torch.cat(parts, -1)

            return hook

        self._hooks.append(attention.inputs[0].register_forward_pre_hook(read))
        inputs = zip(attention.inputs, "qkv" if len(attention.inputs) == 3 else ("qkv",))
        for module, heads in (*inputs, (attention.output, "o")):
            if set(heads) & set(self.config.delta_heads):
                self._hooks.append(module.register_forward_hook(correct(heads)))

    def _read(self, i: int, h: Tensor) -> Tensor:
        """Reads and writes layer i's state with the attention's input h [B, T, n_embd]. Returns reads [B, T, H·r]."""
        memory, ingest = self.memories[i], self._ingest
        projected = memory.project(h)
        ids = ingest.take(i, *h.shape[:2]).to(h.device) if ingest else None
        writes = torch.full(h.shape[:2], self.write, device=h.device) if ids is None else (ids >= 0) & self.write
        values = memory.activate(projected, writes)
        if self.config.deferred:
            before = self._state_of(i, values[0])
            if ingest:
                before = ingest.before.setdefault(i, before)
            if self.write:
                self._run(i, values)
            return torch.einsum("bhij,bthj->bthi", before, values[0]).flatten(2)
        by_segment = ingest is not None and self.config.memory_write_granularity != "token"
        if self.write and not by_segment:
            return self._run(i, values).flatten(2)
        if self.write and ingest and ids is not None:
            ingest.add(i, projected, ids)
        return torch.einsum("bhij,bthj->bthi", self._state_of(i, values[0]), values[0]).flatten(2)

    def _run(self, i: int, values: tuple[Tensor, ...]) -> Tensor:
        """Lets tokens or segments read and write layer i's state. Returns the reads."""
        run = recurrence if values[0].shape[1] == 1 else self.recurrence
        reads, self._states[i] = run(self._state_of(i, values[0]), *values)
        return reads

    def _state_of(self, i: int, q: Tensor) -> Tensor:
        """Layer i's state for the batch of q [B, T, H, r]."""
        n_batch, _, n_head, rank = q.shape
        state = self._states[i]
        if state is None:
            state = q.new_zeros(1, n_head, rank, rank)
        if state.shape[0] not in (1, n_batch):
            raise InputError(f"the memory holds {state.shape[0]} sequences, the batch {n_batch}: reset() it first")
        return state.expand(n_batch, -1, -1, -1)


class _Ingest:
    """What segments gather before they write: a sum of projections per layer and segment. Where writes are deferred,
    the state of each layer before the turn.
    """

    def __init__(self, ids: Tensor, n_layer: int):
        self.ids = ids
        known, index = ids.unique(return_inverse=True)
        negative = int((known < 0).sum())
        self.index, self.n_segment = index - negative, len(known) - negative  # in the order of the ids
        self.done = [0] * n_layer
        self.sums: list[Tensor | None] = [None] * n_layer
        self.before: dict[int, Tensor] = {}

    def take(self, i: int, n_batch: int, n_token: int) -> Tensor:
        """The segment indices of layer i's next tokens, [B, T]; below 0: no segment."""
        begin, self.done[i] = self.done[i], self.done[i] + n_token
        if self.done[i] > self.ids.shape[1] or len(self.ids) not in (1, n_batch):
            raise InputError(f"segments: ids {list(self.ids.shape)} do not fit a batch [{n_batch}, {self.done[i]}]")
        return self.index[:, begin : self.done[i]].expand(n_batch, -1)

    def add(self, i: int, projected: Tensor, index: Tensor) -> None:
        if self.n_segment:
            belongs = (index[..., None] == torch.arange(self.n_segment, device=index.device)).to(projected.dtype)
            ones = projected.new_ones(*projected.shape[:-1], 1)  # their sum is the number of tokens
            added = belongs.mT @ torch.cat([projected, ones], -1)
            total = self.sums[i]
            self.sums[i] = added if total is None else total + added


def _means(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The mean projection of each segment of a layer [B, segments, ...], and which segments exist [B, segments]."""
    total, count = sums.split([sums.shape[-1] - 1, 1], -1)
    return total / count.clamp_min(1), count[..., 0] > 0
