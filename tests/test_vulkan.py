"""On a Vulkan device, which has no δ-mem operator: golden cases by the composite with all layers there and with half of
them, graph splits, what crosses and what is launched for a token, several sequences, files.

Skipped without a device. `make vulkan-check` builds ggml-vulkan and runs these tests, on a machine without a GPU by
Mesa's software driver. The device may multiply in half precision: the bound is 10 times the error of the backbone alone
with as many layers there.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from golden_data import ARCHITECTURES, CASES
from native_context import open_context
from pydeltamem import DeltaMemLlama
from test_cuda import check_that_a_memory_crosses, gpu_names
from test_golden import F32, errors_of, expected_of, nmse

pytestmark = pytest.mark.skipif(not gpu_names("Vulkan"), reason="no Vulkan device: run `make vulkan-check`")

RUNS = {"without": "auto", "composite": "auto", "on the CPU": "kernel"}  # and DELTAMEM_OPERATOR
INDICES = {
    f"deltamem_{name}"
    for name in ("slot", "source", "write", "read", "out", "first", "weight", "carry", "one", "count")
}

LAYERS = {"all": -1, "half": 3}  # two of the golden models' four layers: llama.cpp counts the output layer too


def on_device(golden_dir, arch, adapter, n_gpu_layers=-1, **kwargs):
    return DeltaMemLlama(
        golden_dir / arch / "base-f32.gguf", deltamem_path=adapter, n_gpu_layers=n_gpu_layers, **{**F32, **kwargs}
    )


@pytest.fixture(scope="module")
def backbone(golden_dir):
    """backbone(arch, layers="all"): the NMSE of the model's logits there, without a memory."""
    known = {}

    def measure(arch: str, layers: str = "all") -> float:
        if (arch, layers) not in known:
            llm = on_device(golden_dir, arch, None, LAYERS[layers])
            with np.load(golden_dir / arch / "base_logits.npz") as arrays:
                llm.eval(arrays["ids"].tolist())
                known[arch, layers] = nmse(llm.scores[: llm.n_tokens], arrays["logits"])
            llm.close()
        return known[arch, layers]

    return measure


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_golden(golden_dir, adapter, backbone, arch, case, layers):
    llm = on_device(golden_dir, arch, adapter(arch, case), LAYERS[layers])
    errors = errors_of(llm, expected_of(golden_dir, arch, case))
    llm.close()
    alone = backbone(arch, layers)
    print(f"{arch} {case}, {layers}: backbone {alone:.1e},", {k: f"{v:.1e}" for k, v in errors.items()})
    assert max(errors.values()) <= 10 * alone, (alone, errors)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_split_in_a_layer(golden_dir, adapter, arch, case, monkeypatch, capfd):
    """With the memory, the graph has as many splits as without: nothing leaves the device."""
    splits = {}
    path = adapter(arch, case)
    for name, operator in RUNS.items():
        monkeypatch.setenv("DELTAMEM_OPERATOR", operator)
        capfd.readouterr()
        on_device(golden_dir, arch, None if name == "without" else path, verbose=True).close()
        splits[name] = int(re.findall(r"splits = (\d+)", capfd.readouterr().err)[-1])
    print(f"{arch} {case}: splits", splits)
    assert splits["composite"] == splits["without"] < splits["on the CPU"]


@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_qo"])
def test_what_one_token_costs(golden_dir, adapter, case, monkeypatch, capfd):
    """Of all layers together, only the indices of the batch cross to the device, once; the operator on the CPU has two
    tensors cross for each layer. Launches are counted, too.
    """
    launches_so_far = getattr(ctypes.CDLL(None), "deltamem_vulkan_launches", None)
    if launches_so_far is None:
        pytest.skip("nothing counts launches: run `make vulkan-check`")
    crossing, launches = {}, {}
    monkeypatch.setenv("GGML_SCHED_DEBUG", "1")
    for name, operator in RUNS.items():
        monkeypatch.setenv("DELTAMEM_OPERATOR", operator)
        path = None if name == "without" else adapter("qwen3", case)
        llm = on_device(golden_dir, "qwen3", path, verbose=True)
        llm.eval(list(range(1, 11)))
        capfd.readouterr()
        llm.eval([11])  # the log says what crosses when the graph of one token is first made
        last_graph = capfd.readouterr().err.rpartition("## SPLIT #0")[2]
        splits = re.findall(r"## SPLIT.*", last_graph)
        crossing[name] = re.findall(r"\[([\w-]+)", " ".join(splits))
        before = launches_so_far()
        llm.eval([12])
        launches[name] = launches_so_far() - before
        llm.close()
    layers = {name for name in crossing["on the CPU"] if re.match(r"deltamem_in-\d", name)}
    per_layer = (launches["composite"] - launches["on the CPU"]) / len(layers)
    print(f"qwen3 {case}: cross", {name: len(names) for name, names in crossing.items()}, end=", ")
    print(f"launches {launches}, of the composite {per_layer:.1f} for each of {len(layers)} layers")

    assert len(crossing["composite"]) == len(set(crossing["composite"]))
    assert INDICES >= set(crossing["composite"]) - set(crossing["without"]) > set()
    assert len(crossing["on the CPU"]) == len(crossing["without"]) + 2 * len(layers)
    assert 1 < per_layer < 64


@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_qo"])
def test_several_sequences(golden_dir, adapter, backbone, case):
    """Two sequences in one batch against each alone."""
    base, path = golden_dir / "qwen3" / "base-f32.gguf", adapter("qwen3", case)
    tokens = expected_of(golden_dir, "qwen3", case)["prompt_ids"].tolist()[:24]
    texts = {0: tokens[:12], 1: tokens[12:]}
    segments = [i // 5 for i in range(12)] if case == "ssw_message" else None
    with open_context(base, path, n_seq=2, n_gpu_layers=-1) as context:
        together = context.decode(
            [(text[i], seq) for i in range(12) for seq, text in texts.items()],
            segments and [each for each in segments for _ in texts],
        )
        states = [context.state(seq) for seq in texts]
    for seq, text in texts.items():
        with open_context(base, path, n_seq=2, n_gpu_layers=-1) as context:
            alone = context.decode([(token, seq) for token in text], segments)
            assert nmse(states[seq], context.state(seq)) <= 10 * backbone("qwen3")
        assert nmse(together[seq::2], alone) <= 10 * backbone("qwen3")


@pytest.mark.parametrize("case", ["tsw_qo", "ssw_message", "msw4_qo"])
def test_a_memory_crosses_devices(golden_dir, adapter, backbone, case, tmp_path):
    """Saved on the device, loaded on the CPU, and back: the same bits, and the same recall."""
    expected, path = expected_of(golden_dir, "qwen3", case), adapter("qwen3", case)
    there, here = on_device(golden_dir, "qwen3", path), on_device(golden_dir, "qwen3", path, 0)
    check_that_a_memory_crosses(there, here, expected, tmp_path, 10 * backbone("qwen3"))
