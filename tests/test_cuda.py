"""On a GPU: the golden cases with all layers there and with half of them, several sequences, memory files, CUDA graphs.

Skipped if no GPU has the operator. `make cuda-check` builds for the GPU and runs these tests against that build.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from golden_data import ARCHITECTURES, CASES
from pydeltamem import DeltaMemLlama
from pydeltamem.runtime import library
from test_golden import F32, errors_of, expected_of, nmse, read_one_by_one, read_prompt

BOUND = 1e-5  # TF32 products, and sums in another order; the backbone's own figure is printed with it


def gpu_names(backend: str = "CUDA") -> list[str]:
    """The devices of one backend in the loaded library."""
    ggml = ctypes.CDLL(library.llama_cpp.llama_cpp._lib._name)  # also finds functions of the libraries that it links to
    for name in ("ggml_backend_dev_get", "ggml_backend_dev_name"):
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    devices = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    names = [ctypes.string_at(ggml.ggml_backend_dev_name(device)).decode() for device in devices]
    return [name for name in names if name.startswith(backend)]


pytestmark = pytest.mark.skipif(not gpu_names(), reason="no CUDA device: run `make cuda-check` where there is one")

LAYERS = {"all": -1, "half": 3}  # two of the golden models' four layers: llama.cpp counts the output layer too


def on_gpu(golden_dir, arch, adapter, n_gpu_layers=-1, **kwargs):
    return DeltaMemLlama(
        model_path=golden_dir / arch / "base-f32.gguf", deltamem_path=adapter, n_gpu_layers=n_gpu_layers,
        **{**F32, **kwargs},
    )  # fmt: skip


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_golden(golden_dir, adapter, arch, case, layers):
    expected = expected_of(golden_dir, arch, case)
    llm = on_gpu(golden_dir, arch, adapter(arch, case), LAYERS[layers])
    errors = errors_of(llm, expected)
    llm.close()

    plain = on_gpu(golden_dir, arch, None, LAYERS[layers])
    with np.load(golden_dir / arch / "base_logits.npz") as arrays:
        plain.eval(arrays["ids"].tolist())
        backbone = nmse(plain.scores[: plain.n_tokens], arrays["logits"])
    plain.close()
    print(f"{arch} {case}, {layers} layers: backbone {backbone:.1e},", {k: f"{v:.1e}" for k, v in errors.items()})
    assert max(errors.values()) <= BOUND, (backbone, errors)


def check_that_a_memory_crosses(there, here, expected, folder, bound):
    """Saved in one place, loaded in the other, and back: the same bits, and the same recall. Closes both models."""
    read_prompt(there, expected)
    there.memory.save(folder / "a.memory")
    here.memory.load(folder / "a.memory")
    assert np.array_equal(here.memory.state, there.memory.state)
    here.memory.save(folder / "b.memory")
    there.memory.reset()
    assert not there.memory.state.any()
    there.memory.load(folder / "b.memory")
    assert np.array_equal(here.memory.state, there.memory.state)
    for llm in (there, here):
        llm.reset()
        llm.memory.write = False
        llm.eval(expected["recall_ids"].tolist())
    assert nmse(there.scores[: there.n_tokens], here.scores[: here.n_tokens]) <= bound
    there.close()
    here.close()


@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_qo"])
def test_a_memory_crosses_devices(golden_dir, adapter, case, tmp_path):
    """Saved on the GPU, loaded on the CPU, and back: the same bits, and the same recall."""
    expected = expected_of(golden_dir, "qwen3", case)
    path = adapter("qwen3", case)
    there, here = on_gpu(golden_dir, "qwen3", path), on_gpu(golden_dir, "qwen3", path, 0)
    check_that_a_memory_crosses(there, here, expected, tmp_path, BOUND)


def test_rollback(golden_dir, adapter):
    """A checkpoint of the GPU's state, and back to it, to the bit."""
    expected = expected_of(golden_dir, "qwen3", "tsw_qo")
    llm = on_gpu(golden_dir, "qwen3", adapter("qwen3", "tsw_qo"))
    read_prompt(llm, expected)
    position, state = llm.n_tokens, llm.memory.state.copy()
    llm.memory.checkpoint()
    read_one_by_one(llm, expected["decode_ids"])
    assert not np.array_equal(llm.memory.state, state)
    llm.memory.rollback(position)
    assert np.array_equal(llm.memory.state, state)
    llm.close()


def test_several_sequences(golden_dir, adapter):
    """Two sequences in one batch against each alone."""
    from native_context import open_context

    base, path = golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", "tsw_qo")
    tokens = expected_of(golden_dir, "qwen3", "tsw_qo")["prompt_ids"].tolist()[:24]
    texts = {0: tokens[:12], 1: tokens[12:]}
    with open_context(base, path, n_seq=2, n_gpu_layers=-1) as context:
        mixed = [(text[i], seq) for i in range(12) for seq, text in texts.items()]
        together = context.decode(mixed)
    for seq, text in texts.items():
        with open_context(base, path, n_seq=2, n_gpu_layers=-1) as context:
            alone = context.decode([(token, seq) for token in text])
        assert nmse(together[seq::2], alone) <= BOUND


def test_cuda_graphs_stay(golden_dir, adapter, capfd):
    """Token by token, the graph that was captured is launched again: with a memory as often as without."""
    reused = {}
    for name, path in (("with", adapter("qwen3", "tsw_qo")), ("without", None)):
        llm = on_gpu(golden_dir, "qwen3", path, verbose=True)
        llm.eval(list(range(1, 9)))
        capfd.readouterr()
        for token in range(24):
            llm.eval([token + 1])
        reused[name] = capfd.readouterr().err.count("reused")
        llm.close()
    print("CUDA graphs launched again, of 24 tokens:", reused)
    assert reused["without"] > 0, "this build has no CUDA graphs, or does not say so in its log"
    assert reused["with"] >= reused["without"]
