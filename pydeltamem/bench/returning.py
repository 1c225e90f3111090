"""`deltamem bench --return`: how soon a conversation goes on after a break, and what must be on the disk for it.

Somebody comes back to a conversation of N tokens and says something. What is restored until then:

    memory         the memory file; the text is gone
    memory+window  the memory file, and the last tokens of the text, which are decoded again without writing
    state          what `save_state` returned, pickled: memory and KV cache
    text           nothing: the whole text is decoded again

Timed is all from opening the files to the first token of the reply.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from ..formats.disk_errors import disk_errors
from ..llama import DeltaMemLlama
from ..runtime.cpus import cpu_name
from .pairs import median_interval

MEMORY, WINDOW, STATE, TEXT = "memory", "memory+window", "state", "text"
N_WINDOW, N_SAID = 256, 16  # tokens of the window, and of what is said next
TOKEN_BYTES = 4  # on the disk

# Called with what runs, how many runs are done, and how many there are.
Progress = Callable[[str, int, int], None]


def run(
    load: Callable[[int], DeltaMemLlama],
    lengths: Sequence[int],
    n_rounds: int,
    n_texts: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Returns what `--json` writes as `return`.

    Args:
        load: loads the model with its adapter, in a context of at least so many tokens.
        lengths: of the conversations, in tokens.
        n_rounds: of which each method but `text` runs once, in alternating order.
        n_texts: how often the whole text is read.

    Raises AdapterError without an adapter, OutputError if there is no room for the files, and as `DeltaMemLlama`.
    """
    report: dict[str, Any] = {"cpu": cpu_name(), "window": N_WINDOW, "said": N_SAID, "runs": []}
    total = len(lengths) * (n_texts + n_rounds + 1)
    for i, n in enumerate(lengths):

        def advance(done: int, what: str = f"{n} tokens", begun: int = i * (n_texts + n_rounds + 1)) -> None:
            progress(what, begun + done, total)

        with load(n + N_SAID + 1) as llm, tempfile.TemporaryDirectory() as folder, disk_errors(folder):
            report["runs"].append(_Return(llm, n, Path(folder), advance).measure(n_rounds, n_texts))
    return report


class _Return:
    """Comes back to one conversation."""

    def __init__(self, llm: DeltaMemLlama, n: int, folder: Path, advance: Callable[[int], None]) -> None:
        self.llm, self.advance = llm, advance
        choice = random.Random(0)
        self.history = [choice.randrange(llm.n_vocab()) for _ in range(n)]
        self.said = [choice.randrange(llm.n_vocab()) for _ in range(N_SAID)]
        self.memory_file, self.state_file = folder / "memory", folder / "state"
        self.ways = {MEMORY: self._memory, WINDOW: self._window, STATE: self._state}

    def measure(self, n_rounds: int, n_texts: int) -> dict[str, Any]:
        times: dict[str, list[float]] = {TEXT: []}
        for i in range(n_texts):
            self.advance(i)
            times[TEXT].append(self._text(save=i == 0))
        times.update({way: [] for way in self.ways})
        for i in range(n_rounds + 1):  # the first is not counted
            self.advance(n_texts + i)
            for way in reversed(self.ways) if i % 2 else self.ways:
                seconds = self._timed(self.ways[way])
                if i:
                    times[way].append(seconds)
        n_bytes = {MEMORY: self.memory_file.stat().st_size, STATE: self.state_file.stat().st_size}
        n_bytes[WINDOW] = n_bytes[MEMORY] + TOKEN_BYTES * min(N_WINDOW, len(self.history))
        n_bytes[TEXT] = TOKEN_BYTES * len(self.history)
        found: dict[str, Any] = {"history": len(self.history), "ways": {}}
        for way in (MEMORY, WINDOW, STATE, TEXT):
            low, high, confidence = median_interval(times[way])
            found["ways"][way] = {
                "seconds": median(times[way]), "low": low, "high": high, "confidence": confidence,
                "bytes": n_bytes[way], "times": times[way],
            }  # fmt: skip
        return found

    def _timed(self, come_back: Callable[[], None]) -> float:
        self.llm.reset()
        self.llm.memory.reset()
        self.llm.memory.write = True
        _from_the_disk(self.memory_file)
        _from_the_disk(self.state_file)
        begin = perf_counter()
        come_back()
        return perf_counter() - begin

    def _text(self, save: bool) -> float:
        """Reads all of it. The files are written between its last token and what is said next; that is not timed."""
        self.llm.reset()
        self.llm.memory.reset()
        begin = perf_counter()
        self.llm.eval(self.history)
        seconds = perf_counter() - begin
        if save:
            self.llm.memory.save(self.memory_file)
            with open(self.state_file, "wb") as file:
                pickle.dump(self.llm.save_state(), file, pickle.HIGHEST_PROTOCOL)
                file.flush()
                os.fsync(file.fileno())
        begin = perf_counter()
        self._answer(self.history)
        return seconds + perf_counter() - begin

    def _memory(self) -> None:
        self.llm.memory.load(self.memory_file)
        self._answer([])

    def _window(self) -> None:
        self.llm.memory.load(self.memory_file)
        self.llm.memory.write = False
        self.llm.eval(self.history[-N_WINDOW:])
        self.llm.memory.write = True
        self._answer(self.history[-N_WINDOW:])

    def _state(self) -> None:
        with open(self.state_file, "rb") as file:
            self.llm.load_state(pickle.load(file))
        self._answer(self.history)

    def _answer(self, before: list[int]) -> None:
        """Decodes what is said after this text, which is there, and takes the first token of the reply."""
        reply = self.llm.generate([*before, *self.said], temp=0.0)
        next(reply)
        reply.close()


def _from_the_disk(path: Path) -> None:
    """Has the system read a file from the disk the next time, where it can be told to."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sooner(run: dict[str, Any], way: str) -> float:
    """How many times as soon as by reading the whole text."""
    ways = run["ways"]
    return ways[TEXT]["seconds"] / ways[way]["seconds"]


def picture(report: dict[str, Any], figure_of: Any) -> bytes:
    """A PNG: seconds to the first token, and bytes on the disk, by the length of the conversation.

    figure_of: matplotlib's Figure.
    """
    figure = figure_of(figsize=(9, 4), layout="constrained")
    seconds, size = figure.subplots(1, 2)
    lengths = [run["history"] for run in report["runs"]]
    names = {MEMORY: "memory", WINDOW: f"memory and {report['window']} tokens", STATE: "saved KV cache", TEXT: "text"}
    for way, name in names.items():
        found = [run["ways"][way] for run in report["runs"]]
        y = [one["seconds"] for one in found]
        errors = [[one["seconds"] - one["low"] for one in found], [one["high"] - one["seconds"] for one in found]]
        seconds.errorbar(lengths, y, errors, label=name, marker="o", markersize=3, capsize=2)
        size.plot(lengths, [one["bytes"] for one in found], label=name, marker="o", markersize=3)
    seconds.set(ylabel="seconds to the first token")
    size.set(ylabel="bytes on the disk")
    for axes in (seconds, size):
        axes.set(xscale="log", yscale="log", xlabel="tokens of history")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    seconds.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    return image.getvalue()
