"""Commands and methods that write a file: they replace only a file of the same kind; any other stays."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pydeltamem import Conversation, MemoryFileError, MemorySnapshot, OutputError
from pydeltamem.bench.synthetic import Shape, write_adapter_checkpoint, write_model
from pydeltamem.cli.main import main
from pydeltamem.convert.adapter import write_adapter
from pydeltamem.convert.hf import convert_base
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import CONFIG, WEIGHTS, Checkpoint
from pydeltamem.formats.kinds import CONVERSATIONS, MEMORY, MODEL, PNG
from pydeltamem.formats.memory_file import check_writable, write_memory_file
from pydeltamem.formats.outputs import check_target, output, writing
from pydeltamem.formats.packed import pack, unpack
from pydeltamem.runtime.quantize import quantize
from refusals import refuses

METADATA = {"layers": "0,1", "adapter": "ab" * 32, "adapter_name": "test", "architecture": "qwen3"}
SNAPSHOT = MemorySnapshot(np.ones((2, 1, 4, 4)), METADATA)
SMALL = Shape("qwen3", 2, 64, 2, 1, 32, 64)

KINDS = (
    "text",
    "json",
    "damaged json",
    "lines",
    "memory",
    "npz",
    "memory json",
    "model",
    "shard",
    "adapter",
    "lora",
    "png",
    "pytorch",
    "config",
)


@pytest.fixture(scope="session")
def files(base, adapter, golden_dir, tmp_path_factory):
    """A file of each kind."""
    import gguf
    import torch

    folder = tmp_path_factory.mktemp("kinds")
    made = {kind: folder / kind for kind in KINDS}
    made["text"].write_text("Dear diary")
    made["json"].write_text('{"of": "somebody else"}')
    made["damaged json"].write_text('{"state": [')
    made["lines"].write_text('{"turns": []}\n{"turns": []}\n')
    SNAPSHOT.save(made["memory"])
    SNAPSHOT.to_npz(made["npz"])
    SNAPSHOT.to_json(made["memory json"])
    shutil.copy(base(), made["model"])
    parts = pack(base(), adapter("qwen3", "tsw_qo"), folder / "shards.gguf", max_tensors=30)
    shutil.copy(parts[1], made["shard"])
    shutil.copy(adapter("qwen3", "tsw_qo"), made["adapter"])
    writer = gguf.GGUFWriter(made["lora"], "qwen3")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made["png"].write_bytes(b"\x89PNG\r\n\x1a\n and a picture")
    torch.save({"x": torch.ones(2)}, made["pytorch"])
    shutil.copy(golden_dir / "qwen3" / "tsw_qo" / CONFIG, made["config"])
    return made


def refused(act, path, files, own, error):
    """`act` leaves every file at `path` alone that is not of one of its own kinds, and says which file it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        if kind in own:
            continue
        shutil.copy(files[kind], path)
        names = {p for p in path.parent.iterdir()}
        with pytest.raises(error) as info:
            act()
        assert str(path) in str(info.value), kind
        assert path.read_bytes() == files[kind].read_bytes(), f"the {kind} is gone"
        assert {p for p in path.parent.iterdir()} == names
    for kind in own:
        shutil.copy(files[kind], path)
        act()
        assert path.read_bytes() != files[kind].read_bytes(), kind
    path.write_bytes(b"")  # of every kind
    act()
    assert path.stat().st_size > 0


def test_a_memory_that_is_to_be_saved_later(files, tmp_path):
    """It is refused at once, not after the conversation."""
    path = tmp_path / "a.memory"
    for kind in KINDS:
        shutil.copy(files[kind], path)
        if kind == "memory":
            check_writable(path)
        else:
            with refuses(MemoryFileError, path):
                check_writable(path)
        assert path.read_bytes() == files[kind].read_bytes() and os.listdir(tmp_path) == ["a.memory"]


# signals


def holds_something_new(folder, before):
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the file that shows beforehand whether the folder can be written
            if path not in before and path.stat().st_size:
                return True
    return False


def ends_by(command, out, number):
    """The command, which gets the signal while it writes `out`, ends by it. The old file stays, and nothing else."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # the tests may run where it is ignored
    )
    while not holds_something_new(out.parent, before):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (128 + number, b"")
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_a_model_is_quantised(base, tmp_path, name):
    """llama.cpp's own call, in which Python would handle no signal."""
    source, out = tmp_path / "source.gguf", tmp_path / "out" / "model.gguf"
    out.parent.mkdir()
    write_model(source, Shape("qwen3", 4, 512, 8, 8, 64, 2048), base(), "f32")
    shutil.copy(base(), out)
    ends_by(["-m", "pydeltamem.cli", "quantize", source, out, "q4_k_m", "-t", "1"], out, getattr(signal, name))


