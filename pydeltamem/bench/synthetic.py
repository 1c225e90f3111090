"""Models of real shapes with random weights, and PyTorch checkpoints of adapters for them: no download is needed.

What such a model writes means nothing. Its weights have mean 0 and a deviation that keeps activations near one through
any number of layers, so no type overflows and logits stay finite. Time and RAM are those of the real model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import safetensors
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from ..errors import InputError, ModelError, OutputError
from ..formats import kinds
from ..formats.gguf_header import Header
from ..formats.outputs import check_target, make_folder, writing


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder with tied embeddings, named as in llama.cpp."""

    architecture: str  # qwen3 or smollm3
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int | None = None  # None: as many as the vocabulary has
    n_ctx: int = 40960
    rope_freq_base: float = 1e6


SHAPES: dict[str, Shape] = {
    "qwen3-0.6b": Shape("qwen3", 28, 1024, 16, 8, 128, 3072, 151936),
    "qwen3-1.7b": Shape("qwen3", 28, 2048, 16, 8, 128, 6144, 151936),
    "qwen3-4b": Shape("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, n_ctx=262144, rope_freq_base=5e6),
    "smollm3-3b": Shape("smollm3", 36, 2048, 16, 4, 128, 11008, 128256, n_ctx=65536, rope_freq_base=5e6),
}

FTYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}

_Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
_Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])
_Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])

_PIECE = 1 << 22  # elements of a tensor that are made and written at a time


