"""Bad input to `deltamem convert`: one sentence that names the file, exit code 1, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from pydeltamem.cli.main import main
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.errors import CheckpointError, DeltaMemError, InputError, ModelError, OutputError
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import Checkpoint
from refusals import check_names, refuses

CONFIG, PT, SAFETENSORS = "delta_mem_config.json", "delta_mem_adapter.pt", "delta_mem_adapter.safetensors"
LAYER = "model.layers.1.self_attn."

pytestmark = pytest.mark.filterwarnings("error")  # a warning would be a second line on the terminal


class Job:
    """A conversion of a golden checkpoint that a test spoils."""

    def __init__(self, golden_dir, folder, case="tsw_qo"):
        self.directory, self.out = folder / "checkpoint", folder / "out" / "adapter.gguf"
        shutil.copytree(golden_dir / "qwen3" / case, self.directory, ignore=shutil.ignore_patterns("expected.npz"))
        self.base = folder / "base.gguf"
        shutil.copy(golden_dir / "qwen3" / "base-f32.gguf", self.base)
        self.out.parent.mkdir()
        self.golden_dir = golden_dir

    def config(self, **fields):
        """Changes fields of the configuration; a field that is None goes."""
        path = self.directory / CONFIG
        config = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    def tensors(self, change, save=torch.save, name=PT):
        """change(tensors) edits the state dict, or returns another."""
        tensors = torch.load(self.directory / PT, weights_only=True)
        tensors = change(tensors) or tensors
        (self.directory / PT).unlink()
        save(tensors, self.directory / name)

    def arguments(self):
        return ["convert", str(self.directory), "--base", str(self.base), "-o", str(self.out)]

    def convert(self):
        write_adapter(Checkpoint(self.directory), Base(self.base), self.out)


@pytest.fixture
def job(golden_dir, tmp_path):
    return Job(golden_dir, tmp_path)


def refused(job, capsys, error, *names):
    """The conversion is refused with that error, from Python and on the command line, and leaves no trace."""

    def files():
        return {path.name: path.read_bytes() for path in job.out.parent.iterdir()} if job.out.parent.is_dir() else None

    before = files()
    with refuses(error, *names) as info:
        job.convert()
    sentence = str(info.value)

    capsys.readouterr()
    assert main(job.arguments()) == 1
    captured = capsys.readouterr()
    assert captured.err == f"deltamem: error: {sentence}\n"
    assert captured.out == ""
    assert files() == before


def reason(job):
    """The sentence with which it is refused."""
    with pytest.raises(DeltaMemError) as info:
        job.convert()
    return str(info.value)


# the configuration

ARCHIVED = {
    "num_memory_partitions": 2,
    "num_global_memory_partitions": 1,
    "memory_partition_routing": "hard",
    "memory_partition_basis": "separate",
    "tie_memory_partition_read_write": True,
    "memory_partition_read_mode": "sigmoid",
    "memory_partition_sigmoid_gate_bias_init": 0.0,
    "slot_read_top_k": 1,
    "global_memory_mode": "read_only",
    "global_memory_read_top_k": 1,
    "global_memory_merge_mode": "sum",
    "global_memory_gate_bias_init": 0.0,
    "global_memory_read_logit_bias": 1.0,
    "memory_reader_layers": [0],
    "memory_reader_hidden_size": 512,
    "memory_reader_residual_scale": 1.0,
    "memory_reader_read_only": False,
    "memory_readout_mode": "state",
    "memory_write_source": "attention",
    "memory_write_proposals_per_message": 1,
    "synthetic_memory_slots": 2,
    "latent_memory_layers": [0],
    "latent_memory_hidden_size": 512,
    "latent_memory_residual_scale": 1.0,
    "latent_memory_slots": 1,
    "latent_memory_init_std": 0.1,
    "latent_gate_init": 0.0,
    "target_modules": ["mlp"],
}

BAD_FIELDS = [
    *ARCHIVED.items(),
    ("tie_memory_partition_read_write", 0),  # equal to false, and yet not it
    ("new_field", 1),
    ("rank", "8"),
    ("rank", 8.0),
    ("rank", True),
    ("rank", 0),
    ("rank", 65),
    ("rank", None),
    ("alpha", None),
    ("alpha", "16"),
    ("alpha", float("nan")),
    ("alpha", float("inf")),
    ("alpha", 10**400),
    ("alpha", [16]),
    ("num_state_heads", 0),
    ("num_state_heads", 1.5),
    ("normalize_qk", 1),
    ("couple_lambda", "yes"),
    ("rankwise_gates", []),
    ("delta_o_rmsnorm", 0),
    ("trainable_delta_scale", {}),
    ("delta_scale_max", "2"),
    ("delta_scale_max", 0),
    ("delta_o_rmsnorm_eps", -1e-6),
    ("delta_o_rmsnorm_eps", 1e-60),
    ("state_update_mode", "gated"),
    ("state_update_mode", ["standard"]),
    ("memory_write_granularity", "word"),
    ("delta_scale_granularity", "tensor"),
    ("delta_scale_parameterization", "alpha"),
    ("delta_heads", []),
    ("delta_heads", ["q", "x"]),
    ("delta_heads", "qo"),
    ("delta_heads", [["q"]]),
    ("target_layers", [-1]),
    ("target_layers", [1.5]),
    ("target_layers", 3),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_config_field(job, capsys, name, value):
    job.config(**{name: value})
    given = "" if value is None else f" = {json.dumps(value)[:50]}"
    refused(job, capsys, CheckpointError, job.directory / CONFIG, name)
    assert f"{name}{given}" in reason(job)


def test_every_archived_field_is_tried(golden_dir):
    """What a published configuration holds is either archived, or used by a golden case, or an initial value."""
    published = json.loads((golden_dir / "qwen3" / "tsw_qo" / CONFIG).read_text())
    initial = {"beta_bias_init", "output_init", "base_slice_ref_width", "online_gain", "delta_scale_init"}
    tried = {name for name, _ in BAD_FIELDS} | initial
    assert set(published) <= tried


def test_initial_values_do_not_matter(job):
    initial = {"beta_bias_init": 3.0, "base_slice_ref_width": 16, "online_gain": 0.1, "delta_scale_init": 0.5}
    job.config(output_init="base_slice", **initial)
    job.convert()
    assert job.out.is_file()


def test_older_configuration(job):
    """One that has only what decides the result, the rest at the publication's defaults: there all are corrected."""
    job.config(delta_heads=["q", "k", "v", "o"])
    job.convert()
    expected = job.out.read_bytes()
    (job.directory / CONFIG).write_text('{"rank": 8, "alpha": 16}')
    job.convert()
    assert job.out.read_bytes() == expected


