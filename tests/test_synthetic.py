"""Random models and PyTorch checkpoints: they load and run in every type, and their weights are as documented."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest

from pydeltamem import DeltaMemLlama
from pydeltamem.bench.synthetic import FTYPES, SHAPES, Shape, write_adapter_checkpoint, write_model
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import InputError, ModelError, OutputError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import Checkpoint
from pydeltamem.formats.gguf_header import Header
from refusals import refuses

# K-quants need rows of 256
TINY = {
    "qwen3": Shape("qwen3", n_layer=8, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, n_ctx=512),
    "smollm3": Shape("smollm3", n_layer=8, n_embd=256, n_head=4, n_head_kv=2, head_dim=64, n_ff=512, n_ctx=512),
}
TOKENS = [5, 17, 40, 99, 7, 63, 120, 5, 17, 88, 200, 31]


@pytest.fixture(scope="session")
def synthetic(golden_dir, tmp_path_factory):
    """synthetic(arch, ftype): a tiny random model with the golden vocabulary, written once per session."""
    folder = tmp_path_factory.mktemp("synthetic")

    def write(arch, ftype):
        path = folder / f"{arch}-{ftype}.gguf"
        if not path.exists():
            write_model(path, TINY[arch], golden_dir / arch / "base-f32.gguf", ftype, seed=1)
        return path

    return write


def converted(directory, base, out):
    write_adapter(Checkpoint(directory), Base(base), out)
    return out


def logits(path, adapter=None, **options):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False, **options}
    llm = DeltaMemLlama(path, deltamem_path=adapter, **options)
    try:
        llm.eval(TOKENS)
        llm.eval(TOKENS[:1])
        return np.array(llm.scores[: llm.n_tokens])
    finally:
        llm.close()


@pytest.mark.parametrize("ftype", FTYPES)
@pytest.mark.parametrize("arch", TINY)
def test_runs(synthetic, tmp_path, arch, ftype):
    base = synthetic(arch, ftype)
    plain = logits(base)
    assert np.isfinite(plain).all()
    assert 0.1 < plain.std() < 10  # near one, as documented

    write_adapter_checkpoint(tmp_path / "checkpoint", base, seed=2)
    adapter = converted(tmp_path / "checkpoint", base, tmp_path / "adapter.gguf")
    corrected = logits(base, adapter)
    assert np.isfinite(corrected).all()
    np.testing.assert_allclose(corrected[0], plain[0], rtol=0, atol=1e-3)  # an empty memory
    assert np.abs(corrected[-1] - plain[-1]).max() > 1e-3


@pytest.mark.parametrize("ftype", [ftype for ftype in FTYPES if ftype.startswith("q")])
def test_repacked_weights_give_the_same_logits(synthetic, ftype):
    """Other code (AMX, AVX-512) runs them; it rounds the activations to 8 bits a block, as the plain code does."""
    base = synthetic("qwen3", ftype)
    plain, repacked = (logits(base, repack=repack) for repack in (False, True))
    assert np.square(repacked - plain).sum() < 1e-3 * np.square(plain).sum()


def test_one_adapter_for_every_type_of_base(synthetic, tmp_path):
    write_adapter_checkpoint(tmp_path / "checkpoint", synthetic("qwen3", "f32"))
    adapter = converted(tmp_path / "checkpoint", synthetic("qwen3", "f32"), tmp_path / "adapter.gguf")
    for ftype in FTYPES:
        other = converted(tmp_path / "checkpoint", synthetic("qwen3", ftype), tmp_path / "other.gguf")
        assert other.read_bytes() == adapter.read_bytes()
        assert np.isfinite(logits(synthetic("qwen3", ftype), adapter, flash_attn=True)).all()


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 4, "num_state_heads": 2, "delta_heads": ["q", "k", "v", "o"], "couple_lambda": False},
        {"delta_o_rmsnorm": True, "trainable_delta_scale": True, "delta_scale_granularity": "head"},
        {"rankwise_gates": False, "target_layers": [1, 5], "trainable_delta_scale": True},
        {"state_update_mode": "no_lambda", "couple_lambda": False, "memory_write_granularity": "message_mean"},
    ],
)
def test_checkpoint_options(synthetic, tmp_path, config):
    base = synthetic("smollm3", "f16")
    write_adapter_checkpoint(tmp_path / "checkpoint", base, **config)
    assert np.isfinite(logits(base, converted(tmp_path / "checkpoint", base, tmp_path / "adapter.gguf"))).all()


@pytest.mark.parametrize("ftype", FTYPES)
def test_weights(synthetic, ftype):
    header = Header(synthetic("qwen3", ftype))
    for name, tensor in header.tensors.items():
        values = header.read(name)
        if len(tensor.shape) == 1:
            assert (values == 1).all()
            continue
        assert np.isfinite(values).all()
        expected = tensor.shape[1] ** -0.5
        assert values.std() == pytest.approx(expected, rel=0.02), name
        assert abs(values.mean()) < 5 * expected / values.size**0.5 + 1e-3 * expected, name
        assert len(np.unique(values)) > 10, name


def test_types_of_q4_k_m(synthetic):
    """As llama.cpp's quantiser chooses them for 8 layers."""
    types = {name: tensor.type.name for name, tensor in Header(synthetic("qwen3", "q4_k_m")).tensors.items()}
    assert types["token_embd.weight"] == "Q6_K"
    for name in ("attn_v", "ffn_down"):
        assert [types[f"blk.{i}.{name}.weight"] == "Q6_K" for i in range(8)] == [i in (0, 3, 6, 7) for i in range(8)]
    for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert {types[f"blk.{i}.{name}.weight"] for i in range(8)} == {"Q4_K"}
    assert {types[name] for name in types if "norm" in name} == {"F32"}


