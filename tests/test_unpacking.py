"""Prompts multiplied in BF16: which weights are placed for it, and that a model says the same."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pydeltamem import DeltaMemLlama
from pydeltamem.bench.synthetic import Shape, write_adapter_checkpoint, write_model
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import InputError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import Checkpoint
from pydeltamem.formats.gguf_header import Header
from pydeltamem.runtime import unpacking
from pydeltamem.runtime.quantize import quantize
from pydeltamem.runtime.unpacking import ALL, NONE, REST, layouts, multiplies_bf16, overrides, patterns
from refusals import refuses

TINY = Shape("qwen3", n_layer=3, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, n_ctx=512)
TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31] * 6


@pytest.fixture(scope="module")
def synthetic(golden_dir, tmp_path_factory):
    """synthetic(type): a tiny random model whose weights are of this type."""
    folder = tmp_path_factory.mktemp("unpacking")

    def write(ftype):
        path = folder / f"{ftype}.gguf"
        if not path.exists() and ftype == "f32":
            write_model(path, TINY, golden_dir / "qwen3" / "base-f32.gguf", ftype, seed=1)
        elif not path.exists():
            quantize(write("f32"), path, ftype)
        return path

    return write


def logits(path, **options):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 2, "logits_all": True, "verbose": False, **options}
    with DeltaMemLlama(path, **options) as llm:
        llm.eval(TOKENS)
        llm.eval(TOKENS[:1])
        return np.array(llm.scores[: llm.n_tokens])


def named(tensors, unpack):
    found = patterns(tensors, unpack)
    return {name for name in tensors if any(re.search(pattern, name) for pattern in found)}


def types_of(path):
    return {name: tensor.type_name for name, tensor in Header.of_model(path).tensors.items()}


def test_every_weight_in_a_type_that_gains_and_no_other(synthetic):
    """`rest` leaves out what llama.cpp repacks, and what it maps from the file."""
    for ftype, unpack, expected in (
        ("q8_0", REST, {"Q8_0"}), ("q8_0", ALL, {"Q8_0"}), ("q8_0", NONE, set()), ("f32", ALL, set()),
        ("q4_1", REST, {"Q4_1"}), ("q4_0", REST, set()), ("q4_0", ALL, {"Q4_0"}),
        ("q4_k_m", REST, {"Q6_K"}), ("q4_k_m", ALL, {"Q6_K"}), ("bf16", REST, set()), ("bf16", ALL, {"BF16"}),
    ):  # fmt: skip
        types = types_of(synthetic(ftype))
        chosen = named(Header.of_model(synthetic(ftype)).tensors, unpack)
        assert {types[name] for name in chosen} == expected, (ftype, unpack)
        left = {name for name, kind in types.items() if kind in expected and name.startswith("blk.")} - chosen
        assert not left


def test_layouts_that_differ(synthetic, monkeypatch):
    """`deltamem tune` tries no layout under two names, and none that a GPU would take the products of."""
    usual = [(True, NONE), (False, NONE)]
    monkeypatch.setattr(unpacking, "multiplies_bf16", lambda: True)
    for ftype, more in (
        ("f32", []), ("q8_0", [(True, REST)]), ("q4_0", [(False, ALL)]),
        ("q4_k_m", [(True, REST), (False, ALL)]), ("bf16", [(False, ALL)]),
    ):  # fmt: skip
        assert layouts(synthetic(ftype)) == usual + more, ftype
    monkeypatch.undo()
    monkeypatch.setattr(unpacking, "gpu_names", lambda: ["a GPU"])
    assert layouts(synthetic("q8_0")) == usual and overrides(synthetic("q8_0"), ALL) is None


def test_a_model_that_cannot_be_read_is_left_to_the_loader(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"no GGUF")
    assert overrides(tmp_path / "no.gguf", ALL) is None


@pytest.mark.parametrize(
    ("ftype", "unpack"),
    [("q8_0", REST), ("q4_1", REST), ("q5_0", REST), ("q4_k_m", REST), ("q4_0", ALL), ("bf16", ALL)],
)
def test_a_prompt_gives_the_same_logits(synthetic, ftype, unpack):
    """ggml rounds the activations of a block to 8 bits and a scale, this to 8 bits of mantissa each."""
    path = synthetic(ftype)
    plain, ours = (logits(path, unpack=name, repack=False) for name in (NONE, unpack))
    assert np.square(ours - plain).sum() < 1e-3 * np.square(plain).sum()
    assert np.array_equal(ours, plain) == (not multiplies_bf16())
    if multiplies_bf16():  # ggml's own products may round otherwise with other threads
        assert np.array_equal(ours, logits(path, unpack=unpack, repack=False, n_threads_batch=1))


@pytest.mark.parametrize("ftype", ["q8_0", "q4_k_m"])
def test_an_adapter_is_unpacked_with_its_model(synthetic, tmp_path, capfd, ftype):
    """Its projection is multiplied in BF16 too, and one token at a time as ever; also where no query weight is."""
    base = synthetic(ftype)
    write_adapter_checkpoint(tmp_path / "checkpoint", base, seed=2)
    write_adapter(Checkpoint(tmp_path / "checkpoint"), Base(base), tmp_path / "adapter.gguf", "q8_0")
    adapter = tmp_path / "adapter.gguf"
    plain = logits(base, deltamem_path=adapter, unpack=NONE)
    capfd.readouterr()
    ours = logits(base, deltamem_path=adapter, unpack=REST, verbose=True)
    if multiplies_bf16():
        buffers = [line for line in capfd.readouterr().err.splitlines() if "δ-mem buffer size" in line]
        assert sum("DELTAMEM_BF16" in line for line in buffers) == 1
    assert np.square(ours - plain).sum() < 1e-3 * np.square(plain).sum()
    assert np.square(plain - logits(base)).sum() > 1e-3 * np.square(plain).sum()


def test_less_is_lost_than_by_ggml(synthetic):
    """Beside the same weights with activations in float32."""
    exact = logits(synthetic("f32"))
    errors = [np.square(logits(synthetic("q8_0"), unpack=name) - exact).sum() for name in (NONE, REST)]
    assert errors[1] <= errors[0]


def test_defaults(synthetic):
    for given, expected in (({}, NONE), ({"unpack": REST}, REST), ({"repack": False, "unpack": ALL}, ALL)):
        with DeltaMemLlama(synthetic("q8_0"), n_ctx=256, **given) as llm:
            assert llm.unpack == expected
    with refuses(InputError, "unpack", "some"):
        DeltaMemLlama(synthetic("q8_0"), unpack="some")