def test_a_configuration_with_a_byte_order_mark(job):
    job.convert()
    expected = job.out.read_bytes()
    config = job.directory / CONFIG
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    job.convert()
    assert job.out.read_bytes() == expected


@pytest.mark.parametrize(
    "content",
    [b'{"rank": 8,', b"", b"\xff\xfe\x00", b"[" * 100_000, b"[1, 2]"],
    ids=["cut", "empty", "binary", "deep", "list"],
)
def test_broken_config(job, capsys, content):
    (job.directory / CONFIG).write_bytes(content)
    refused(job, capsys, CheckpointError, job.directory / CONFIG, "JSON")


def test_missing_files(job, capsys):
    (job.directory / CONFIG).rename(job.directory / "other.json")
    refused(job, capsys, CheckpointError, job.directory / CONFIG)
    (job.directory / "other.json").rename(job.directory / CONFIG)
    (job.directory / PT).unlink()
    refused(job, capsys, CheckpointError, job.directory, PT, SAFETENSORS)
    shutil.rmtree(job.directory)
    refused(job, capsys, CheckpointError, job.directory)
    job.directory.write_text("a file")
    refused(job, capsys, CheckpointError, job.directory)


# the weights


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_pt(job, capsys, keep):
    path = job.directory / PT
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(job, capsys, CheckpointError, path, "PyTorch")


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_truncated_safetensors(job, capsys, keep):
    job.tensors(lambda tensors: None, safetensors.torch.save_file, SAFETENSORS)
    path = job.directory / SAFETENSORS
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(job, capsys, CheckpointError, path, "safetensors")


