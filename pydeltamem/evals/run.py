"""Asks the items of a benchmark by several methods, and writes a JSON line for every answer.

The work is cut into units: questions that are asked together. What is in a unit follows from the setup alone, and no
unit depends on what was asked before, so a run that was killed goes on where it stopped and ends with the same file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import views
from .answer_file import AnswerFile
from .asker import MARGIN, Ask, Asker, Shared
from .items import Benchmark, Context, Item, digest

PLAIN = {
    "none": views.NONE, "backbone": views.FULL, "last": views.LAST, "bm25": views.BM25, "dense": views.DENSE,
    "summary": views.SUMMARY,
}  # fmt: skip
LORA = "lora"
PROTOCOLS = ("context", "memory")
WAVES = 4  # about as many questions without a text before them are asked together, for each slot
BESIDE = ("last", "bm25", "dense", "summary")  # text that a memory may have besides: NAME/memory+bm25


@dataclass(frozen=True)
class Method:
    """What a model has when it is asked.

    Attributes:
        name: in tables.
        view: what it sees of the context: VIEWS of views.py.
        adapter: its file; None: no memory.
        reads: protocol `memory`: all that fits was decoded, and that text is gone.
        writes: whether question and answer write the memory.
        rehearses: protocol `memory`: that text was decoded and written twice.
        lora: whether it has the LoRA adapter.
    """

    name: str
    view: str
    adapter: str | None = None
    reads: bool = False
    writes: bool = True
    rehearses: bool = False
    lora: bool = False


def methods_of(
    adapters: Mapping[str, str],
    protocols: Sequence[str],
    writes: Mapping[str, bool],
    lora: bool,
    only: Sequence[str] | None,
    has_contexts: bool,
    rehearses: bool = False,
) -> list[Method]:
    """The methods of a run. Raises InputError if there is no such method.

    Args:
        writes: by protocol, whether question and answer write.
        rehearses: whether what a memory is asked about without the text is decoded and written twice.
        only: names of the methods; None: those that need no other package and no summary.
    """
    known = {name: Method(name, view) for name, view in PLAIN.items()}
    if lora:
        known[LORA] = Method(LORA, views.FULL, lora=True)
    usual = ["none", "backbone", "last", "bm25", *([LORA] if lora else ())]
    for name, file in adapters.items():
        for protocol in protocols:
            reads = protocol == "memory"
            method = f"{name}/{protocol}"
            twice = reads and rehearses
            usual.append(method)
            known[method] = Method(method, views.NONE if reads else views.FULL, file, reads, writes[protocol], twice)
            for view in BESIDE if reads else ():
                known[f"{method}+{view}"] = Method(f"{method}+{view}", view, file, reads, writes[protocol], twice)
    names = list(dict.fromkeys(only or usual))
    for name in names:
        if name not in known:
            raise InputError(f"--methods: there is no method {name} here: {', '.join(known)}")
    found = [known[name] for name in names]
    if not has_contexts:  # a question by itself: all views are alike
        found = [method for method in found if method.view == views.FULL]
        if not found:
            raise InputError("--methods: this benchmark has no contexts: name backbone, lora or NAME/context")
    return found


@dataclass(frozen=True)
class Unit:
    """Questions that are asked together by one method."""

    method: Method
    items: tuple[Item, ...]


def units_of(items: Sequence[Item], methods: Sequence[Method], parallel: int) -> Iterator[Unit]:
    """The work of a run, in order. Questions that need no text before them are more than fit at once: where an answer
    ends, the next question begins, so that a long answer is not waited for alone. Their units are of one size, since a
    last one of few questions would leave most slots empty.
    """
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(item.id if item.context is None else id(item.context), []).append(item)
    for method in methods:
        shares = method.reads or method.view in (views.FULL, views.LAST, views.SUMMARY)
        alone: list[Item] = []
        for group in groups.values():
            if shares and len(group) > 1:
                step = max(1, parallel - 1)  # the shared text has a slot too
                yield from (Unit(method, tuple(group[i : i + step])) for i in range(0, len(group), step))
            else:
                alone += group
        reads_nothing = not method.reads and (method.view == views.NONE or all(item.context is None for item in alone))
        step = parallel
        if reads_nothing:
            step = math.ceil(len(alone) / max(1, round(len(alone) / (WAVES * parallel)))) or 1
        yield from (Unit(method, tuple(alone[i : i + step])) for i in range(0, len(alone), step))


class Prompts:
    """The prompts of a benchmark for one model.

    Args:
        items: the longest question of these decides how much of a context is shown.
        window: tokens of a context that searches, last turns and summaries may show.
        seed: of sampled answers.
    """

    def __init__(self, benchmark: Benchmark, items: Sequence[Item], asker: Asker, window: int, seed: int):
        self.benchmark, self.asker, self.window, self.seed = benchmark, asker, window, seed
        self._clipped: dict[int, Context] = {}
        self._summaries: dict[int, str] = {}
        longest = max((asker.n_prompt(self._question(item)) for item in items), default=0)
        begins = max(({item.context.title for item in items if item.context}), key=len, default="")
        self.room = asker.n_ctx - benchmark.n_predict - longest - asker.count(benchmark.opening + begins) - MARGIN
        if self.room < 1:
            raise InputError(
                f"-c {asker.n_ctx}: a question of {longest} tokens and an answer of {benchmark.n_predict} of"
                f" {benchmark.name} do not fit into the context: raise it"
            )

    def _question(self, item: Item) -> str:
        title = item.context.title if item.context else ""
        return "\n\n".join(filter(None, (self.benchmark.task.replace("{title}", title), item.question)))

    def _under(self, title: str, shown: str) -> str:
        return f"{self.benchmark.opening.replace('{title}', title)}\n\n{shown}\n\n" if shown else ""

    def clipped(self, context: Context) -> Context:
        """What fits of a context beside question and answer."""
        if id(context) not in self._clipped:
            b, room = self.benchmark, self.room
            while True:
                found = views.clipped(context, b.clip, room, self.asker.count, b.max_characters)
                over = self.asker.count(found.shown()) - self.room
                if over <= 0 or room <= 1:
                    break
                room = max(1, room - over)
            self._clipped[id(context)] = found
        return self._clipped[id(context)]

    def shown(self, item: Item, view: str) -> str:
        """What a view shows of an item's context."""
        context, count = item.context, self.asker.count
        if context is None or view == views.NONE:
            return ""
        if view == views.FULL:
            return self.clipped(context).shown()
        if view == views.SUMMARY:
            return self._summaries[id(context)]
        window = min(self.window, self.room)
        if view == views.LAST:
            return context.shown(views.last_pieces(context, window, count))
        return context.shown(views.found_pieces(context, item.query or item.question, window, count, view))

    def lacks_summary(self, items: Iterable[Item]) -> bool:
        """Whether a context of these items has no summary yet."""
        return any(item.context is not None and id(item.context) not in self._summaries for item in items)

    def summarise(self, items: Iterable[Item]) -> None:
        """Has the model write a summary of each context that has none. Raises InputError if a piece of one does not
        fit beside two summaries."""
        for item in items:
            if item.context is not None and self.lacks_summary([item]):
                clipped, count = self.clipped(item.context), self.asker.count
                request = self.asker.n_prompt(views.summary_request(clipped.title, "x", ""))
                room = self.asker.n_ctx - 2 * self.window - request - MARGIN
                if room < max(views.lengths(clipped.pieces, count), default=0):
                    raise InputError(
                        f"-c {self.asker.n_ctx}: two summaries of --window {self.window} tokens and a part of"
                        f" {clipped.title} do not fit into the context: raise it, or lower --window"
                    )
                found = views.summary(clipped, self.window, count, self.asker.say, min(views.PART, room))
                self._summaries[id(item.context)] = found

    def ask(self, item: Item, method: Method) -> Ask:
        """An item's question by a method. Raises KeyError if it shows a summary that was not written."""
        title = item.context.title if item.context else ""
        visible = self._under(title, self.shown(item, method.view))
        options = {"n_predict": self.benchmark.n_predict, **self.benchmark.sampling(item.index, self.seed)}
        if method.reads:
            read = self._under(title, self.shown(item, views.FULL))
            return Ask(Shared(read, True, method.writes, method.rehearses), visible + self._question(item), options)
        return Ask(Shared(visible, writes=method.writes), self._question(item), options)


