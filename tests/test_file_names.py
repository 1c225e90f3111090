"""Names that no file can have: each writer and reader raises its own class of error, and creates nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from pydeltamem import Conversation, DeltaMemLlama, MemoryFileError, MemorySnapshot, ModelError, OutputError
from pydeltamem.bench.synthetic import write_adapter_checkpoint
from pydeltamem.convert.hf import convert_base
from pydeltamem.formats.base_model import Base
from pydeltamem.formats.checkpoint import CheckpointError
from pydeltamem.formats.gguf_header import Header
from pydeltamem.formats.memory_file import check_writable
from pydeltamem.formats.memory_lock import MemoryFileLock
from pydeltamem.formats.packed import pack, unpack
from pydeltamem.runtime.library import library_folder
from pydeltamem.runtime.quantize import quantize

SNAPSHOT = MemorySnapshot(np.ones((2, 1, 4, 4)), {"layers": "0,1", "adapter": "ab" * 32, "architecture": "qwen3"})

IMPOSSIBLE = {
    "no name": "",
    "a zero in it": "a\0b",
    "no UTF-8": "\ud800",
    "too long": "n" * 300,
    "too long to be written beside": "n" * 252,  # .NAME.12345678.tmp is written first
    "a path too long": "/".join(["n" * 200] * 30),
    "a folder that is missing": "missing/name",
    "a file for a folder": "file/name",
    "a folder's": "new/",
    "a folder": "folder",
}


# impossible for a folder too; the others a folder may have, or get
FOLDERS = ["a zero in it", "no UTF-8", "too long", "a file for a folder"]
# impossible as a str only: pathlib turns "new/" into a file's name
PATHS = [of for of in IMPOSSIBLE if not IMPOSSIBLE[of].endswith("/")]


@pytest.fixture(params=IMPOSSIBLE)
def name(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("stays")
    (tmp_path / "folder").mkdir()
    yield IMPOSSIBLE[request.param]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert (tmp_path / "file").read_text() == "stays" and not list((tmp_path / "folder").iterdir())


def test_memories(name, make_llm):
    llm = make_llm()
    for use in (SNAPSHOT.save, SNAPSHOT.to_npz, SNAPSHOT.to_json, llm.memory.save, check_writable):
        with pytest.raises(MemoryFileError):
            use(name)
    for use in (MemorySnapshot.load, llm.memory.load):
        with pytest.raises(MemoryFileError):
            use(name)


def test_conversations(name, make_llm):
    llm = make_llm()
    with pytest.raises(MemoryFileError):
        Conversation(llm, memory_file=name)


@pytest.mark.parametrize("name", PATHS, indirect=True)
def test_models(name, base, adapter, golden_dir):
    packed = base()
    for write in (
        lambda: pack(packed, adapter("qwen3", "tsw_qo"), name),
        lambda: quantize(packed, name, "q8_0"),
        lambda: convert_base(golden_dir / "qwen3" / "hf", name),
    ):
        with pytest.raises(OutputError):
            write()


@pytest.mark.parametrize("name", FOLDERS, indirect=True)
def test_checkpoints(name, base):
    with pytest.raises(OutputError):
        write_adapter_checkpoint(name, base())


def test_what_is_read(name):
    with pytest.raises(ModelError):
        Header(name)
    with pytest.raises((ModelError, CheckpointError)):
        Base(name)
    for use in (
        lambda: pack(name, name, "out"),
        lambda: unpack(name, "one", "two"),
        lambda: quantize(name, "out", "q8_0"),
        lambda: DeltaMemLlama(name),
    ):
        with pytest.raises(ModelError):
            use()


@pytest.mark.skipif(os.name != "posix", reason="POSIX")
def test_a_folder_where_no_lock_can_be_made(tmp_path, monkeypatch):
    """Some file systems, /proc for one, say of a new file that there is no such file."""
    make = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return make(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MemoryFileError):
        MemoryFileLock(tmp_path / "name").acquire()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always imports from the current folder")
@pytest.mark.parametrize(
    "command",
    [
        "quantize {} out.gguf f16",
        "architectures qwen3",
        "bench -m {} --against LIBRARY -t 1 -p 4 -n 0 --pairs 2 --rss 0",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_module_in_the_current_folder_is_not_imported(base, tmp_path, command):
    """A model's folder comes from anybody. The commands run other processes of Python."""
    for name in ("json", "numpy", "gguf"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    paths = {"{}": str(base()), "LIBRARY": library_folder()}
    arguments = [paths.get(argument, argument) for argument in command.split()]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pydeltamem.cli", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()
