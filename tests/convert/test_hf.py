"""deltamem convert-base, and convert with a Hugging Face folder as base: nothing overwritten, nothing half."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from pydeltamem.cli.main import main
from pydeltamem.convert.hf import convert_base, converter, errors
from pydeltamem.errors import LibraryError, ModelError, OutputError
from pydeltamem.formats.gguf_header import Header
from pydeltamem.runtime.ggml import written
from refusals import check_names, refuses
from test_inspect import POINTER
from test_pack import on_a_full_disk

pytestmark = pytest.mark.usefixtures("warm_converter")


@pytest.fixture
def hf(golden_dir, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(golden_dir / "qwen3" / "hf", folder)
    folder.chmod(0o755)
    return folder


def test_a_file_of_the_model_is_not_overwritten(hf, golden_dir, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in hf.iterdir()}
    checkpoint = golden_dir / "qwen3" / "tsw_qo"
    for command in (["convert-base", hf], ["convert", checkpoint, "--base", hf]):
        out = hf / "model.safetensors"
        assert main([*map(str, command), "-o", str(out)]) == 1
        assert (
            capsys.readouterr().err
            == f"deltamem: error: {out}: is read for the conversion; name another file to write\n"
        )
        assert {path.name: path.read_bytes() for path in hf.iterdir()} == before
    for _ in range(2):  # beside them, and again
        convert_base(hf, hf / "model.gguf", "f16")
    assert "token_embd.weight" in Header(hf / "model.gguf").tensors


def test_a_folder_without_weights(hf, golden_dir, tmp_path, capsys):
    (hf / "model.safetensors").unlink()
    out = tmp_path / "out" / "base.gguf"
    out.parent.mkdir()
    with refuses(ModelError, hf, "weights"):
        convert_base(hf, out)
    assert main(["convert", str(golden_dir / "qwen3" / "tsw_qo"), "--base", str(hf), "-o", str(out)]) == 1
    check_names(capsys.readouterr().err.rstrip("\n"), [hf, "weights"])
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(("there", "missing"), [(0, "blk.3."), (1, "token_embd.")])
def test_half_of_a_model(hf, tmp_path, there, missing):
    """Without its index the converter takes what it finds."""
    tensors = safetensors.numpy.load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    last = "model.layers.3."
    half = {
        name: values for name, values in tensors.items() if (name.startswith(last) or "norm" in name) == bool(there)
    }
    safetensors.numpy.save_file(half, hf / "model-half.safetensors", {"format": "pt"})
    with refuses(ModelError, hf, f"{missing}*"):
        convert_base(hf, tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()


def test_a_part_of_a_split_model_is_missing(hf, tmp_path):
    tensors = safetensors.numpy.load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    parts = [{}, {}, {}]
    for name, values in tensors.items():
        parts[1 if "layers.1." in name else 2 if "layers.2." in name else 0][name] = values
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, part in zip(names, parts):
        safetensors.numpy.save_file(part, hf / name, {"format": "pt"})
    convert_base(hf, tmp_path / "whole.gguf")
    assert len(Header(tmp_path / "whole.gguf").tensors) == len(tensors)
    (hf / names[1]).unlink()
    with refuses(ModelError, hf, names[1]):
        convert_base(hf, tmp_path / "base.gguf")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["whole.gguf"]


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00002-of-00002.safetensors"])
def test_a_file_of_which_a_pointer_or_a_part_has_arrived(hf, tmp_path, name, is_cut):
    tensors = safetensors.torch.load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(tensors, hf / name)
    elif name == "model.safetensors":
        safetensors.torch.save_file(tensors, hf / name, {"format": "pt"})
    else:
        keys = sorted(tensors)
        for i in range(2):
            half = {key: tensors[key] for key in keys[i::2]}
            safetensors.torch.save_file(half, hf / f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    data = (hf / name).read_bytes()
    (hf / name).write_bytes(data[: len(data) // 2] if is_cut else POINTER)
    with refuses(ModelError, hf / name, "cut off" if is_cut else "git lfs pull"):
        convert_base(hf, tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()


@pytest.mark.parametrize(
    ("lost", "missing"),
    [("model.layers.2.", "blk.2.attn_norm.weight"), ("model.layers.2.mlp.up_proj.", "blk.2.ffn_up.weight")],
)
def test_a_layer_or_a_tensor_is_missing(hf, tmp_path, lost, missing):
    tensors = safetensors.numpy.load_file(hf / "model.safetensors")
    left = {name: values for name, values in tensors.items() if not name.startswith(lost)}
    safetensors.numpy.save_file(left, hf / "model.safetensors", {"format": "pt"})
    with refuses(ModelError, hf, missing):
        convert_base(hf, tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()


@pytest.mark.parametrize("name", ["base-{ftype}.gguf", "base{v2}.gguf", "{", "{{}}.gguf"])
def test_braces_stay_in_a_name(hf, tmp_path, name):
    (tmp_path / "out{ftype}").mkdir()
    convert_base(hf, tmp_path / "out{ftype}" / name)
    assert [path.name for path in (tmp_path / "out{ftype}").iterdir()] == [name]


@pytest.mark.parametrize(("name", "kept"), [("-x", "-x"), ("b\udce9", "b�")])
def test_any_name_is_recorded(hf, tmp_path, name, kept):
    assert main(["convert-base", str(hf), "-o", str(tmp_path / "base.gguf"), f"--name={name}"]) == 0
    assert Header(tmp_path / "base.gguf").keys["general.name"] == kept


@pytest.mark.parametrize("name", ["-tiny", "tiny"])
def test_a_folder_has_its_name_wherever_it_is_named_from(hf, tmp_path, monkeypatch, name):
    folder = hf.rename(tmp_path / name)
    convert_base(folder, tmp_path / "base.gguf")
    for place, directory in ((tmp_path, name), (folder, ".")):
        monkeypatch.chdir(place)
        convert_base(directory, tmp_path / "again.gguf")
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()
    assert Header(tmp_path / "base.gguf").keys["general.name"]


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_sigterm_ends_the_converter_too(hf, tmp_path):
    """Which waits for its weights: they are a pipe."""
    out = tmp_path / "out"
    out.mkdir()
    (hf / "model.safetensors").unlink()
    os.mkfifo(hf / "model.safetensors")
    command = [sys.executable, "-m", "pydeltamem.cli", "convert-base", str(hf), "-o", str(out / "base.gguf")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while True:
        try:
            pipe = os.open(hf / "model.safetensors", os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            assert error.errno == errno.ENXIO and process.poll() is None  # the converter has not opened it yet
            time.sleep(0.05)
    assert list(out.iterdir())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and said == b""
    with pytest.raises(BrokenPipeError):  # nobody reads any more
        os.write(pipe, b"x")
    os.close(pipe)
    assert not list(out.iterdir())


def test_an_audio_decoder_has_no_block_of_a_language_model(tmp_path):
    """It is whole without the weights whose absence makes another model incomplete."""
    config = {"vocab_size": 16, "n_embd_features": 8, "n_ff": 8, "group_norm_epsilon": 1e-6, "group_norm_groups": 2}
    config.update(architectures=["WavTokenizerDec"], posnet={"n_embd": 8, "n_layer": 1})
    config.update(num_hidden_layers=1, convnext={"n_embd": 8, "n_layer": 1})
    folder, out = tmp_path / "hf", tmp_path / "audio.gguf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {"backbone.norm.weight": np.ones(8, np.float32), "backbone.norm.bias": np.zeros(8, np.float32)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    convert_base(folder, out, "f32")
    header = Header(out)
    assert header.keys["general.architecture"] == "wavtokenizer-dec" and len(header.tensors) == len(weights)


def test_where_it_cannot_be_written(hf, tmp_path):
    for out, says in ((tmp_path / "no" / "base.gguf", "No such file or directory"), (hf, "folder")):
        with refuses(OutputError, out, says):
            convert_base(hf, out)
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "base.gguf"
    check_names(on_a_full_disk("convert-base", hf, "-o", out).rstrip("\n"), [out, "File too large"])
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_a_converter_that_the_system_ends_refuses_nothing(hf, tmp_path, monkeypatch):
    """As it does when there is no memory left."""
    script = tmp_path / "converter.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("pydeltamem.convert.hf.converter", lambda: script)
    with refuses(ModelError, hf, "signal 9", "memory"):
        convert_base(hf, tmp_path / "base.gguf")


def test_what_the_converter_refuses(hf, tmp_path):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with refuses(ModelError, hf, "NoSuchModel"):
        convert_base(hf, tmp_path / "base.gguf")
    assert not (tmp_path / "base.gguf").exists()
    (hf / "config.json").unlink()
    with refuses(ModelError, hf, "config.json"):
        convert_base(hf, tmp_path / "base.gguf")


def test_a_folder_as_base_is_as_its_gguf(directories, tmp_path):
    model, checkpoint = (tmp_path / name for name in ("MODEL_DIR", "CHECKPOINT_DIR"))
    convert_base(model, tmp_path / "base.gguf", "q8_0")
    for base, out in ((model, "a.gguf"), (tmp_path / "base.gguf", "b.gguf")):
        assert main(["convert", str(checkpoint), "--base", str(base), "-o", str(tmp_path / out)]) == 0
    one, other = (Header(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert one.keys == other.keys and one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_a_package_without_the_converter(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "errors.py"))
    with refuses(LibraryError, tmp_path / "lib" / "converter" / "convert_hf_to_gguf.py"):
        converter()


def test_an_output_that_cannot_be_read(tmp_path):
    """It is the fault of what was converted: that is named."""
    (tmp_path / "out.gguf").write_bytes(b"GGUF")
    with refuses(ModelError, tmp_path / "MODEL"):
        written(tmp_path / "out.gguf", tmp_path / "MODEL")
