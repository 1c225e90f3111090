"""Memory files: contents, refusals, the lock, and what remains when a process is killed while saving."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pydeltamem import Conversation, InputError, MemoryFileError, MemoryFileInUse, MemorySnapshot
from pydeltamem.formats.atomic import leftovers, replacing
from pydeltamem.formats.kinds import MEMORY, MEMORY_JSON
from pydeltamem.formats.memory_file import check_writable, read_memory_file, write_memory_file
from pydeltamem.formats.memory_lock import MemoryFileLock
from pydeltamem.formats.outputs import output
from refusals import refuses

METADATA = {"layers": "2,5", "adapter": "ab" * 32, "adapter_name": "test", "architecture": "qwen3"}
SHAPE = (2, 1, 8, 8)
N_KILLED = int(os.environ.get("DELTAMEM_KILLED", "200"))

posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork as on POSIX")


def random_state(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# files


def test_file_round_trip(tmp_path):
    path, state = tmp_path / "a.memory", random_state()
    write_memory_file(path, state, METADATA)
    read, metadata = read_memory_file(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, state)
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["format"] == "deltamem-memory" and metadata["format_version"] == "1"
    assert metadata["created"].endswith("+00:00")
    assert os.listdir(tmp_path) == ["a.memory"]


def test_file_of_a_4b_model_is_small(tmp_path):
    path = tmp_path / "a.memory"
    metadata = {**METADATA, "layers": ",".join(map(str, range(36))), "adapter_name": "delta_mem_qwen3_4b-instruct"}
    write_memory_file(path, random_state(shape=(36, 1, 8, 8)), metadata)
    assert 36 * 64 * 4 < path.stat().st_size < 10 * 1024


@posix
def test_file_mode_follows_umask(tmp_path):
    path = tmp_path / "a.memory"
    old = os.umask(0o027)
    try:
        write_memory_file(path, random_state(), METADATA)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path, state = tmp_path / "a.memory", random_state()
    write_memory_file(path, state, METADATA)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with refuses(MemoryFileError, path, "No space left on device"):
        write_memory_file(path, state + 1, METADATA)
    np.testing.assert_array_equal(read_memory_file(path)[0], state)
    assert os.listdir(tmp_path) == ["a.memory"]


def test_save_follows_a_link(tmp_path):
    real, link = tmp_path / "real.memory", tmp_path / "link.memory"
    write_memory_file(real, random_state(), METADATA)
    link.symlink_to(real)
    write_memory_file(link, random_state(1), METADATA)
    assert link.is_symlink()
    np.testing.assert_array_equal(read_memory_file(real)[0], random_state(1))


@pytest.mark.parametrize("target", ["nowhere/a.memory", "."])
def test_save_where_nothing_can_be_saved(tmp_path, target):
    with refuses(MemoryFileError, tmp_path / target):
        write_memory_file(tmp_path / target, random_state(), METADATA)
    with refuses(MemoryFileError, tmp_path / target):
        check_writable(tmp_path / target)


@posix
def test_a_folder_where_nobody_may_write(tmp_path, monkeypatch):
    """A pipe there may be written to. Root may write everywhere: so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (os.path.samefile(path, tmp_path) and mode & os.W_OK))
    with refuses(MemoryFileError, tmp_path / "a.memory"):
        check_writable(tmp_path / "a.memory")
    os.mkfifo(tmp_path / "pipe")
    check_writable(tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]


