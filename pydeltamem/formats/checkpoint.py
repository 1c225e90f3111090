"""Reads a δ-mem checkpoint directory as the publication saves it, and checks every field and tensor. Writes weights."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, named, shown
from . import kinds
from .outputs import writing
from .pointer import refuse_pointer
from .sha256 import sha256_of

CONFIG = "delta_mem_config.json"
WEIGHTS = ("delta_mem_adapter.pt", "delta_mem_adapter.safetensors")

HEADS = ("q", "k", "v", "o")  # also the order of delta_scale_raw at granularity head
MAX_RANK = 64
MAX_STATE_HEADS = 1024
_MAX_FLOAT = float(np.finfo(np.float32).max)

# Fields that decide what is computed, with the types and values that we compute.
ANY_OF: dict[str, tuple[str, ...]] = {
    "state_update_mode": ("standard", "lambda_outside", "no_lambda"),
    "memory_write_granularity": ("token", "message_mean", "sentence_mean", "token_deferred", "reply_deferred"),
    "delta_scale_granularity": ("layer", "head"),
    "delta_scale_parameterization": ("alpha_over_rank",),
}
_FLAGS = ("normalize_qk", "couple_lambda", "rankwise_gates", "delta_o_rmsnorm", "trainable_delta_scale")
_NUMBERS = ("alpha", "delta_o_rmsnorm_eps", "delta_scale_max")

# Fields that only chose the initial weights: any value will do.
INITIAL = ("beta_bias_init", "output_init", "base_slice_ref_width", "online_gain", "delta_scale_init")

# Fields of experiments that the publication has archived, with the only values that have no effect.
ARCHIVED: dict[str, Any] = {
    "num_memory_partitions": 1,
    "num_global_memory_partitions": 0,
    "memory_partition_routing": "soft",
    "memory_partition_basis": "shared",
    "tie_memory_partition_read_write": False,
    "memory_partition_read_mode": "softmax",
    "memory_partition_sigmoid_gate_bias_init": -2.0,
    "slot_read_top_k": 0,
    "global_memory_mode": "shared_rw",
    "global_memory_read_top_k": 0,
    "global_memory_merge_mode": "gated_residual",
    "global_memory_gate_bias_init": -2.0,
    "global_memory_read_logit_bias": 0.0,
    "memory_reader_layers": [],
    "memory_reader_hidden_size": 1024,
    "memory_reader_residual_scale": 0.1,
    "memory_reader_read_only": True,
    "memory_readout_mode": "delta",
    "memory_write_source": "learned_hidden",
    "memory_write_proposals_per_message": 2,
    "synthetic_memory_slots": 1,
    "latent_memory_layers": [],
    "latent_memory_hidden_size": 1024,
    "latent_memory_residual_scale": 0.1,
    "latent_memory_slots": 4,
    "latent_memory_init_std": 0.002,
    "latent_gate_init": 0.01,
    "target_modules": ["self_attn"],
}

# The publication's values of the fields that a configuration may lack. It must have rank and alpha.
_DEFAULTS: dict[str, Any] = {
    "normalize_qk": True,
    "couple_lambda": True,
    "state_update_mode": "standard",
    "rankwise_gates": True,
    "num_state_heads": 1,
    "memory_write_granularity": "token",
    "target_layers": [],
    "delta_heads": list(HEADS),
    "delta_o_rmsnorm": False,
    "delta_o_rmsnorm_eps": 1e-6,
    "trainable_delta_scale": False,
    "delta_scale_max": 2.0,
    "delta_scale_granularity": "layer",
    "delta_scale_parameterization": "alpha_over_rank",
}


@dataclass(frozen=True)
class Config:
    """The fields of delta_mem_config.json that decide what is computed, under the publication's names."""

    rank: int
    alpha: float
    normalize_qk: bool
    couple_lambda: bool
    state_update_mode: str
    rankwise_gates: bool
    num_state_heads: int
    memory_write_granularity: str
    target_layers: tuple[int, ...]  # empty: all
    delta_heads: tuple[str, ...]  # in the order q, k, v, o
    delta_o_rmsnorm: bool
    delta_o_rmsnorm_eps: float
    trainable_delta_scale: bool
    delta_scale_max: float
    delta_scale_granularity: str
    delta_scale_parameterization: str

    @property
    def n_read(self) -> int:
        """Length of a read, H * r."""
        return self.num_state_heads * self.rank

    @property
    def n_gate(self) -> int:
        """Values of one gate: H * r, or H if gates are per head."""
        return self.n_read if self.rankwise_gates else self.num_state_heads

    @property
    def separate_lambda(self) -> bool:
        """Whether keep has its own projection."""
        return not self.couple_lambda and self.state_update_mode != "no_lambda"

    @property
    def deferred(self) -> bool:
        """Whether all tokens read what was written before their turn."""
        return self.memory_write_granularity == "token_deferred"

    @property
    def has_o_norm(self) -> bool:
        return self.delta_o_rmsnorm and "o" in self.delta_heads