def test_a_seed_gives_one_file(golden_dir, tmp_path):
    vocab = golden_dir / "qwen3" / "base-f32.gguf"
    paths = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(paths, (3, 3, 4)):
        write_model(path, TINY["qwen3"], vocab, "q4_k_m", seed)
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1] != contents[2]


def test_vocabulary_and_progress(golden_dir, tmp_path):
    vocab, seen = golden_dir / "smollm3" / "base-f32.gguf", []
    write_model(tmp_path / "m.gguf", TINY["smollm3"], vocab, "q8_0", progress=lambda *step: seen.append(step))
    written, source = Header(tmp_path / "m.gguf"), Header(vocab)
    keys = [key for key in source.keys if key.startswith("tokenizer.")]
    assert keys
    for key in keys:
        assert (written.keys[key], written.types[key]) == (source.keys[key], source.types[key])
    total = sum(tensor.n_bytes for tensor in written.tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_large_tensors_come_in_pieces(golden_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("pydeltamem.bench.synthetic._PIECE", 1 << 14)
    vocab = golden_dir / "qwen3" / "base-f32.gguf"
    for ftype in FTYPES:
        write_model(tmp_path / "m.gguf", TINY["qwen3"], vocab, ftype)
        assert np.isfinite(logits(tmp_path / "m.gguf")).all()


def test_shapes():
    """Parameters of the models that they are named for, in millions."""
    for name, millions in {"qwen3-0.6b": 596, "qwen3-1.7b": 1721, "qwen3-4b": 4022, "smollm3-3b": 3075}.items():
        s = SHAPES[name]
        attention = 2 * s.n_embd * s.head_dim * (s.n_head + s.n_head_kv)
        parameters = s.n_vocab * s.n_embd + s.n_layer * (attention + 3 * s.n_embd * s.n_ff)
        assert parameters / 1e6 == pytest.approx(millions, abs=1)


def test_refused(golden_dir, adapter, tmp_path):
    vocab, out = golden_dir / "qwen3" / "base-f32.gguf", tmp_path / "folder" / "m.gguf"
    memory, none = adapter("qwen3", "tsw_qo"), tmp_path / "none.gguf"
    for error, names, arguments in (
        (OutputError, [out], (out, TINY["qwen3"], vocab, "f32")),
        (ModelError, [vocab, 320, 151936], (tmp_path / "m.gguf", "qwen3-0.6b", vocab)),
        (ModelError, [memory, "0 tokens"], (tmp_path / "m.gguf", TINY["qwen3"], memory)),
        (ModelError, [none], (tmp_path / "m.gguf", TINY["qwen3"], none)),
        (ModelError, ["96 values", "Q6_K"], (tmp_path / "m.gguf", Shape("qwen3", 2, 96, 6, 2, 32, 192), vocab)),
        (InputError, ["qwen4", *SHAPES], (tmp_path / "m.gguf", "qwen4", vocab)),
        (InputError, ["q2_k", *FTYPES], (tmp_path / "m.gguf", TINY["qwen3"], vocab, "q2_k")),
    ):
        with refuses(error, *names):
            write_model(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_written(synthetic, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("mine")
    for folder in (taken, taken / "folder"):
        with refuses(OutputError, folder):
            write_adapter_checkpoint(folder, synthetic("qwen3", "f32"))
    assert taken.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_checkpoint_on_a_full_disk(synthetic, tmp_path):
    import resource

    base, limits = synthetic("qwen3", "f32"), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with refuses(OutputError, tmp_path / "folder"):
            write_adapter_checkpoint(tmp_path / "folder", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_gguf_reader_agrees(synthetic):
    """What is written is GGUF for others too."""
    for ftype in FTYPES:
        reader = gguf.GGUFReader(synthetic("qwen3", ftype))
        assert reader.fields["general.file_type"].contents() == FTYPES[ftype]
        assert len(reader.tensors) == 2 + 11 * 8