class Code:
    """Unpickled, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_a_pickle_that_wants_to_run_code(job, capsys, tmp_path, container):
    ran, path = tmp_path / "ran", job.directory / PT
    if container == "zip":
        torch.save({"tensor": Code(ran)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps(Code(ran)))
    refused(job, capsys, CheckpointError, path)
    assert not ran.exists()
    if container == "zip":  # it is armed
        torch.load(path, weights_only=False)
        assert ran.exists()


def test_a_pickle_that_wants_to_run_code_is_named_as_such(job, capsys, tmp_path):
    torch.save({"tensor": Code(tmp_path / "ran")}, job.directory / PT)
    refused(job, capsys, CheckpointError, job.directory / PT, "wants to run code")


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], torch.zeros(1), {"rank": 8}, {"a": {"b": torch.zeros(1)}}, None],
    ids=["list", "tensor", "number", "nested", "none"],
)
def test_no_state_dict(job, capsys, content):
    torch.save(content, job.directory / PT)
    refused(job, capsys, CheckpointError, job.directory / PT, "state dict")


@pytest.mark.parametrize("name", ["memory_q_proj", "beta_proj", "beta_bias", "delta_o_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [PT, SAFETENSORS])
def test_not_finite(job, capsys, name, value, kind):
    def spoil(tensors):
        tensors[LAYER + name].view(-1)[-1] = value

    job.tensors(spoil, torch.save if kind == PT else safetensors.torch.save_file, kind)
    refused(job, capsys, CheckpointError, job.directory / kind, f"tensor {LAYER}{name}", "finite")


def test_a_tensor_that_the_file_does_not_hold(job, capsys):
    """One value that is said to be there 2^42 times."""
    job.tensors(lambda tensors: {**tensors, LAYER + "beta_bias": torch.ones(1).half().expand(1 << 42)})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}beta_bias")


def test_names_out_of_a_file_stay_on_one_line(job, capsys):
    job.tensors(lambda tensors: {**tensors, "a\nb\x1b[2J": torch.ones(1)})
    refused(job, capsys, CheckpointError, job.directory / PT, r"a\nb\x1b[2J")
    job.config(**{"c\nd": 1})
    refused(job, capsys, CheckpointError, job.directory / CONFIG, r"c\nd")


def test_not_finite_once_scaled(job, capsys):
    job.config(alpha=3e38)
    job.tensors(lambda tensors: {**tensors, LAYER + "delta_q_proj": tensors[LAYER + "delta_q_proj"] + 1e3})
    refused(job, capsys, CheckpointError, job.directory, "delta_q_proj", "float32")


def test_beyond_f16(job, capsys):
    job.tensors(lambda tensors: {**tensors, LAYER + "delta_q_proj": tensors[LAYER + "delta_q_proj"] + 1e6})
    with refuses(CheckpointError, job.directory / PT, "F16", "--outtype f32 or bf16"):
        write_adapter(Checkpoint(job.directory), Base(job.base), job.out, "f16")
    assert not list(job.out.parent.iterdir())
    write_adapter(Checkpoint(job.directory), Base(job.base), job.out, "bf16")


def test_large_trained_scales(golden_dir, tmp_path):
    """A sigmoid far from 0 is 0 or 1, without overflow."""
    job = Job(golden_dir, tmp_path, "layers_subset_scale_layer")
    job.tensors(lambda tensors: {**tensors, LAYER + "delta_scale_raw": torch.tensor([-2000.0])})
    job.convert()
    reader = gguf.GGUFReader(job.out)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert not tensors["blk.1.deltamem_q.weight"].any()
    assert tensors["blk.3.deltamem_q.weight"].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=["int32", "bool", "complex64"])
def test_not_floats(job, capsys, dtype):
    job.tensors(lambda tensors: {**tensors, LAYER + "beta_bias": torch.ones(8).to(dtype)})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}beta_bias")


def test_not_floats_in_safetensors(job, capsys):
    save = safetensors.torch.save_file
    job.tensors(lambda tensors: {**tensors, LAYER + "beta_bias": torch.ones(8, dtype=torch.int32)}, save, SAFETENSORS)
    refused(job, capsys, CheckpointError, job.directory / SAFETENSORS, f"tensor {LAYER}beta_bias", "I32")


def test_sparse(job, capsys):
    job.tensors(lambda tensors: {**tensors, LAYER + "beta_bias": torch.ones(8).to_sparse()})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}beta_bias")


@pytest.mark.parametrize("name", ["memory_k_proj", "beta_bias", "delta_o_proj"])
def test_missing_tensor(job, capsys, name):
    job.tensors(lambda tensors: {key: tensor for key, tensor in tensors.items() if key != LAYER + name})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}{name}")


@pytest.mark.parametrize("name", ["extra", LAYER + "lambda_proj", LAYER + "delta_x_proj"])
def test_extra_tensor(job, capsys, name):
    job.tensors(lambda tensors: {**tensors, name: torch.zeros(2)})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {name}")


@pytest.mark.parametrize("name", ["memory_v_proj", "beta_proj", "delta_q_proj", "delta_o_proj", "beta_bias"])
def test_wrong_shape(job, capsys, name):
    job.tensors(lambda tensors: {**tensors, LAYER + name: tensors[LAYER + name][:-1].clone()})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}{name}", "shape")


def test_configuration_of_another_adapter(job, capsys):
    job.config(num_state_heads=2)
    refused(job, capsys, CheckpointError, job.directory / PT, "[8, 96]", "[16, 96]")
    job.config(num_state_heads=1, couple_lambda=False)
    refused(job, capsys, CheckpointError, job.directory / PT, "tensor model.layers.0.self_attn.lambda_proj")


def test_layer_out_of_range(job, capsys):
    job.config(target_layers=[0, 4])
    refused(job, capsys, CheckpointError, job.directory, "layer 4", job.base)


# the base


def write_base(path, architecture="qwen3", n_layer=4, n_embd=96, n_q=192, keys=True, attention=None, **options):
    """A base of that architecture with just what the converter looks at."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    if keys:
        writer.add_block_count(n_layer)
        writer.add_embedding_length(n_embd)
        writer.add_head_count(6)
        writer.add_head_count_kv(2)
    for i in range(n_layer) if attention is None else attention:
        for name, rows, columns in (
            ("attn_q", n_q, n_embd),
            ("attn_k", 64, n_embd),
            ("attn_v", 64, n_embd),
            ("attn_output", n_embd, n_q),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.zeros((rows, columns), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_this_base_would_do(job):
    write_base(job.base)
    job.convert()
    assert job.out.is_file()


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ({"n_embd": 128}, ["width 96", 128]),
        ({"n_q": 384}, ["[192, 8]", "[384, 8]"]),
    ],
)
def test_base_of_another_size(job, capsys, base, names):
    write_base(job.base, **base)
    refused(job, capsys, CheckpointError, job.directory / PT, *names)