@posix
def test_a_folder_that_may_be_written_but_not_read(tmp_path, monkeypatch):
    """Root may read everywhere: so the system's answer is given here."""
    path, make = tmp_path / "a.memory", os.open

    def refuse(name, flags, *args, **kwargs):
        if os.path.isdir(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return make(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    write_memory_file(path, random_state(), METADATA)
    np.testing.assert_array_equal(read_memory_file(path)[0], random_state())


def test_a_file_of_the_first_release_is_read(tmp_path):
    """It has no base, no count of tokens and no date of saving."""
    path, state = tmp_path / "a.memory", random_state()
    old = {"format": "deltamem-memory", "format_version": "1", **METADATA, "created": "2026-11-20T10:00:00+00:00"}
    path.write_bytes(safetensors.numpy.save({"state": state}, old))
    snapshot = MemorySnapshot.load(path)
    np.testing.assert_array_equal(snapshot.state, state)
    assert snapshot.metadata == old and snapshot.tokens_written == 0 and snapshot.layers == [2, 5]
    snapshot.save(path)
    assert MemorySnapshot.load(path).metadata["created"] == old["created"]


def bad_file(path, kind):
    """Writes a file that must be refused; returns what the sentence names beside it."""
    state = random_state()
    good = {"format": "deltamem-memory", "format_version": "1", **METADATA}

    def save(tensors, metadata):
        path.write_bytes(safetensors.numpy.save(tensors, metadata))

    if kind == "missing":
        return []
    if kind == "folder":
        path.mkdir()
        return ["folder"]
    if kind == "truncated":
        write_memory_file(path, state, METADATA)
        path.write_bytes(path.read_bytes()[:-100])
        return []
    if kind == "empty":
        path.write_bytes(b"")
        return []
    if kind == "text":
        path.write_text("this is not a memory\n" * 20)
        return []
    if kind == "other safetensors":
        save({"weight": state}, {"format": "pt"})
        return []
    if kind == "another program's state":
        save({"state": state}, {**good, "format": "pt"})
        return []
    if kind == "no metadata":
        save({"state": state}, None)
        return []
    if kind == "newer version":
        save({"state": state}, {**good, "format_version": "2"})
        return [2, 1]
    if kind == "no state":
        save({"weight": state}, good)
        return ["state"]
    if kind == "half precision":
        save({"state": state.astype(np.float16)}, good)
        return ["F16"]
    if kind == "not square":
        save({"state": random_state(shape=(2, 1, 8, 4))}, good)
        return ["[2, 1, 8, 4]"]
    if kind == "empty state":
        save({"state": random_state(shape=(2, 1, 0, 0))}, good)
        return ["[2, 1, 0, 0]"]
    assert kind == "NaN"
    state[1, 0, 3, 3] = np.nan
    save({"state": state}, good)
    return ["state"]


BAD_FILES = [
    "missing", "folder", "truncated", "empty", "text", "other safetensors", "another program's state", "no metadata",
    "newer version", "no state", "half precision", "not square", "empty state", "NaN",
]  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path, kind):
    path = tmp_path / "bad.memory"
    with refuses(MemoryFileError, path, *bad_file(path, kind)):
        read_memory_file(path)


@pytest.mark.parametrize("kind", [kind for kind in BAD_FILES if kind not in ("missing", "folder")])
def test_the_content_of_a_bad_file(tmp_path, kind):
    """It is refused as the file is."""
    path = tmp_path / "bad.memory"
    names = bad_file(path, kind)
    with refuses(MemoryFileError, *names):
        MemorySnapshot.from_bytes(path.read_bytes())


def test_content_is_read_without_a_disk(tmp_path, monkeypatch):
    """Found: with a full disk, the server could not take a turn back, and not even show a session."""
    snapshot = MemorySnapshot(random_state(), {**METADATA, "tokens_written": "12"})
    snapshot.save(tmp_path / "a.memory")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    read = MemorySnapshot.from_bytes(snapshot.to_bytes())
    np.testing.assert_array_equal(read.state, snapshot.state)
    loaded = MemorySnapshot.load(tmp_path / "a.memory").metadata
    assert {**read.metadata, "created": "", "saved": ""} == {**loaded, "created": "", "saved": ""}


@posix
def test_a_pipe_is_no_damaged_file(tmp_path):
    path = tmp_path / "a.memory"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)
    os.write(pipe, MemorySnapshot(random_state(), METADATA).to_bytes())
    with refuses(MemoryFileError, path, "pipe"):
        read_memory_file(path)
    os.close(pipe)


def test_bad_files_are_told_apart(tmp_path):
    """Those of different kinds by different sentences."""
    said = {}
    for kind in BAD_FILES:
        path = tmp_path / f"{kind.replace(' ', '-')}.memory"
        bad_file(path, kind)
        with pytest.raises(MemoryFileError) as info:
            read_memory_file(path)
        said[kind] = re.sub(r"\(.*\)", "", str(info.value).replace(str(path), ""))  # what safetensors says
    assert said["truncated"] == said["empty"] == said["text"]
    assert said["other safetensors"] == said["no metadata"]
    assert len(set(said.values())) == len(BAD_FILES) - 4