WRITE = """
import sys, time
from pydeltamem.cli import main
from pydeltamem.formats.kinds import MEMORY
from pydeltamem.formats.outputs import writing

class Slow:
    @staticmethod
    def add_arguments(parser): pass
    @staticmethod
    def run(args):
        with writing(sys.argv[1], MEMORY) as temporary:
            temporary.write_bytes(b"x")
            time.sleep(600)

sys.modules["slow"] = Slow
main.SUBCOMMANDS["slow"] = ("slow", "be slow")
sys.exit(main.main(["slow"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_any_file_is_written(tmp_path, name):
    SNAPSHOT.save(tmp_path / "a.memory")
    ends_by(["-c", WRITE, tmp_path / "a.memory"], tmp_path / "a.memory", getattr(signal, name))


# Python


def test_memory_files(files, tmp_path, llm):
    path = tmp_path / "a.memory"
    llm.eval([5, 17, 40])
    saves = [SNAPSHOT.save, llm.memory.save, lambda path: write_memory_file(path, SNAPSHOT.state * 2, METADATA)]
    for save in saves:
        refused(lambda save=save: save(path), path, files, ["memory"], MemoryFileError)


def test_conversations(files, tmp_path):
    path = tmp_path / "a.jsonl"

    def save():
        with writing(path, CONVERSATIONS) as temporary:
            temporary.write_text('{"turns": [1]}\n')

    refused(save, path, files, ["lines", "json", "memory json"], OutputError)  # an object on one line is one of them


def test_bytes_go_to_the_standard_output(capfdbinary):
    with output("-", PNG) as write:
        write(b"\x89PNG")
    assert capfdbinary.readouterr().out == b"\x89PNG"


def test_a_conversation_does_not_open_another_file(files, tmp_path, llm):
    path = tmp_path / "a.memory"
    for kind in KINDS:
        shutil.copy(files[kind], path)
        with refuses(MemoryFileError, path):
            Conversation(llm, memory_file=path)
        assert path.read_bytes() == files[kind].read_bytes()


def test_a_file_that_came_into_the_place_of_a_memory_file(files, tmp_path, llm):
    path = tmp_path / "a.memory"
    with refuses(MemoryFileError, path), Conversation(llm, memory_file=path) as conversation:
        shutil.copy(files["model"], path)
        conversation.say("hello", n_predict=2)
    assert path.read_bytes() == files["model"].read_bytes()


def test_a_link_leads_to_what_must_stay(files, tmp_path):
    target = tmp_path / "model.gguf"
    shutil.copy(files["model"], target)
    (tmp_path / "a.memory").symlink_to(target)
    with refuses(MemoryFileError, tmp_path / "a.memory"):
        SNAPSHOT.save(tmp_path / "a.memory")
    assert target.read_bytes() == files["model"].read_bytes()


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    """The file is whole there, although nobody can say whether its name is on the disk."""
    opened = os.open

    def refuse(path, *args, **kwargs):
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    SNAPSHOT.save(tmp_path / "a.memory")
    assert MemorySnapshot.load(tmp_path / "a.memory").layers == [0, 1]


@pytest.mark.parametrize("kind", [MODEL, MEMORY, PNG])
def test_an_existing_file_that_may_not_be_read(files, tmp_path, monkeypatch, kind):
    path = tmp_path / "out"
    shutil.copy(files["text"], path)
    opened = open

    def refuse(name, *args, **kwargs):
        if name == path:
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with refuses(OutputError, path, "Permission denied"):
        check_target(path, kind)


def test_exports(files, tmp_path):
    other = MemorySnapshot(SNAPSHOT.state * 2, METADATA)
    refused(lambda: other.to_npz(tmp_path / "a.npz"), tmp_path / "a.npz", files, ["npz"], MemoryFileError)
    refused(lambda: other.to_json(tmp_path / "a.json"), tmp_path / "a.json", files, ["memory json"], MemoryFileError)


def test_models(files, base, adapter, golden_dir, tmp_path):
    out, hf = tmp_path / "out" / "out.gguf", tmp_path / "hf"
    shutil.copytree(golden_dir / "qwen3" / "hf", hf)
    memory = adapter("qwen3", "tsw_qo")
    for write in (
        lambda: quantize(base(), out, "q8_0"),
        lambda: convert_base(hf, out, "f16"),
        lambda: pack(base(), memory, out),
        lambda: write_model(out, SMALL, base(), "f32"),
    ):
        refused(write, out, files, ["model"], OutputError)


def test_shards(files, base, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = pack(base(), adapter("qwen3", "tsw_qo"), out / "m.gguf", max_tensors=40)

    def write():
        pack(base(), adapter("qwen3", "tsw_qo"), out / "m.gguf", max_tensors=40)

    for path in first:
        refused(write, path, files, ["shard"], OutputError)
    write()


def test_adapters(files, base, adapter, golden_dir, tmp_path):
    out = tmp_path / "out" / "out.gguf"
    checkpoint = Checkpoint(golden_dir / "qwen3" / "msw4_qo")
    refused(lambda: write_adapter(checkpoint, Base(base()), out), out, files, ["adapter"], OutputError)


def test_what_unpack_writes(files, base, adapter, tmp_path):
    pack(base(), adapter("qwen3", "msw4_qo"), tmp_path / "packed.gguf")
    one, two = tmp_path / "out" / "base.gguf", tmp_path / "out" / "adapter.gguf"
    other = tmp_path / "model"
    for path, own in ((one, ["model"]), (two, ["adapter"])):
        of_files = files | ({"model": other} if own == ["model"] else {})
        write_model(other, SMALL, base(), "f32")
        refused(lambda: unpack(tmp_path / "packed.gguf", one, two), path, of_files, own, OutputError)


def test_checkpoints(files, base, tmp_path):
    """Both files of a checkpoint, or none."""
    import torch
    import transformers

    from pydeltamem.train.reference import DeltaMem, DeltaMemConfig

    config = transformers.Qwen3Config(
        vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    memory = DeltaMem(transformers.Qwen3ForCausalLM(config), DeltaMemConfig(rank=4))
    folder = tmp_path / "checkpoint"
    for name, own in ((WEIGHTS[0], ["pytorch"]), (CONFIG, ["config"])):
        refused(lambda: memory.save_checkpoint(folder), folder / name, files, own, OutputError)
    for name in (WEIGHTS[1], CONFIG):
        own = ["config"] if name == CONFIG else []
        refused(
            lambda: write_adapter_checkpoint(tmp_path / "c", base(), rank=4),
            tmp_path / "c" / name,
            files,
            own,
            OutputError,
        )


# the command line


def failing(capsys, path, *arguments):
    capsys.readouterr()
    before = path.read_bytes()
    assert main([*map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("deltamem: error:") and str(path) in error and error.count("\n") == 1
    assert path.read_bytes() == before


@pytest.fixture
def model(base, adapter, tmp_path):
    """A model, its adapter, and a memory file of it, that may be lost."""
    copies = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    shutil.copy(base(), copies[0])
    shutil.copy(adapter("qwen3", "tsw_qo"), copies[1])
    return copies


def test_generate_and_chat_save_no_memory_over_a_model(model, tmp_path, capsys, monkeypatch):
    """The command of the report: a model of 3 MB became a memory file of 4 KB."""
    base, memory = model
    loaded = ["-m", base, "--deltamem", memory]
    for path in model:
        failing(capsys, path, "generate", *loaded, "-p", "hello", "-n", "1", "--save-memory", path)
        failing(capsys, path, "chat", *loaded, "--save-memory", path)
        failing(capsys, path, "chat", *loaded, "--memory", path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"/save {base}\n/memory\n".encode())))
    before = base.read_bytes()
    assert main([*map(str, ["chat", *loaded, "-n", "1"])]) == 0
    assert str(base) in capsys.readouterr().err and base.read_bytes() == before


def test_memory_copy_and_export(model, tmp_path, capsys):
    SNAPSHOT.save(tmp_path / "a.memory")
    failing(capsys, model[0], "memory", "copy", tmp_path / "a.memory", model[0], "--force")
    for name in ("config.json", "arrays.npz"):
        (tmp_path / name).write_text('{"hidden_size": 64}')
        failing(capsys, tmp_path / name, "memory", "export", tmp_path / "a.memory", tmp_path / name)


def test_reports_and_pictures(model, tmp_path, capsys, files):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "version": "4.1"}')
    for path in (model[0], tmp_path / "config.json"):
        failing(capsys, path, "architectures", "qwen3", "--json", path)
        failing(capsys, path, "bench", "-m", model[0], "--deltamem", model[1], "--json", path)
        failing(capsys, path, "bench", "--op", "--json", path)
        failing(capsys, path, "eval", "recall", "-n", "1", "--json", path)
        failing(capsys, path, "eval", "recall", "-n", "1", "--plot", path)
    report = tmp_path / "report.json"
    for _ in range(2):
        assert main(["architectures", "qwen3", "--json", str(report)]) == 0
    assert "architectures" in json.loads(report.read_text())


def test_a_model_is_not_written_over_another_kind(model, golden_dir, tmp_path, capsys):
    """The commands that make models and adapters, which have no --force."""
    base, memory = model
    packed = tmp_path / "packed.gguf"
    pack(base, memory, packed)
    checkpoint = golden_dir / "qwen3" / "tsw_qo"
    another = tmp_path / "another.gguf"
    shutil.copy(base, another)
    SNAPSHOT.save(tmp_path / "a.memory")
    failing(capsys, another, "convert", checkpoint, "--base", base, "-o", another)
    failing(capsys, another, "unpack", packed, "--base", tmp_path / "new.gguf", "--adapter", another)
    failing(capsys, memory, "unpack", packed, "--base", memory, "--adapter", tmp_path / "new.gguf")
    for path in (memory, tmp_path / "a.memory"):
        failing(capsys, path, "convert-base", golden_dir / "qwen3" / "hf", "-o", path)
        failing(capsys, path, "quantize", base, path, "q8_0")
    failing(capsys, tmp_path / "a.memory", "pack", base, memory, "-o", tmp_path / "a.memory")
    assert not (tmp_path / "new.gguf").exists()