def test_base_with_other_layers(job, capsys):
    for n_layer in (5, 3):
        write_base(job.base, n_layer=n_layer)
        refused(job, capsys, CheckpointError, job.directory / PT, "4 layers", job.base, n_layer)


def test_base_with_attention_in_other_layers(job, capsys):
    """A memory in every layer, on a hybrid; and on a model that has no attention at all."""
    write_base(job.base, attention=(1, 2))
    refused(job, capsys, CheckpointError, job.directory / PT, "4 layers", job.base, "layer 2")
    write_base(job.base, attention=(1, 3))
    refused(job, capsys, CheckpointError, job.directory / PT, "tensor model.layers.0.self_attn.beta_bias")
    write_base(job.base, attention=())
    refused(job, capsys, ModelError, job.base, "layer")


def test_layers_that_are_named_and_have_no_attention(job, capsys):
    job.config(target_layers=[0, 1, 2, 3])
    write_base(job.base, attention=(1, 2))
    refused(job, capsys, CheckpointError, job.directory, "layer 0", job.base)


def test_base_of_another_architecture(job, capsys):
    job.base = job.golden_dir / "smollm3" / "base-f32.gguf"
    refused(job, capsys, CheckpointError, job.directory / PT, "4 layers", job.base)


def test_checkpoint_of_another_model_in_some_layers(job, capsys):
    """Layers that are named fit any model that has them; then the shapes must."""
    job.config(target_layers=[0, 1])
    refused(job, capsys, CheckpointError, job.directory / PT, "tensor model.layers.2.self_attn.beta_bias")


def test_base_in_several_files(job, capsys):
    """llama.cpp's split models: the first part stands for all."""
    job.convert()
    expected = job.out.read_bytes()
    write_base(job.base, split_max_tensors=7)
    job.base.unlink(missing_ok=True)
    parts = sorted(job.base.parent.glob("base-*-of-*.gguf"))
    assert len(parts) == 3
    job.base = parts[0]
    job.convert()
    assert job.out.read_bytes() == expected
    job.base = parts[1]
    refused(job, capsys, ModelError, parts[1])
    job.base = parts[0]
    parts[2].unlink()
    refused(job, capsys, ModelError, parts[2])


def test_unknown_architecture(job, capsys):
    write_base(job.base, "newarch")
    refused(job, capsys, ModelError, job.base, "newarch")


def test_unknown_architecture_where_order_does_not_matter(job):
    write_base(job.base, "newarch")
    job.config(delta_heads=["v", "o"])
    job.convert()
    assert job.out.is_file()


def test_no_language_model(job, capsys):
    write_base(job.base, keys=False)
    refused(job, capsys, ModelError, job.base, "qwen3.block_count")


def test_nonsensical_layers(job, capsys):
    data = job.base.read_bytes()
    at = data.index(b"qwen3.block_count") + len(b"qwen3.block_count") + 4
    for n in (0, 2**31):
        job.base.write_bytes(data[:at] + n.to_bytes(4, "little") + data[at + 4 :])
        refused(job, capsys, ModelError, job.base, f"{n} layers")