@posix
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """Not taken for a damaged one. Root may read all: so the system's answer is given here."""
    path = tmp_path / "a.memory"
    write_memory_file(path, random_state(), METADATA)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with refuses(MemoryFileError, path, "Permission denied"):
        read_memory_file(path)


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_saving_keeps_the_permissions(tmp_path, mode):
    path = tmp_path / "a"
    snapshot = MemorySnapshot(random_state(), METADATA)
    for save in (snapshot.save, snapshot.to_json):
        save(path)
        path.chmod(mode)
        save(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        path.unlink()


@posix
def test_saving_keeps_owner_and_group(tmp_path):
    path = tmp_path / "a"
    is_root = os.getuid() == 0  # others give files to their own groups only
    owner, group = (1234, 5678) if is_root else (os.getuid(), [os.getgid(), *os.getgroups()][-1])
    write_memory_file(path, random_state(), METADATA)
    os.chown(path, owner, group)
    path.chmod(0o600)
    write_memory_file(path, random_state(1), METADATA)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (owner, group, 0o600)


@posix
def test_a_lock_that_another_user_left_is_named(tmp_path, monkeypatch):
    """Root may open all: so the system's answer is given here."""
    path, lock = tmp_path / "a.memory", tmp_path / ".a.memory.lock"
    lock.touch()
    open_file = os.open

    def refuse(name, flags, *args, **options):
        if name == lock and not flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return open_file(name, flags, *args, **options)

    monkeypatch.setattr("os.open", refuse)
    with refuses(MemoryFileError, path, lock, "Permission denied"):
        MemoryFileLock(path).acquire()


@posix
def test_nobody_reads_meanwhile_who_may_not_read_the_file(tmp_path):
    path = tmp_path / "a.memory"
    path.write_bytes(b"")
    path.chmod(0o600)
    with replacing(path, MEMORY) as temporary:
        temporary.write_bytes(b"a")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


# snapshots


def test_a_snapshot_goes_through_a_file(tmp_path):
    path = tmp_path / "a.memory"
    snapshot = MemorySnapshot(random_state(), {**METADATA, "tokens_written": "12", "base": "cd", "base_name": "b"})
    snapshot.save(path)
    read = MemorySnapshot.load(path)
    np.testing.assert_array_equal(read.state, snapshot.state)
    assert read.tokens_written == 12 and read.layers == [2, 5]
    assert {key: read.metadata[key] for key in snapshot.metadata} == snapshot.metadata
    read.save(path)
    again = MemorySnapshot.load(path)
    assert again.metadata["created"] == read.metadata["created"]
    assert re.match(r"20\d\d-\d\d-\d\dT.*\+00:00", again.metadata["saved"])


def test_a_snapshot_cannot_be_changed():
    state = random_state()
    snapshot = MemorySnapshot(state, METADATA)
    state[:] = 0
    assert snapshot.state.any()
    with pytest.raises(ValueError):  # numpy's
        snapshot.state[:] = 0


@pytest.mark.parametrize(
    ("state", "value"),
    [
        (np.zeros((2, 8, 8)), "(2, 8, 8)"),
        (np.zeros((2, 1, 8, 4)), "(2, 1, 8, 4)"),
        (np.zeros((0, 1, 8, 8)), "(0, 1, 8, 8)"),
        (np.full(SHAPE, np.nan), "NaN"),
        (np.full(SHAPE, -np.inf), "infinite"),
    ],
)
def test_a_bad_snapshot(state, value):
    with refuses(InputError, value):
        MemorySnapshot(state, METADATA)


@pytest.mark.parametrize("count", ["-3", "many", "1.5", "9" * 5000, "9" * 19, str(2**63 - 1)])
def test_odd_metadata(count):
    for layers in ("x,y", "7,y", "7", "7,8,9"):
        snapshot = MemorySnapshot(random_state(), {"layers": layers, "tokens_written": count})
        assert snapshot.layers == [0, 1] and snapshot.tokens_written == 0


def test_norms_and_singular_values():
    left, right = np.eye(8)[1], np.eye(8)[3]
    state = np.zeros((1, 2, 8, 8))
    state[0, 1] = 3 * np.outer(left, right) + 4 * np.outer(np.eye(8)[2], np.eye(8)[5])
    snapshot = MemorySnapshot(state, METADATA)
    np.testing.assert_allclose(snapshot.norms, [[0, 5]], atol=1e-6)
    np.testing.assert_allclose(snapshot.singular_values[0, 1], [4, 3, 0, 0, 0, 0, 0, 0], atol=1e-6)


def test_norms_of_a_state_whose_norm_is_no_float32():
    largest = np.finfo(np.float32).max
    snapshot = MemorySnapshot(np.full((1, 1, 8, 8), largest, dtype=np.float32), METADATA)
    np.testing.assert_allclose(snapshot.norms, [[8 * float(largest)]])
    np.testing.assert_allclose(snapshot.singular_values[0, 0, 0], 8 * float(largest))


def test_exports(tmp_path):
    metadata = {**METADATA, "file": "a key that numpy.savez has too"}
    snapshot = MemorySnapshot(random_state(), metadata)
    snapshot.to_npz(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["state"], snapshot.state)
        assert json.loads(str(arrays["metadata"])) == metadata
    snapshot.to_json(tmp_path / "a.json")
    exported = json.loads((tmp_path / "a.json").read_text())
    np.testing.assert_array_equal(np.array(exported["state"], dtype=np.float32), snapshot.state)
    assert exported["metadata"] == metadata
    with refuses(MemoryFileError, tmp_path / "no" / "a.json"):
        snapshot.to_json(tmp_path / "no" / "a.json")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npz"]


# the lock

HOLDER = """
import sys
from pydeltamem.formats.memory_lock import MemoryFileLock
lock = MemoryFileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds the lock of a.memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a.memory")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told(tmp_path, holder):
    path = tmp_path / "a.memory"
    with pytest.raises(MemoryFileInUse) as info:
        MemoryFileLock(path).acquire()
    assert str(info.value) == f"{path}: in use by process {holder.pid}: end it, or use another file"
    with MemoryFileLock(tmp_path / "b.memory"):
        pass
    holder.communicate(b"")
    with MemoryFileLock(path):
        pass
    assert os.listdir(tmp_path) == []


@posix
def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path) == [".a.memory.lock"]
    with MemoryFileLock(tmp_path / "a.memory"):
        assert (tmp_path / ".a.memory.lock").read_text().split() == [str(os.getpid())]
    assert os.listdir(tmp_path) == []


def test_the_second_in_one_process_is_told(tmp_path):
    path = tmp_path / "a.memory"
    (tmp_path / "link.memory").symlink_to(path)
    with MemoryFileLock(path) as lock:
        for name in ("a.memory", "link.memory"):
            with refuses(MemoryFileInUse, tmp_path / name, "this process"):
                MemoryFileLock(tmp_path / name).acquire()
        lock.acquire()  # it has it
    lock.release()
    with MemoryFileLock(path):
        pass


def test_who_released_it_holds_nothing(tmp_path):
    path = tmp_path / "a.memory"
    with MemoryFileLock(path) as lock:
        assert MemoryFileLock.is_held_here(path) and not MemoryFileLock.is_held_here(tmp_path / "b.memory")
    assert not MemoryFileLock.is_held_here(path), f"{lock} is still there, and others may take the file"


@posix
def test_a_lock_whose_file_was_removed_is_released(tmp_path):
    """Somebody tidied up."""
    with MemoryFileLock(tmp_path / "a.memory"):
        (tmp_path / ".a.memory.lock").unlink()
    with MemoryFileLock(tmp_path / "a.memory"):
        pass


def test_who_is_gone_holds_nothing(tmp_path):
    lock = MemoryFileLock(tmp_path / "a.memory")
    lock.acquire()
    del lock
    with MemoryFileLock(tmp_path / "a.memory"):
        pass


def test_a_file_that_another_process_keeps_is_not_saved_to(tmp_path, holder):
    path = tmp_path / "a.memory"
    snapshot = MemorySnapshot(random_state(), METADATA)
    for call in (lambda: snapshot.save(path), lambda: check_writable(path)):
        with refuses(MemoryFileInUse, path, f"process {holder.pid}"):
            call()
    assert not path.exists()
    holder.communicate(b"")
    snapshot.save(path)
    with MemoryFileLock(path):
        snapshot.save(path)  # the process that holds the lock may
        with refuses(MemoryFileInUse, path, "this process"):
            MemoryFileLock(path).acquire()
    assert os.listdir(tmp_path) == ["a.memory"]


def test_threads_save_to_one_file_in_turn(tmp_path):
    path, failed, barrier = tmp_path / "a.memory", [], threading.Barrier(4)
    snapshots = [MemorySnapshot(random_state(seed), METADATA) for seed in range(4)]

    def save(snapshot):
        barrier.wait()
        for _ in range(50):
            try:
                snapshot.save(path)
            except MemoryFileError as error:
                failed.append(error)

    threads = [threading.Thread(target=save, args=(snapshot,)) for snapshot in snapshots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    last = MemorySnapshot.load(path).state.tobytes()
    assert last in [snapshot.state.tobytes() for snapshot in snapshots]
    assert os.listdir(tmp_path) == ["a.memory"]


@posix
def test_a_file_is_saved_where_there_are_no_locks(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(0, "no locks here")

    monkeypatch.setattr("fcntl.flock", fail)
    check_writable(tmp_path / "a.memory")
    MemorySnapshot(random_state(), METADATA).save(tmp_path / "a.memory")
    MemorySnapshot.load(tmp_path / "a.memory")
    assert os.listdir(tmp_path) == ["a.memory"]


@posix
def test_a_pipe_is_written_to(tmp_path):
    """A device or a pipe stays what it is: /dev/null too."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(path)
    MemorySnapshot(random_state(), METADATA).save(path)
    (tmp_path / "a.memory").write_bytes(os.read(reader, 1 << 20))
    os.close(reader)
    np.testing.assert_array_equal(MemorySnapshot.load(tmp_path / "a.memory").state, random_state())
    assert path.is_fifo()
    with output(os.devnull, MEMORY_JSON) as write:
        write("{}")
    assert not Path(os.devnull).is_file() and sorted(os.listdir(tmp_path)) == ["a.memory", "pipe"]


def test_no_folder_no_lock(tmp_path):
    with refuses(MemoryFileError, tmp_path / "no" / "a.memory"):
        MemoryFileLock(tmp_path / "no" / "a.memory").acquire()


@posix
@pytest.mark.parametrize(("module", "call"), [("fcntl", "flock"), ("os", "write")])
def test_a_lock_that_cannot_be_had_is_not_in_use(tmp_path, monkeypatch, module, call):
    """A file system without locks, and a full one."""
    path = tmp_path / "a.memory"

    def fail(*args):
        raise OSError(0, "the reason")

    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{call}", fail)
        with pytest.raises(MemoryFileError) as info:
            MemoryFileLock(path).acquire()
    assert str(info.value) == f"{path}: the memory cannot be saved: the reason"
    assert os.listdir(tmp_path) == []
    with MemoryFileLock(path):
        pass


def planted(what, path):
    """Something that is no lock, where the lock of a.memory belongs; what it leads to, if anything."""
    lock, victim = path.with_name(".a.memory.lock"), path.with_name("victim")
    victim.write_bytes(b"precious")
    if what == "link":
        lock.symlink_to(victim)
    elif what == "link to nothing":
        lock.symlink_to(path.with_name("nothing"))
    elif what == "hard link":
        os.link(victim, lock)
    elif what == "file":
        lock.write_bytes(b"notes of 12 pages\n")
    elif what == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    return lock, victim


@posix
@pytest.mark.parametrize("what", ["link", "link to nothing", "hard link", "file", "pipe", "folder"])
@pytest.mark.parametrize("act", ["lock", "save", "check"])
def test_what_is_no_lock_is_left_alone(tmp_path, what, act):
    """A planted link would have emptied what it leads to."""
    path = tmp_path / "a.memory"
    lock, victim = planted(what, path)
    names, kept = sorted(os.listdir(tmp_path)), lock.lstat()
    snapshot = MemorySnapshot(random_state(), METADATA)
    acts = {
        "lock": MemoryFileLock(path).acquire,
        "save": lambda: snapshot.save(path),
        "check": lambda: check_writable(path),
    }
    with refuses(MemoryFileError, lock, path):
        acts[act]()
    assert sorted(os.listdir(tmp_path)) == names
    assert os.path.samestat(lock.lstat(), kept) and victim.read_bytes() == b"precious"
    if what == "file":
        assert lock.read_bytes() == b"notes of 12 pages\n"


def in_a_fork(act):
    """What a forked child returns, as text."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(into, act().encode())
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return said


def outcome(act):
    try:
        act()
    except MemoryFileInUse as error:
        return f"in use: {error}"
    return "done"


@posix
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    path = tmp_path / "a.memory"
    snapshot, other = MemorySnapshot(random_state(), METADATA), MemorySnapshot(random_state(1), METADATA)
    with MemoryFileLock(path) as lock:
        snapshot.save(path)
        for act in (lambda: other.save(path), lock.acquire, MemoryFileLock(path).acquire):
            said = in_a_fork(lambda act=act: outcome(act))
            assert said.startswith("in use") and f"process {os.getpid()}" in said
        assert in_a_fork(lambda: outcome(lock.release)) == "done"
        assert os.path.exists(tmp_path / ".a.memory.lock"), "the child let go of its parent's lock"
        with pytest.raises(MemoryFileInUse):
            MemoryFileLock(path).acquire()
        np.testing.assert_array_equal(MemorySnapshot.load(path).state, snapshot.state)
    assert os.listdir(tmp_path) == ["a.memory"]


@posix
def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_gone(tmp_path):
    code = (
        "import os, sys, time\n"
        "from pydeltamem.formats.memory_lock import MemoryFileLock\n"
        "lock = MemoryFileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "if os.fork():\n"
        "    os.kill(os.getpid(), 9)\n"
        "print('child', flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = tmp_path / "a.memory"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout.readline() == b"child\n"
    process.wait()
    with MemoryFileLock(path):
        pass
    process.stdin.close()
    process.stdout.read()


@posix
@pytest.mark.parametrize("act", ["lock", "save"])
def test_a_full_disk_leaves_no_lock(tmp_path, act):
    """Files that may hold nothing are as a disk that is full."""
    code = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from pydeltamem import MemoryFileError, MemorySnapshot\n"
        "from pydeltamem.formats.memory_lock import MemoryFileLock\n"
        "snapshot = MemorySnapshot(np.ones((1, 1, 8, 8)), {'layers': '0'})\n"
        "act = MemoryFileLock(sys.argv[1]).acquire if sys.argv[2] == 'lock' else lambda: snapshot.save(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n"
        "    act()\n"
        "except MemoryFileError as error:\n"
        "    assert sys.argv[1] in str(error), error\n"
        "else:\n"
        "    raise SystemExit('nothing was raised')\n"
    )
    path = tmp_path / "a.memory"
    subprocess.run([sys.executable, "-c", code, str(path), act], check=True)
    assert os.listdir(tmp_path) == []


@posix
def test_many_processes_hold_it_in_turn(tmp_path):
    """The file that one removes is never the one that another has locked."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    code = (
        "import sys, time\n"
        "from pydeltamem.errors import MemoryFileError\n"
        "from pydeltamem.formats.memory_lock import MemoryFileLock\n"
        "for _ in range(100):\n"
        "    while True:\n"
        "        try:\n"
        "            with MemoryFileLock(sys.argv[1]):\n"
        "                n = int(open(sys.argv[2]).read())\n"
        "                open(sys.argv[2], 'w').write(str(n + 1))\n"
        "            break\n"
        "        except MemoryFileError:\n"
        "            time.sleep(0.0005)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.memory"), str(counter)]
    processes = [subprocess.Popen(arguments) for _ in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    assert counter.read_text() == "400"


# killed while saving


@posix
def test_killed_while_saving(make_llm, tmp_path):
    """Whenever a process is killed whose conversation saves its memory, the file holds the one state or the other."""
    path, llm = tmp_path / "a.memory", make_llm()
    states = [random_state(seed, llm.memory.shape) for seed in (0, 1)]

    def save(conversation, i):
        conversation.memory.state = states[i % 2]
        conversation.save()

    with Conversation(llm, memory_file=path) as conversation:
        start = time.perf_counter()
        for i in range(10):
            save(conversation, i)
        duration = (time.perf_counter() - start) / 10
    adapter = llm.memory.copy().metadata["adapter"]

    chance = random.Random(0)
    found, n_leftovers = [0, 0], 0
    for _ in range(N_KILLED):
        begun, begins = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                conversation = Conversation(llm, memory_file=path)
                os.write(begins, b"!")
                for i in itertools.count():
                    save(conversation, i)
            finally:
                os._exit(1)
        os.read(begun, 1)
        os.close(begun), os.close(begins)
        time.sleep(chance.uniform(0, 5 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        state, metadata = read_memory_file(path)
        same = [np.array_equal(state, expected) for expected in states]
        assert any(same), "neither the state before nor the one after"
        found[same.index(True)] += 1
        assert metadata["adapter"] == adapter
        n_leftovers += bool(leftovers(path))
    assert min(found) > 0 and n_leftovers > 0, "no process was killed in the middle"
    with MemoryFileLock(path):
        assert leftovers(path) == []
    assert os.listdir(tmp_path) == ["a.memory"]


def test_leftovers_of_other_files_stay(tmp_path):
    write_memory_file(tmp_path / "a.memory", random_state(), METADATA)
    others = [".b.memory.01234567.tmp", ".a.memory.tmp", ".a.memory.x.01234567.tmp"]
    for name in [*others, ".a.memory.01234567.tmp"]:
        (tmp_path / name).write_bytes(safetensors.numpy.save({"x": np.zeros(1)}))
    with MemoryFileLock(tmp_path / "a.memory"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "a.memory"])
