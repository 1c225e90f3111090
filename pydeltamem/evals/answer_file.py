"""The file of a run (run.py): JSON lines with its setup, the answers, and each text before the first answer that it
is shown for. A run appends to it; a report (results.py) reads it, perhaps one of an earlier release.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError
from ..formats.lock import take_lock
from .items import DAMAGED, why

# of a setup: what several machines may differ in. It decides rounding, after which a greedy answer may be another one
OF_MACHINE = ("processor", "gpu_layers")


class AnswerFile:
    """The file of a run that is going on.

    Opening it takes away what a killed run left of an unfinished unit, and the setup of a run that failed before it had
    an answer. It is locked until it is closed, where there are locks of files: two runs would write every answer twice.

    Args:
        setup: of the run, as values that JSON can hold.
        units: the method and the id of each answer, in the order of the run, by unit.

    Attributes:
        n_done: units whose answers the file has.
        texts: names of the texts that it has.

    Raises InputError if it holds another run, or if another process writes it, and OutputError if it cannot be written.
    """

    def __init__(self, path: Path, setup: Mapping[str, Any], units: Sequence[Sequence[tuple[str, str]]]):
        self.path, self.n_done, self.texts, self._n_bytes = path, 0, set[str](), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise self._unwritable(error.strerror) from error
        try:
            self._lock()
            self._file.seek(0)
            data = self._file.read()
            first, end, rest = data.partition(b"\n")
            if end and (rest or not isinstance(_record_of(first).get("setup"), dict)):
                self._require_same_run(_record_of(first), setup)
                self._n_bytes = len(first) + 1
                self._find_end(rest.splitlines(keepends=True), units)
            elif not end and not _encoded({"setup": setup}).startswith(first):  # killed while it wrote its setup
                self._require_same_run({}, setup)
            self._file.truncate(self._n_bytes)
            if self._n_bytes == 0:
                self.add([{"setup": setup}])
        except BaseException:
            self.close()
            raise

    def _unwritable(self, why: str | None) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {why}")

    def _lock(self) -> None:
        """The system releases it with the file, also when it kills the process."""
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a file system without locks
                if not take_lock(self._file.fileno()):
                    raise InputError(
                        f"{self.path}: another process writes it: wait for its end, or name another folder by --output"
                    )

    def close(self) -> None:
        self._file.close()

    def _require_same_run(self, found: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
        """Raises InputError if the file begins otherwise than this run does."""
        before, now = found.get("setup"), json.loads(json.dumps(setup))
        if not isinstance(before, dict):
            raise InputError(f"{self.path}: is no file of deltamem eval: name another folder by --output")
        if "version" not in before:
            raise InputError(f"{self.path}: holds a run of an earlier version: name another folder by --output")
        for name in {**before, **now}:
            if name in OF_MACHINE and name not in before:  # begun before that was written down
                continue
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{self.path}: holds a run with {name} {before.get(name)}, not {now.get(name)}: "
                    "name another folder by --output"
                )

    def _find_end(self, lines: Sequence[bytes], units: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Counts the complete units, the texts they show, and the bytes up to the end of the last one."""
        at, texts, given = self._n_bytes, set[str](), list[tuple[Any, Any]]()
        for line in lines:
            record = _record_of(line) if line.endswith(b"\n") else {}
            at += len(line)
            if "text" in record and isinstance(record.get("context"), str):
                texts.add(record["context"])
            elif "answer" in record:
                given.append((record.get("method"), record.get("id")))
            else:
                return
            if self.n_done < len(units) and given == list(units[self.n_done]):
                self.n_done, self._n_bytes, given = self.n_done + 1, at, []
                self.texts |= texts

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends lines, and has them on disk when it returns."""
        lines = memoryview(b"".join(map(_encoded, records)))
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise self._unwritable("somebody removed it")
        except OSError as error:
            raise self._unwritable(error.strerror) from error


def _encoded(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _record_of(line: bytes) -> dict[str, Any]:
    """What a line holds; empty if that is no JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


#
# for reports
#


def read_answers(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setup and the answers of a file, without a last line that a run has not finished. Raises InputError."""
    try:
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        setup = dict(_checked_line(first)["setup"])
        _check_setup(setup)
        records = [record for record in map(_checked_line, lines) if "answer" in record]
        for record in records:
            _check_answer(record)
            if record["scores"].keys() != records[0]["scores"].keys():
                raise ValueError("other scores")
    except (OSError, *DAMAGED) as error:
        raise InputError(f"{path}: is no file of deltamem eval: {why(error)}") from error
    return setup, records


def _checked_line(text: str) -> Any:
    """What a line holds. Raises ValueError, also if a report could not be written: for halves of characters, and
    numbers that JSON does not have.
    """
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _check_setup(setup: Mapping[str, Any]) -> None:
    """Raises TypeError or KeyError if what a report reads of it has other types. Much of it may be missing."""
    of_types: tuple[tuple[type, tuple[Any, ...]], ...] = (
        (str, (setup["benchmark"], setup["model"])),
        (int, (setup.get("questions", 0),)),
        (list, tuple(setup.get(name) or [] for name in ("methods", "cache", "processor"))),
        (dict, tuple(setup.get(name) or {} for name in ("adapters", "sha256"))),
    )
    for type_, values in of_types:
        if not all(isinstance(value, type_) for value in values):
            raise TypeError("other types")
    digests = dict(setup.get("sha256") or {})
    inner = {**(setup.get("adapters") or {}), **(digests.pop("adapters", None) or {}), **digests}
    listed = [text for name in ("methods", "cache", "processor") for text in setup.get(name) or ()]
    if not all(text is None or isinstance(text, str) for text in (*listed, *inner.values())):
        raise TypeError("other types")
    for name in ("version", "shard", "kinds", "limit", "seed", "n_ctx", "flash_attn", "unpack", "window", "lora",
                 "answer_writes", "rehearse", "defer_replies", "load_memory"):  # fmt: skip
        hash(setup.get(name))


def _check_answer(record: Mapping[str, Any]) -> None:
    """Raises TypeError, KeyError or ValueError if an answer lacks something, or has another type or value of it."""
    texts = [record[name] for name in ("benchmark", "method", "id", "kind")]
    if record["about"] is not None:
        texts.append(record["about"])
    scores = [score if isinstance(score, list) else [score] for score in record["scores"].values()]
    values = [value for score in scores for value in score]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(v, (int, float)) for v in values):
        raise TypeError("other types")
    if not (scores and all(scores)) or not all(0 <= value <= 1 for value in values):
        raise ValueError("no score, or one that is not from 0 to 1")