def run(
    benchmark: Benchmark,
    items: Sequence[Item],
    methods: Sequence[Method],
    open_model: Callable[[bool], Asker],
    path: Path,
    setup: Mapping[str, Any],
    *,
    every: Sequence[Item] = (),
    window: int,
    seed: int,
    parallel: int,
    progress: Callable[[int, int], object] = lambda n, total: None,
) -> None:
    """Asks every item by every method, and goes on with the file where an earlier run stopped.

    Args:
        open_model: opens the model, with or without the LoRA adapter.
        every: all questions of the benchmark, so that contexts are shown alike whichever of them are asked.
        progress: called with the answers so far, and all.
    """
    units = list(units_of(items, methods, parallel))
    file = AnswerFile(path, setup, [[(unit.method.name, item.id) for item in unit.items] for unit in units])
    total, done = sum(len(unit.items) for unit in units), sum(len(unit.items) for unit in units[: file.n_done])
    asker: Asker | None = None
    latest: Method | None = None
    try:
        progress(done, total)
        for unit in units[file.n_done :]:
            if asker is None or latest is None or latest.lora != unit.method.lora:
                if asker is not None:
                    asker.close()
                asker = open_model(unit.method.lora)
                prompts = Prompts(benchmark, [item for item in every if item.context] or items, asker, window, seed)
                latest = None
            if unit.method.view == views.SUMMARY and prompts.lacks_summary(unit.items):
                asker.attach(None)  # the plain model writes them
                prompts.summarise(unit.items)
                latest = None
            if latest is None or latest.adapter != unit.method.adapter:
                asker.attach(unit.method.adapter)
            latest = unit.method
            asked = [prompts.ask(item, unit.method) for item in unit.items]
            answers = asker.answer(asked)
            file.add(_records(benchmark, unit, asked, answers, file.texts))
            done += len(unit.items)
            progress(done, total)
    finally:
        file.close()
        if asker is not None:
            asker.close()


def _records(
    benchmark: Benchmark, unit: Unit, asked: Sequence[Ask], answers: Sequence[str], texts: set[str]
) -> Iterator[dict[str, Any]]:
    for item, ask, answer in zip(unit.items, asked, answers):
        name = digest(ask.shared.text) if ask.shared.text else None
        if name is not None and name not in texts:
            texts.add(name)
            yield {"context": name, "text": ask.shared.text}
        yield {
            "benchmark": benchmark.name,
            "id": item.id,
            "kind": item.kind,
            "about": None if item.context is None else digest(item.context.shown()),
            "method": unit.method.name,
            "context": name,
            "is_dropped": ask.shared.is_dropped,
            "question": ask.text,
            "rights": list(item.answers),
            "answer": answer,
            "scores": benchmark.score(item, answer),
        }