def write_model(
    path: str | os.PathLike[str],
    shape: Shape | str,
    vocab: str | os.PathLike[str],
    ftype: str = "q4_k_m",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a GGUF of that shape with random weights, in pieces: a few tens of MB of RAM whatever the size.

    Args:
        path: file to write; it appears whole or not at all.
        shape: a Shape or a name in SHAPES.
        vocab: GGUF whose tokenizer is copied, e.g. llama.cpp's models/ggml-vocab-qwen2.gguf.
        ftype: f32, f16, q8_0 or q4_k_m. Quantised blocks are made up, not quantised from floats.
        seed: the same seed gives the same file.
        progress: called with (bytes of weights written, bytes of all) after each piece.

    Raises ModelError if the vocabulary does not fit, InputError for an unknown name, OutputError if the file cannot be
    written.
    """
    for name, known in ((shape, SHAPES), (ftype, FTYPES)):
        if isinstance(name, str) and name not in known:
            raise InputError(f"'{name}' is none of {', '.join(known)}")
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    header = Header(vocab)
    n_tokens = len(header.keys.get("tokenizer.ggml.tokens", []))
    if not n_tokens or shape.n_vocab not in (None, n_tokens):
        raise ModelError(f"{header.path}: has {n_tokens} tokens, the model needs {shape.n_vocab or 'some'}")

    tensors = [(name, dims, _type(name, shape, ftype)) for name, dims in _tensors(shape, n_tokens)]
    with writing(path, kinds.MODEL) as temporary:
        _write_header(temporary, shape, header, ftype, tensors)
        rng = np.random.default_rng(seed)
        total, done = sum(_n_bytes(dims, kind) for _, dims, kind in tensors), 0
        with open(temporary, "ab") as file:
            _pad(file)
            for _, dims, kind in tensors:
                for piece in _values(rng, dims, kind):
                    piece.tofile(file)
                    done += piece.nbytes
                    if progress:
                        progress(done, total)
                _pad(file)


def write_adapter_checkpoint(
    directory: str | os.PathLike[str], base: str | os.PathLike[str], seed: int = 0, **config: object
) -> None:
    """Writes a PyTorch checkpoint, named as in the publication, with random weights, for the model `base`.

    `config` holds fields of delta_mem_config.json. The defaults are rank 8 and alpha 16, as in the released adapter,
    and the converter's for the rest. Weights are delta_mem_adapter.safetensors. A read changes a projection by about
    a tenth of its size. Raises CheckpointError, ModelError or OutputError.
    """
    from ..formats.base_model import Base
    from ..formats.checkpoint import CONFIG, WEIGHTS, read_config, write_weights

    directory, model, rng = Path(directory), Base(base), np.random.default_rng(seed)
    try:
        make_folder(directory)
        check_target(directory / WEIGHTS[1], kinds.WEIGHTS)
        with writing(directory / CONFIG, kinds.CONFIG) as temporary:
            temporary.write_text(json.dumps({"rank": 8, "alpha": 16.0, **config}, indent=2), encoding="utf-8")
        settings = read_config(directory / CONFIG)

        def normal(*dims: int, std: float) -> np.ndarray:
            return np.multiply(rng.standard_normal(dims, dtype=np.float32), np.float32(std))

        n_read, n_gate, width = settings.n_read, settings.n_gate, model.n_embd**-0.5
        tensors = {}
        for i in settings.target_layers or range(model.n_layer):
            layer = {f"memory_{name}_proj": normal(n_read, model.n_embd, std=width) for name in "qkv"}
            gates = ("beta", "lambda") if settings.separate_lambda else ("beta",)
            for gate in gates:
                layer[f"{gate}_proj"] = normal(n_gate, model.n_embd, std=width)
                layer[f"{gate}_bias"] = np.full(n_gate, -1.5 if gate == "beta" else 1.5, np.float32)
            for head in settings.delta_heads:
                layer[f"delta_{head}_proj"] = normal(model.layers[i].rows(head), n_read, std=0.05)
            if settings.has_o_norm:
                layer["delta_o_rmsnorm_weight"] = np.full(model.n_embd, 0.1, np.float32)
            if settings.trainable_delta_scale:
                layer["delta_scale_raw"] = normal(4 if settings.delta_scale_granularity == "head" else 1, std=1.0)
            tensors.update({f"model.layers.{i}.self_attn.{name}": tensor for name, tensor in layer.items()})
        write_weights(directory, tensors)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{directory}: cannot be written: {error}") from error


def _tensors(shape: Shape, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first."""
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    yield "token_embd.weight", (n_vocab, shape.n_embd)
    for i in range(shape.n_layer):
        layer = {
            "attn_norm": (shape.n_embd,),
            "attn_q": (n_q, shape.n_embd),
            "attn_k": (n_kv, shape.n_embd),
            "attn_v": (n_kv, shape.n_embd),
            "attn_output": (shape.n_embd, n_q),
            "ffn_norm": (shape.n_embd,),
            "ffn_gate": (shape.n_ff, shape.n_embd),
            "ffn_up": (shape.n_ff, shape.n_embd),
            "ffn_down": (shape.n_embd, shape.n_ff),
        }
        if shape.architecture == "qwen3":
            layer.update(attn_q_norm=(shape.head_dim,), attn_k_norm=(shape.head_dim,))
        for name, dims in layer.items():
            yield f"blk.{i}.{name}.weight", dims
    yield "output_norm.weight", (shape.n_embd,)


def _type(name: str, shape: Shape, ftype: str) -> Type:
    if name.endswith("_norm.weight"):
        return Type.F32
    if ftype != "q4_k_m":
        return {"f32": Type.F32, "f16": Type.F16, "q8_0": Type.Q8_0}[ftype]
    # as llama_tensor_get_type of llama.cpp's quantiser; token_embd is also the output
    more_bits = name == "token_embd.weight"
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        i, eighth = int(name.split(".")[1]), shape.n_layer // 8
        more_bits = i < eighth or i >= 7 * shape.n_layer // 8 or (i - eighth) % 3 == 2
    return Type.Q6_K if more_bits else Type.Q4_K


def _n_bytes(dims: tuple[int, ...], kind: Type) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if dims[-1] % block:
        raise ModelError(f"rows of {dims[-1]} values cannot be {kind.name}, whose blocks have {block}")
    return int(np.prod(dims)) // block * block_bytes


def _write_header(
    path: Path, shape: Shape, vocab: Header, ftype: str, tensors: list[tuple[str, tuple[int, ...], Type]]
) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(f"random {shape.architecture}, {shape.n_layer} layers, width {shape.n_embd}")
        writer.add_file_type(FTYPES[ftype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(shape.n_layer)
        writer.add_context_length(shape.n_ctx)
        writer.add_embedding_length(shape.n_embd)
        writer.add_feed_forward_length(shape.n_ff)
        writer.add_head_count(shape.n_head)
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_freq_base)
        writer.add_layer_norm_rms_eps(1e-6)
        for key, value in vocab.keys.items():
            if key.startswith("tokenizer."):
                of_key = vocab.types[key]
                types = (GGUFValueType.ARRAY, of_key) if isinstance(value, list) else (of_key,)
                writer.add_key_value(key, value, *types)
        if shape.architecture == "smollm3":
            writer.add_vocab_size(len(vocab.keys["tokenizer.ggml.tokens"]))
        for name, dims, kind in tensors:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), _n_bytes(dims, kind), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _values(rng: np.random.Generator, dims: tuple[int, ...], kind: Type) -> Iterator[np.ndarray]:
    """A tensor in pieces: ones for a norm's vector, else values about 0, their deviation the row length to the -1/2."""
    if len(dims) == 1:
        yield np.ones(dims, np.float32)
        return
    make = {Type.F32: _f32, Type.F16: _f16, Type.Q8_0: _q8_0, Type.Q4_K: _q4_k, Type.Q6_K: _q6_k}[kind]
    left, std = dims[0] * dims[1], dims[1] ** -0.5
    while left:
        n = min(left, _PIECE)  # a multiple of every block's length, as _PIECE and a tensor are
        yield make(rng, n, std)
        left -= n


def _f32(rng: np.random.Generator, n: int, std: float) -> np.ndarray:
    values = rng.random(n, dtype=np.float32)
    values -= 0.5
    values *= 12**0.5 * std  # uniform on [0, 1) has a standard deviation of 1 / sqrt(12)
    return values


def _f16(rng: np.random.Generator, n: int, std: float) -> np.ndarray:
    return _f32(rng, n, std).astype("<f2")


def _q8_0(rng: np.random.Generator, n: int, std: float) -> np.ndarray:
    blocks = np.empty(n // 32, _Q8_0)
    blocks["qs"] = rng.integers(-127, 128, (n // 32, 32), np.int8)  # -128 does not occur in Q8_0
    blocks["d"] = std / (127 / 3**0.5)
    return blocks


def _q4_k(rng: np.random.Generator, n: int, std: float) -> np.ndarray:
    """x = d·8·q - dmin·8, q from 0 to 15 with mean 7.5 and a standard deviation of 4.6."""
    blocks = np.empty(n // 256, _Q4_K)
    blocks["qs"] = _bytes(rng, n // 256, 128)
    blocks["scales"] = [8] * 8 + [0x88] * 4  # every six-bit scale and minimum is 8
    blocks["d"] = std / (8 * (255 / 12) ** 0.5)
    blocks["dmin"] = 7.5 * blocks["d"][:1]
    return blocks


def _q6_k(rng: np.random.Generator, n: int, std: float) -> np.ndarray:
    """x = ±d·(q - 32), q from 0 to 63: the signs cancel the mean of -d / 2."""
    blocks = np.empty(n // 256, _Q6_K)
    blocks["ql"] = _bytes(rng, n // 256, 128)
    blocks["qh"] = _bytes(rng, n // 256, 64)
    blocks["scales"] = [1, -1] * 8
    blocks["d"] = std / (4095 / 12) ** 0.5
    return blocks


def _bytes(rng: np.random.Generator, *dims: int) -> np.ndarray:
    return np.frombuffer(rng.bytes(int(np.prod(dims))), np.uint8).reshape(dims)
