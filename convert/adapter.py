"""Converts a PyTorch checkpoint to an adapter GGUF for a base model (docs/reference/formats.md)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from pydeltamem.errors import CheckpointError, ModelError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import HEADS, Checkpoint
from pydeltamem.formats.description import ADAPTER_VERSION
from pydeltamem.formats.kinds import ADAPTER
from pydeltamem.formats.outputs import as_text, files_of, refuse_inputs, writing

OUTTYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


# The largest value that each type can hold: a block of Q8_0 has 127 steps of an F16.
_LIMITS = {
    gguf.GGMLQuantizationType.F16: 65504.0,
    gguf.GGMLQuantizationType.BF16: float.fromhex("0x1.fep127"),
    gguf.GGMLQuantizationType.Q8_0: 127 * 65504.0,
}


def layers_of(checkpoint: Checkpoint, base: Base) -> list[int]:
    """The base's layers that carry memory, ascending: those that the configuration names, or all with attention."""
    layers = list(checkpoint.config.target_layers)
    for layer in layers:
        if layer >= base.n_layer:
            raise CheckpointError(
                f"{checkpoint.directory}: target_layers names layer {layer}, but {base.path} has {base.n_layer} layers"
            )
    layers = layers or [i for i, layer in enumerate(base.layers) if layer.has_attention]
    if not layers:
        raise ModelError(f"{base.path}: has no layer with attention projections, which an adapter needs")
    return layers


def packed_tensors(checkpoint: Checkpoint, base: Base) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 values of the adapter's tensors, in numpy's order (rows first).

    Checks every shape against configuration and base, that all values are finite, and that no tensor is left over.
    """
    config = checkpoint.config
    _check_fit(checkpoint, base)
    for layer in layers_of(checkpoint, base):
        widths = base.layers[layer]

        def take(name: str, *shape: int, layer: int = layer) -> np.ndarray:
            return checkpoint.take(layer, name, shape)

        projections = [take(f"memory_{name}_proj", config.n_read, base.n_embd) for name in ("q", "k", "v")]
        projections.append(take("beta_proj", config.n_gate, base.n_embd))
        biases = [take("beta_bias", config.n_gate)]
        if config.separate_lambda:
            projections.append(take("lambda_proj", config.n_gate, base.n_embd))
            biases.append(take("lambda_bias", config.n_gate))
        elif not config.couple_lambda:
            checkpoint.drop(layer, "lambda_proj")
            checkpoint.drop(layer, "lambda_bias")
        yield f"blk.{layer}.deltamem_in.weight", np.concatenate(projections)
        yield f"blk.{layer}.deltamem_gate.bias", np.concatenate(biases)

        scales = _scales(checkpoint, layer)
        for head in HEADS:
            checkpoint.drop(layer, f"delta_{head}_proj")  # a checkpoint also holds those of heads that are off
        for head in config.delta_heads:
            if not widths.rows(head):
                raise CheckpointError(
                    f"{checkpoint.directory}: corrects layer {layer}, which has no attention in {base.path}"
                )
            delta = take(f"delta_{head}_proj", widths.rows(head), config.n_read)
            with np.errstate(over="ignore"):
                delta = (delta.astype(np.float64) * scales[head]).astype(np.float32)
            if not np.isfinite(delta).all():
                raise CheckpointError(
                    f"{checkpoint.directory}: the scale makes delta_{head}_proj of layer {layer} overflow float32"
                )
            yield f"blk.{layer}.deltamem_{head}.weight", np.ascontiguousarray(base.permute(head, layer, delta))
        if config.has_o_norm:
            yield f"blk.{layer}.deltamem_o_norm.weight", take("delta_o_rmsnorm_weight", base.n_embd)
        elif config.delta_o_rmsnorm:
            checkpoint.drop(layer, "delta_o_rmsnorm_weight")
    checkpoint.check_all_taken()


def _check_fit(checkpoint: Checkpoint, base: Base) -> None:
    """Raises CheckpointError if the checkpoint was trained for a model of another size."""
    wrong = checkpoint.widths - {base.n_embd}
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: is for a model of width {min(wrong)}, but {base.path} has width {base.n_embd}"
        )
    saved, layers = checkpoint.layers, layers_of(checkpoint, base)
    if not checkpoint.config.target_layers and saved and saved[-1] != layers[-1]:
        of_base = "" if len(layers) == base.n_layer else f", its last attention in layer {layers[-1]}"
        raise CheckpointError(
            f"{checkpoint.path}: is for a model of {saved[-1] + 1} layers, but {base.path} has {base.n_layer}{of_base}"
        )


def _scales(checkpoint: Checkpoint, layer: int) -> dict[str, float]:
    """alpha / rank * s per head, s trained or 1."""
    config = checkpoint.config
    scale = dict.fromkeys(HEADS, config.alpha / config.rank)
    if config.trainable_delta_scale:
        per_head = config.delta_scale_granularity == "head"
        raw = checkpoint.take(layer, "delta_scale_raw", (len(HEADS) if per_head else 1,)).astype(np.float64)
        with np.errstate(over="ignore"):
            trained = config.delta_scale_max / (1.0 + np.exp(-raw))
        scale = {head: scale[head] * float(trained[i if per_head else 0]) for i, head in enumerate(HEADS)}
    return scale


def stored_type(name: str, shape: tuple[int, ...], outtype: str) -> gguf.GGMLQuantizationType:
    """Biases and norms stay F32. A row that does not divide into blocks is F16 instead of Q8_0."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    kind = OUTTYPES[outtype][0]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def write_adapter(
    checkpoint: Checkpoint, base: Base, path: str | os.PathLike[str], outtype: str = "f32", name: str | None = None
) -> None:
    """Writes the adapter GGUF in one step: `path` holds the old file or the whole new one.

    Raises CheckpointError or ModelError, InputError if `path` is one of the inputs, OutputError if it cannot be
    written.
    """
    refuse_inputs(path, (*base.files, *files_of(checkpoint.directory)))
    with writing(path, ADAPTER) as temporary:
        tensors = list(packed_tensors(checkpoint, base))
        name = as_text(name or checkpoint.directory.resolve().name)
        _write(temporary, checkpoint, base, tensors, outtype, name)