class Checkpoint:
    """A checked configuration and the tensors of a checkpoint directory, as float32 arrays.

    Raises CheckpointError, with a sentence that names the file and what is wrong with it.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        if not os.path.isdir(self.directory):
            is_there = os.path.exists(self.directory)
            what = "is a file, not the directory of" if is_there else "no such directory; it must hold"
            raise CheckpointError(f"{named(self.directory)}: {what} a PyTorch checkpoint")
        self.config = read_config(self.directory / CONFIG)
        self.path = weights_file(self.directory)
        self.tensors = _read_tensors(self.path)
        self._taken: set[str] = set()

    @property
    def sha256(self) -> str:
        """Checksum of the weights file."""
        return sha256_of(self.path)

    @property
    def layers(self) -> list[int]:
        """Layers that the weights file has tensors for, ascending."""
        matches = (re.match(r"model\.layers\.(\d+)\.self_attn\.", key) for key in self.tensors)
        return sorted({int(match[1]) for match in matches if match})

    @property
    def widths(self) -> set[int]:
        """Row lengths of the projections from the hidden state. A sound checkpoint has one: the model's width."""
        return {
            tensor.shape[-1] for key, tensor in self.tensors.items() if key.endswith("memory_q_proj") and tensor.ndim
        }

    def take(self, layer: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A layer's tensor, float32, of that shape and finite."""
        key = f"model.layers.{layer}.self_attn.{name}"
        if key not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {key}")
        tensor = self.tensors[key]
        if tensor.shape != shape:
            raise CheckpointError(f"{self.path}: tensor {key} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{self.path}: tensor {key} has values that are not finite")
        self._taken.add(key)
        return tensor

    def drop(self, layer: int, name: str) -> None:
        """Accepts a tensor that has no effect."""
        self._taken.add(f"model.layers.{layer}.self_attn.{name}")

    def check_all_taken(self) -> None:
        """Raises CheckpointError if a tensor was left over: the checkpoint is not what its configuration says."""
        left = sorted(set(self.tensors) - self._taken)
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(
                f"{self.path}: tensor {shown(left[0])}{more} does not belong to this configuration and base"
            )


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of delta_mem_config.json, as they are. Raises CheckpointError."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a PyTorch checkpoint is {CONFIG} and {WEIGHTS[0]}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not a readable JSON file ({shown(error)})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return fields


def read_config(path: Path) -> Config:
    """Reads and checks delta_mem_config.json. Raises CheckpointError, naming field and value."""
    fields = read_fields(path)

    def refuse(name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{path}: {shown(name)} = {shown(json.dumps(fields.get(name)))} {why}")

    known = {*ANY_OF, *_FLAGS, *_NUMBERS, *INITIAL, *ARCHIVED, *_DEFAULTS, "rank", "alpha"}
    for name, value in fields.items():
        if name not in known:
            raise refuse(name, "is a field that this converter does not know")
        if name in ARCHIVED and not _equal(value, ARCHIVED[name]):
            raise refuse(name, f"is archived in the publication; only {json.dumps(ARCHIVED[name])} can be converted")
    for name in ("rank", "alpha"):
        if name not in fields:
            raise CheckpointError(f"{path}: has no field {name}")

    values = {**_DEFAULTS, **{name: fields[name] for name in fields if name in _DEFAULTS or name in ("rank", "alpha")}}
    for name, allowed in ANY_OF.items():
        if values[name] not in allowed:
            raise refuse(name, f"is not supported; it must be {' or '.join(allowed)}")
    for name in _FLAGS:
        if not isinstance(values[name], bool):
            raise refuse(name, "must be true or false")
    for name in _NUMBERS:
        if not _is_number(values[name]):
            raise refuse(name, "must be a finite number")
    for name, most in (("rank", MAX_RANK), ("num_state_heads", MAX_STATE_HEADS)):
        if not _is_integer(values[name]) or not 1 <= values[name] <= most:
            raise refuse(name, f"must be an integer from 1 to {most}")

    for name in ("delta_o_rmsnorm_eps", "delta_scale_max"):
        if not np.float32(values[name]) > 0:  # without ε the norm of an empty state's correction is 0 / 0
            raise refuse(name, "must be positive, in float32 too")

    heads, layers = values["delta_heads"], values["target_layers"]
    if not isinstance(heads, list) or not heads or any(head not in HEADS for head in heads):
        raise refuse("delta_heads", "must be a list of some of q, k, v, o")
    if not isinstance(layers, list) or not all(_is_integer(layer) and layer >= 0 for layer in layers):
        raise refuse("target_layers", "must be a list of layer numbers")
    values["delta_heads"] = tuple(head for head in HEADS if head in heads)
    values["target_layers"] = tuple(sorted(set(layers)))
    values["alpha"] = float(values["alpha"])
    return Config(**values)


def weights_file(directory: Path) -> Path:
    """The file of weights that is read in a checkpoint's directory. Raises CheckpointError."""
    found = [directory / name for name in WEIGHTS if (directory / name).is_file()]
    if not found:
        raise CheckpointError(f"{directory}: holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}")
    if len(found) > 1 and importlib.util.find_spec("torch") is None:
        return found[1]  # needs no PyTorch
    return found[0]


def write_weights(directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the weights of a checkpoint as safetensors. Raises OSError or SafetensorError."""
    import safetensors.numpy

    with writing(directory / WEIGHTS[1], kinds.WEIGHTS) as temporary:
        # save_file would make a file that only its owner reads
        temporary.write_bytes(safetensors.numpy.save(dict(tensors)))


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    refuse_pointer(path, CheckpointError)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: reading it needs PyTorch: pip install 'pydeltamem[convert]', or save the weights as {WEIGHTS[1]}"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it does not expect
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) and "Unsupported operand" not in str(error):  # which means a damaged file
            raise CheckpointError(
                f"{path}: holds more than tensors (its pickle wants to run code) and is refused"
            ) from None
        raise CheckpointError(f"{path}: is damaged or no PyTorch checkpoint") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # torch reports a damaged file by whatever its readers raise
        raise CheckpointError(f"{path}: is damaged or no PyTorch checkpoint") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{path}: is not a flat state dict of tensors")
    for name, tensor in loaded.items():
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(f"{path}: tensor {shown(name)} is no dense tensor of floating-point numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: tensor {shown(name)} is larger than its data in the file")
    return {str(name): tensor.detach().to(torch.float32).numpy() for name, tensor in loaded.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    try:
        tensors = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged or no safetensors file ({shown(error)})") from error
    return {name: _to_float32(path, name, **tensor) for name, tensor in tensors}


def _to_float32(path: Path, name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":  # numpy has no such type: it is the upper half of a float32
        values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype in ("F8_E4M3", "F8_E5M2"):
        values = _float8(dtype)[np.frombuffer(data, dtype=np.uint8)]
    elif dtype in ("F16", "F32", "F64"):
        with np.errstate(over="ignore"):  # an infinity is refused later, by name
            values = np.frombuffer(data, dtype=f"<f{int(dtype[1:]) // 8}").astype(np.float32)
    else:
        raise CheckpointError(f"{path}: tensor {shown(name)} is {dtype}: save the weights as F32, F16 or BF16")
    return values.reshape(shape)


def _float8(dtype: str) -> np.ndarray:
    """The 256 values of a type, as float32."""
    bits = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (bits << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    values: np.ndarray = np.ldexp(
        np.where(exponent > 0, 8.0 + mantissa, mantissa), np.maximum(exponent, 1).astype(int) - 10
    )
    values[(bits & 127) == 127] = np.nan  # there is no infinity
    values[bits > 127] *= -1
    return values.astype(np.float32)


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT
