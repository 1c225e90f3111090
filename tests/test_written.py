"""Files of llama.cpp's own writers are checked before they get their final name; models of any alignment."""

from __future__ import annotations

import shutil
import struct

import gguf
import numpy as np
import pytest

from pydeltamem import DeltaMemLlama, ModelError
from pydeltamem.bench.synthetic import Shape, write_model
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.packed import pack
from pydeltamem.runtime.quantize import quantize
from refusals import refuses
from test_cli import deltamem
from test_with_others import write_like

ODD = Shape("qwen3", 2, 36, 2, 1, 18, 52)  # its tensors' bytes are no multiples of 32
TOKENS = [5, 17, 40]


def aligned(source, path, alignment):
    """The same model at another alignment."""
    write_like(path, Header(source), alignment=alignment)
    return path


@pytest.fixture(scope="module")
def odd(golden_dir, tmp_path_factory):
    """odd(alignment): one model, at any alignment."""
    folder = tmp_path_factory.mktemp("odd")
    write_model(folder / "odd.gguf", ODD, golden_dir / "qwen3" / "base-f32.gguf", "f32")
    return lambda alignment: aligned(folder / "odd.gguf", folder / f"odd-{alignment}.gguf", alignment)


def logits(path, **kwargs):
    llm = DeltaMemLlama(path, n_ctx=256, n_threads=1, verbose=False, **kwargs)
    llm.eval(TOKENS)
    found = llm.logits
    llm.close()
    return found


@pytest.mark.parametrize("alignment", [8, 16, 64, 128, 4096])
def test_a_quantised_model_of_any_alignment_loads(odd, tmp_path, alignment):
    quantize(odd(alignment), tmp_path / "q.gguf", "f16")
    quantize(odd(32), tmp_path / "same.gguf", "f16")
    np.testing.assert_array_equal(logits(tmp_path / "q.gguf"), logits(tmp_path / "same.gguf"))


@pytest.mark.parametrize("alignment", [1, 8, 16])
def test_a_model_of_a_small_alignment_loads(odd, alignment):
    """llama.cpp would end the process if it mapped the file, so this runs in a process of its own."""
    model = odd(alignment)
    result = deltamem("generate", "-m", model, "-p", "hello", "-n", "2", "--no-perf")
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(logits(model), logits(odd(32)))


def test_a_part_of_a_small_alignment(odd, adapter, tmp_path):
    """A packed model keeps its base's alignment, in each of its parts; the adapter may have its own."""
    write_model(tmp_path / "base.gguf", Shape("qwen3", 4, 64, 4, 2, 32, 128), odd(32), "f32")
    small = aligned(tmp_path / "base.gguf", tmp_path / "small.gguf", 8)
    assert logits(small).shape == logits(tmp_path / "base.gguf").shape


@pytest.mark.parametrize("alignment", [8, 64])
def test_a_packed_model_of_another_alignment(base, adapter, tmp_path, alignment):
    model = aligned(base(), tmp_path / "base.gguf", alignment)
    memory = adapter("qwen3", "tsw_qo")
    parts = pack(model, memory, tmp_path / "packed.gguf", max_tensors=20)
    whole = pack(model, memory, tmp_path / "whole.gguf")
    expected = logits(base(), deltamem_path=memory)
    for path in (parts[0], whole[0]):
        result = deltamem("generate", "-m", path, "-p", "hello", "-n", "2", "--no-perf")
        assert result.returncode == 0, result.stderr
        np.testing.assert_array_equal(logits(path), expected)
    quantize(whole[0], tmp_path / "q.gguf", "f16")
    assert np.isfinite(logits(tmp_path / "q.gguf")).all()


def test_bench_of_a_small_alignment(odd):
    result = deltamem("bench", "-m", odd(8), "--control", "-p", "4", "-n", "0", "--pairs", "1")
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr


def test_offsets_are_as_llama_cpp_takes_them(odd, tmp_path):
    """What llama.cpp refuses because of where its tensors stand is no readable file here either."""
    data = bytearray(odd(32).read_bytes())
    key = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", int(gguf.GGUFValueType.UINT32), 32)
    assert data.count(key) == 1
    at = data.index(key) + len(key) - 4
    data[at : at + 4] = struct.pack("<I", 128)
    (tmp_path / "m.gguf").write_bytes(data + bytes(1 << 16))
    with refuses(ModelError, tmp_path / "m.gguf"):
        Header(tmp_path / "m.gguf")


# values outside a type's range


@pytest.fixture
def hf(warm_converter, golden_dir, tmp_path):
    """A model one of whose weights is beyond F16."""
    import safetensors.numpy

    folder = tmp_path / "hf"
    shutil.copytree(golden_dir / "qwen3" / "hf", folder)
    folder.chmod(0o755)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_convert_base_writes_no_infinity(hf, base, tmp_path):
    from pydeltamem.convert.hf import convert_base

    out = tmp_path / "out" / "base.gguf"
    out.parent.mkdir()
    shutil.copy(base(), out)
    with refuses(ModelError, hf, "blk.1.ffn_up.weight", "bf16"):
        convert_base(hf, out, "f16")
    assert out.read_bytes() == base().read_bytes() and len(list(out.parent.iterdir())) == 1
    result = deltamem("convert-base", hf, "-o", out, "--outtype", "f16")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    for outtype in ("bf16", "f32"):
        convert_base(hf, out, outtype)
        assert Header(out).read("blk.1.ffn_up.weight").max() > 65504


def test_convert_base_refuses_what_is_not_finite(hf, tmp_path):
    import safetensors.numpy

    from pydeltamem.convert.hf import convert_base

    tensors = safetensors.numpy.load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    safetensors.numpy.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    for outtype in ("f32", "bf16", "q8_0"):
        with refuses(ModelError, hf, "blk.1.ffn_up.weight"):
            convert_base(hf, tmp_path / "base.gguf", outtype)
    assert not (tmp_path / "base.gguf").exists()


def test_quantize_writes_no_infinity(base, odd, tmp_path):
    """Weights, and what keeps its type."""
    header = Header(odd(32))
    for name, value, said in (
        ("blk.1.ffn_up.weight", 1e6, "f16"),
        ("output_norm.weight", np.inf, "output_norm.weight"),
    ):
        tensors = {tensor: header.read(tensor) for tensor in header.tensors}
        tensors[name].flat[7] = value
        write_like(tmp_path / "large.gguf", header, tensors)
        with refuses(ModelError, tmp_path / "large.gguf", said):
            quantize(tmp_path / "large.gguf", tmp_path / "q.gguf", "f16")
        result = deltamem("quantize", tmp_path / "large.gguf", tmp_path / "q.gguf", "f16")
        assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "q.gguf").exists()


def test_an_adapter_has_no_infinity(golden_dir, base, tmp_path):
    """BF16 rounds the largest float32 to infinity."""
    import torch

    from pydeltamem.convert.adapter import write_adapter
    from pydeltamem.errors import CheckpointError
    from pydeltamem.formats.base_model import Base
    from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint

    shutil.copy(golden_dir / "qwen3" / "tsw_qo" / CONFIG, tmp_path / CONFIG)
    tensors = torch.load(golden_dir / "qwen3" / "tsw_qo" / WEIGHTS[0], weights_only=True)
    next(tensor for name, tensor in tensors.items() if "memory_v_proj" in name).view(-1)[0] = 3.4e38
    torch.save(tensors, tmp_path / WEIGHTS[0])
    for outtype in ("bf16", "f16", "q8_0"):
        with refuses(CheckpointError, tmp_path / WEIGHTS[0], "blk.0.deltamem_in.weight"):
            write_adapter(Checkpoint(tmp_path), Base(base()), tmp_path / "a.gguf", outtype)
        assert not (tmp_path / "a.gguf").exists()
    write_adapter(Checkpoint(tmp_path), Base(base()), tmp_path / "a.gguf", "f32")