def _write(
    path: Path,
    checkpoint: Checkpoint,
    base: Base,
    tensors: list[tuple[str, np.ndarray]],
    outtype: str,
    name: str,
) -> None:
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, base.architecture)  # opens no file yet
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string("adapter.type", "deltamem")
        writer.add_name(name)
        writer.add_file_type(OUTTYPES[outtype][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        writer.add_uint32("deltamem.version", ADAPTER_VERSION)
        writer.add_uint32("deltamem.rank", config.rank)
        writer.add_uint32("deltamem.head_count", config.num_state_heads)
        writer.add_float32("deltamem.alpha", config.alpha)
        writer.add_string("deltamem.update_mode", config.state_update_mode)
        writer.add_bool("deltamem.couple_lambda", config.couple_lambda)
        writer.add_bool("deltamem.rankwise_gates", config.rankwise_gates)
        writer.add_bool("deltamem.normalize_qk", config.normalize_qk)
        writer.add_string("deltamem.write_granularity", config.memory_write_granularity)
        writer.add_array("deltamem.delta_heads", list(config.delta_heads))
        writer.add_key_value(
            "deltamem.layers", layers_of(checkpoint, base), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        )
        if config.has_o_norm:
            writer.add_float32("deltamem.o_norm_epsilon", config.delta_o_rmsnorm_eps)
        writer.add_uint32("deltamem.base.embedding_length", base.n_embd)
        writer.add_uint32("deltamem.base.block_count", base.n_layer)
        writer.add_string("deltamem.source.name", checkpoint.path.name)
        writer.add_string("deltamem.source.sha256", checkpoint.sha256)

        for tensor_name, values in tensors:
            kind = stored_type(tensor_name, values.shape, outtype)
            largest = np.abs(values).max()
            if largest > _LIMITS.get(kind, np.inf):
                other = "f32" if largest > _LIMITS[gguf.GGMLQuantizationType.BF16] else "f32 or bf16"
                raise CheckpointError(
                    f"{checkpoint.path}: values of {tensor_name} are too large for {kind.name}: use --outtype {other}"
                )
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)

        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        with contextlib.suppress(OSError):
            writer.close()