def test_too_few_values_per_layer(job, capsys):
    writer = gguf.GGUFWriter(job.base, "qwen3")
    writer.add_block_count(4)
    writer.add_embedding_length(96)
    writer.add_head_count([6, 6, 6])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(job, capsys, ModelError, job.base, "qwen3.attention.head_count", "3 values", "4 layers")


def test_base_is_missing(job, capsys):
    job.base.unlink()
    refused(job, capsys, ModelError, job.base)
    job.base.mkdir()
    with refuses(ModelError, job.base, "folder"):
        job.convert()
    assert main(job.arguments()) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [job.base, "config.json"])  # of a Hugging Face model


@pytest.mark.parametrize("keep", [0, 3, 4, 16, 30, 300, 3000, 0.5, 0.999])
def test_base_is_truncated(job, capsys, keep):
    data = job.base.read_bytes()
    job.base.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(job, capsys, ModelError, job.base, "GGUF")


def test_base_of_an_unknown_version(job, capsys):
    data = job.base.read_bytes()
    job.base.write_bytes(data[:4] + b"\x09" + data[5:])
    refused(job, capsys, ModelError, job.base, "version is 9")


def test_base_is_no_gguf(job, capsys):
    job.base.write_text("no model\n" * 100)
    refused(job, capsys, ModelError, job.base, "GGUF")


def test_base_is_an_adapter(job, capsys, adapter):
    job.base = adapter("qwen3", "tsw_qo")
    refused(job, capsys, ModelError, job.base, "adapter")


def test_damaged_base_never_crashes(job):
    """Any byte of the header may be wrong: the base is read, or refused by a ModelError."""
    data, rng = job.base.read_bytes(), np.random.default_rng(0)
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, 9000, 2):
            damaged[place] = rng.integers(0, 256)
        job.base.write_bytes(damaged)
        try:
            Base(job.base)
        except ModelError as error:
            n_refused += 1
            assert str(job.base) in str(error) and "\n" not in str(error)
    assert n_refused


# the output


def test_output_folder_is_missing(job, capsys):
    job.out.parent.rmdir()
    refused(job, capsys, OutputError, job.out, "No such file or directory")


def test_output_is_a_folder(job, capsys):
    job.out.mkdir()
    with refuses(OutputError, job.out, "folder"):
        job.convert()
    assert main(job.arguments()) == 1
    assert [path.name for path in job.out.parent.iterdir()] == [job.out.name]


def test_output_is_read(job):
    """The base, its other shards and the checkpoint's files are not overwritten, by whatever name."""
    write_base(job.base, split_max_tensors=7)
    first, *others = sorted(job.base.parent.glob("base-*-of-*.gguf"))
    job.base = first
    link = job.base.parent / "link.gguf"
    link.symlink_to(first)
    for out in (first, *others, link, job.directory / CONFIG, job.directory / PT):
        before, job.out = out.read_bytes(), out
        with refuses(InputError, out):
            job.convert()
        assert main(job.arguments()) == 1
        assert out.read_bytes() == before
    job.out = job.directory / "adapter.gguf"  # beside them it may be, twice too
    job.convert()
    job.convert()


def test_an_existing_output_stays(job, capsys):
    job.convert()
    before = job.out.read_bytes()
    job.tensors(lambda tensors: {**tensors, LAYER + "beta_bias": torch.full((8,), float("nan"))})
    refused(job, capsys, CheckpointError, job.directory / PT, f"tensor {LAYER}beta_bias")
    assert job.out.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(job, monkeypatch):
    job.convert()
    before = job.out.read_bytes()

    for error, says in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("0 written"), "0 written"),
    ):

        def full(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
        with refuses(OutputError, job.out, says):
            job.convert()
    assert [path.read_bytes() for path in job.out.parent.iterdir()] == [before]


def test_a_new_output_replaces_the_old(job):
    write_adapter(Checkpoint(job.directory), Base(job.base), job.out, name="old")
    before = job.out.read_bytes()
    job.convert()
    assert job.out.read_bytes() != before
    assert gguf.GGUFReader(job.out).tensors
    assert [path.name for path in job.out.parent.iterdir()] == [job.out.name]


def test_as_a_command(job):
    """In a process of its own: one line, no traceback, no warning, exit code 1."""
    job.config(num_memory_partitions=2)
    command = [sys.executable, "-m", "pydeltamem.cli", *job.arguments()]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"deltamem: error: {reason(job)}\n"
    assert not list(job.out.parent.iterdir())
