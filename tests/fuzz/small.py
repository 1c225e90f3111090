"""A model and an adapter for it, of some hundred bytes each, and how to make others."""

from __future__ import annotations

import io
import struct

import gguf
import numpy as np

U32, STRING, ARRAY = (
    int(kind) for kind in (gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY)
)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name.encode()) + struct.pack("<I", kind) + value


def file(keys: list[bytes], tensors: list[tuple[str, list[int], int]], version: int = 3, alignment: int = 32) -> bytes:
    """A GGUF file of tensors (name, dimensions as in ggml, type), all of it zeros."""
    out = io.BytesIO()
    out.write(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys))
    offset = 0
    for name, dims, kind in tensors:
        out.write(text(name.encode()) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        offset += -(-int(np.prod(dims)) // block * size // alignment) * alignment
    out.write(bytes(-out.tell() % alignment + offset))
    return out.getvalue()


def u32(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


BASE = file(
    [
        key("general.architecture", STRING, text(b"qwen3")),
        u32("qwen3.block_count", 1),
        u32("qwen3.embedding_length", 32),
        u32("qwen3.attention.head_count", 2),
        u32("qwen3.attention.head_count_kv", 1),
        u32("general.alignment", 32),
        key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + text(b"bc")),
        key("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ2f", int(gguf.GGUFValueType.FLOAT32), 2, 0.5, 1.0)),
    ],
    [("token_embd.weight", [32, 2], 0), ("blk.0.attn_q.weight", [32, 32], 1), ("blk.0.attn_k.weight", [32, 16], 1),
     ("blk.0.attn_v.weight", [32, 16], 8), ("blk.0.attn_output.weight", [32, 32], 1)],
)  # fmt: skip
MEMORY = file(
    [
        key("general.architecture", STRING, text(b"qwen3")),
        key("general.type", STRING, text(b"adapter")),
        key("adapter.type", STRING, text(b"deltamem")),
        u32("deltamem.version", 1),
        u32("deltamem.rank", 2),
        u32("deltamem.head_count", 1),
        key("deltamem.layers", ARRAY, struct.pack("<IQI", U32, 1, 0)),
        u32("deltamem.base.embedding_length", 32),
        u32("deltamem.base.block_count", 1),
    ],
    [("blk.0.deltamem_in.weight", [32, 8], 0), ("blk.0.deltamem_gate.bias", [2], 0),
     ("blk.0.deltamem_o.weight", [2, 32], 0)],
)  # fmt: skip
