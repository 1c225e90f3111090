"""`deltamem eval recall`: what a model with a memory still knows once the text is gone, beside other ways to remember.

Every question is asked of the same conversation in the same words. What differs is what the model has before it:

    none      nothing                           window    the last turns that fit into the window
    bm25      the turns that a search finds     full      the whole text
    tsw, …    its memory                        tsw+window, …    its memory and the last turns

All but the memories are the same frozen model with an empty memory that is not written. Facts, pairings and phrasings
are those that no memory was trained on (world.py).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..cli.parser import count, integers, positive
from ..errors import InputError, ModelError
from ..formats.kinds import PNG, json_of
from ..formats.outputs import output
from ..runtime.cpus import usable
from .world import FACTS, Fact, Part, Turn, World, is_recalled

if TYPE_CHECKING:
    from rich.console import Console

    from ..llama import DeltaMemLlama

REPORT = json_of("a report of deltamem eval", {"setup", "rows", "ratios"})
MAX_ANSWER = 16  # tokens
MAX_QUESTION = 64  # tokens, and its answer
CONFIDENCE = 1.96  # standard deviations of the interval of an accuracy

# What each task asks for: see Case
TASKS = ("recall", "overwrite", "distance", "new_values", "visible", "knowledge")
MEMORY_HEAVY = ("recall", "overwrite", "distance")  # what is asked for may have left the window
NO_MEMORY = ("visible", "knowledge")

PLAIN = ("none", "window", "bm25", "full")  # methods without a memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    summary = "facts that were told before the text was thrown away"
    recall = what.add_parser("recall", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    recall.add_argument("-m", "--model", metavar="FILE", help="model GGUF or a name (the model of the package)")
    recall.add_argument(
        "--memories", metavar="NAME=FILE", nargs="+", help="adapters, each under the name that the table gives it"
    )
    recall.add_argument("-n", type=positive, default=200, metavar="N", help="questions of each kind (%(default)s)")
    recall.add_argument(
        "--facts", type=integers, default=[1, 2, 4, 8, 16], metavar="N,...", help="facts told (1,2,4,8,16)"
    )
    recall.add_argument(
        "--distance", type=integers, default=[64, 128, 256], metavar="N,...",
        help="tokens of small talk after four facts (64,128,256)",
    )  # fmt: skip
    recall.add_argument("--window", type=positive, default=64, metavar="N", help="tokens of a window (%(default)s)")
    recall.add_argument("--tasks", default=",".join(TASKS), help="(%(default)s)")
    recall.add_argument("--methods", metavar="NAME,...", help="only these")
    recall.add_argument("--seed", type=count, default=1, help="(%(default)s)")
    recall.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (half the CPUs)")
    recall.add_argument("--json", metavar="FILE", help="write the rows and the ratios")
    recall.add_argument("--plot", metavar="FILE.png", help="draw accuracy by facts and by distance (needs matplotlib)")
    recall.add_argument("--show", type=count, default=0, metavar="N", help="print N conversations with each answer")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..models import default_files

    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError(f"--tasks: there is no task {unknown[0]}: {', '.join(TASKS)}")
    model, memories = args.model, dict(item.partition("=")[::2] for item in args.memories or ())
    if model is None:
        model, shipped = default_files()
        memories = memories or {name: os.fspath(path) for name, path in shipped.items()}
    if not memories or not all(memories.values()):
        raise InputError("--memories: name the adapters of -m MODEL, as in --memories tsw=memory.gguf")
    taken = {name for name in memories if name in PLAIN or "+" in name}
    if taken or len(memories) < len(args.memories or memories):
        raise InputError(f"--memories: two methods would be called {min(taken, default=min(memories))}")
    most = len(FACTS["new_pair"])
    if not 1 <= min(args.facts) <= max(args.facts) <= most:
        raise InputError(f"--facts: the world holds 1 to {most} facts of one person")
    methods = args.methods.split(",") if args.methods else None
    if methods is None or "bm25" in methods:
        _bm25s()
    if args.plot:
        _matplotlib()
    console = Console(stderr=True)
    with output(args.json, REPORT) as write, output(args.plot, PNG) as write_plot:
        readers = {name: NativeReader(model, path, args.threads) for name, path in memories.items()}
        plain = next(iter(readers.values()))
        cases = list(make_cases(tasks, args.n, args.facts, args.distance, args.seed, plain))
        longest = max(plain.n_tokens(case.turns) for case in cases)
        if longest + MAX_QUESTION > plain.llm.n_ctx():
            raise InputError(
                f"--distance, --facts: a conversation of {longest} tokens and a question do not fit into the"
                f" {plain.llm.n_ctx()} that {model} reads: take less"
            )
        answers = answer_all(cases, readers, args.window, console, methods)
        rows = table_of(cases, answers)
        ratios = ratios_of(rows, list(readers))
        _print(Console(width=None if sys.stdout.isatty() else 160), rows, ratios)
        for i in range(min(args.show, len(cases))):
            _show(cases[i], {method: given[i] for method, given in answers.items()})
        setup = {"model": os.path.basename(os.fspath(model)), "n": args.n, "window": args.window, "seed": args.seed}
        results = {"setup": setup, "rows": [asdict(row) for row in rows], "ratios": ratios}
        write(json.dumps(results, indent=1) + "\n")
        if args.plot:
            write_plot(plot(rows))
    return 0


#
# the conversations
#


@dataclass(frozen=True)
class Case:
    """One question.

    recall: any of several facts. overwrite: one that replaced another. distance: behind small talk. new_values: values
    that no memory was trained on. visible: told in the last turn, so that a window shows it. knowledge: what the model
    knows by itself.
    """

    task: str
    facts: int
    distance: int
    turns: tuple[Turn, ...]
    question: str
    fact: Fact | None  # None: `answer` must come
    answer: str = ""

    def is_right(self, answer: str) -> bool:
        return is_recalled(answer, self.fact) if self.fact else self.answer in re.findall(r"\w+", answer)


def make_cases(
    tasks: Sequence[str],
    n: int,
    facts: Sequence[int],
    distances: Sequence[int],
    seed: int,
    reader: Reader,
) -> Iterator[Case]:
    for task in tasks:
        part: Part = "new_value" if task == "new_values" else "new_pair"
        world = World(1_000 * seed + TASKS.index(task), part, phrasings="new")
        sizes = {"recall": facts, "new_values": (1, 4), "distance": distances}.get(task, (4,))
        for size in sizes:
            n_fact = 4 if task == "distance" else size
            for _ in range(n):
                told = world.facts(n_fact)
                while task == "overwrite" and not any(map(world.others, told)):
                    told = world.facts(n_fact)
                turns = [world.tell(fact) for fact in told]
                asked = world.random.choice(
                    [i for i, fact in enumerate(told) if task != "overwrite" or world.others(fact)]
                )
                if task == "overwrite":
                    told[asked] = world.another(told[asked])
                    turns.append(world.update(told[asked]))
                    place = world.random.randint(asked + 1, len(turns) - 1)
                    turns.insert(place, turns.pop())
                elif task == "visible":
                    turns.append(turns.pop(asked))
                while task == "distance" and reader.n_tokens(turns[n_fact:]) < size:
                    turns.append(world.chatter())
                distance = size if task == "distance" else 0
                if task == "knowledge":
                    question, answer = world.knowledge()
                    word = answer.removeprefix("That is ").rstrip(".")
                    yield Case(task, n_fact, distance, tuple(turns), question, None, word)
                else:
                    yield Case(task, n_fact, distance, tuple(turns), world.ask(told[asked])[0], told[asked])


def last_turns(turns: Sequence[Turn], window: int, reader: Reader) -> list[Turn]:
    """As many of the last turns as fit into the window."""
    kept: list[Turn] = []
    for turn in reversed(turns):
        if reader.n_tokens([turn, *kept]) > window:
            break
        kept.insert(0, turn)
    return kept


def found_turns(turns: Sequence[Turn], question: str, window: int, reader: Reader) -> list[Turn]:
    """The turns that BM25 finds most relevant to the question, as many as fit into the window, in their order.

    What the user said is searched, without the words that are in every text; of turns alike the newer one is taken.
    """
    kept: list[int] = []
    scores = _relevance([user for user, _ in turns], question)
    for i in sorted(range(len(turns)), key=lambda i: (-scores[i], -i)):
        if reader.n_tokens([turns[j] for j in (*kept, i)]) <= window:
            kept.append(i)
    return [turns[i] for i in sorted(kept)]


def _relevance(texts: Sequence[str], question: str) -> npt.NDArray[np.float32]:
    bm25s = _bm25s()
    *words, asked = bm25s.tokenize([*texts, question], stopwords="en_plus", return_ids=False, show_progress=False)
    if not any(words) or not asked:
        return np.zeros(len(texts), dtype=np.float32)
    search = bm25s.BM25()
    search.index(words, show_progress=False)
    return search.get_scores(asked)


#
# the models
#


class Reader(Protocol):
    """A model with a memory that reads conversations and answers."""

    def n_tokens(self, turns: Sequence[Turn]) -> int: ...

    def begin(self, write: bool) -> None:
        """No text, an empty memory."""

    def read(self, turns: Sequence[Turn]) -> None:
        """Reads turns as one ingest, each message a segment."""

    def forget_text(self) -> None: ...

    def answer(self, question: str) -> str:
        """Reads the question, answers greedily; what it answers it has read too."""


class NativeReader:
    """A DeltaMemLlama."""

    def __init__(
        self, model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, threads: int | None = None
    ):
        from ..llama import DeltaMemLlama

        threads = threads or max(usable() // 2, 1)
        self.llm: DeltaMemLlama = DeltaMemLlama(
            model_path=os.fspath(model), deltamem_path=adapter, n_ctx=0, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self._role = {role: self._tokens(f"<|{role}|>") for role in ("user", "assistant")}
        if any(len(tokens) != 1 for tokens in self._role.values()):
            raise ModelError(
                f"{model}: has no tokens <|user|> and <|assistant|>: only models of the small world can be asked of it"
            )
        self._tokens_of: dict[tuple[str, str], list[int]] = {}

    def n_tokens(self, turns: Sequence[Turn]) -> int:
        return sum(len(self._message(role, text)) for turn in turns for role, text in zip(self._role, turn))

    def begin(self, write: bool) -> None:
        self.llm.reset()
        if self.llm.memory.attached:
            self.llm.memory.reset()
            self.llm.memory.write = write

    def read(self, turns: Sequence[Turn]) -> None:
        messages = [self._message(role, text) for turn in turns for role, text in zip(self._role, turn)]
        self._eval(messages)

    def forget_text(self) -> None:
        self.llm.reset()

    def answer(self, question: str) -> str:
        self._eval([self._message("user", question) + self._role["assistant"]])
        end, given = self.llm.token_eos(), []
        while len(given) < MAX_ANSWER:
            token = int(np.argmax(self.llm.logits))
            self.llm.eval([token])
            if token == end:
                break
            given.append(token)
        return self.llm.detokenize(given).decode("utf-8", errors="replace").strip()

    def _eval(self, messages: list[list[int]]) -> None:
        if not messages:
            return
        tokens = [token for message in messages for token in message]
        segments = [i for i, message in enumerate(messages) for _ in message]
        self.llm.eval(tokens, segments if self.llm.memory.by_segment else None)

    def _message(self, role: str, text: str) -> list[int]:
        if (role, text) not in self._tokens_of:
            self._tokens_of[role, text] = self._tokens(f"<|{role}|>{text}<|end|>")
        return self._tokens_of[role, text]

    def _tokens(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=False, special=True)


def answer_all(
    cases: Sequence[Case],
    readers: dict[str, Any],
    window: int,
    console: Console,
    only: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Every method's answer to every case."""
    from rich.progress import track

    plain = next(iter(readers.values()))

    def show_text(turns_of: Any) -> Any:
        def answer(case: Case) -> str:
            plain.begin(write=False)
            plain.read(turns_of(case))
            return plain.answer(case.question)

        return answer

    def remember(reader: Any, visible: bool) -> Any:
        def answer(case: Case) -> str:
            kept = last_turns(case.turns, window, reader) if visible else []
            reader.begin(write=True)
            reader.read(case.turns[: len(case.turns) - len(kept)])
            reader.forget_text()
            reader.read(kept)
            return reader.answer(case.question)

        return answer

    shown = {
        "none": lambda case: [],
        "window": lambda case: last_turns(case.turns, window, plain),
        "bm25": lambda case: found_turns(case.turns, case.question, window, plain),
        "full": lambda case: case.turns,
    }
    methods = {name: show_text(shown[name]) for name in PLAIN}
    for name, reader in readers.items():
        methods[name] = remember(reader, visible=False)
        methods[f"{name}+window"] = remember(reader, visible=True)
    unknown = [name for name in only or () if name not in methods]
    if unknown:
        raise InputError(f"--methods: there is no method {unknown[0]}: {', '.join(methods)}")
    chosen = only or list(methods)
    steps = [(name, case) for name in chosen for case in cases]
    answers: dict[str, list[str]] = {name: [] for name in chosen}
    for name, case in track(steps, description="asking", console=console, transient=True):
        answers[name].append(methods[name](case))
    return answers


#
# results
#


@dataclass(frozen=True)
class Row:
    """How often one method was right in one kind of case; low and high: 95 % interval."""

    method: str
    task: str
    facts: int
    distance: int
    n: int
    accuracy: float
    low: float
    high: float


def table_of(cases: Sequence[Case], answers: dict[str, list[str]]) -> list[Row]:
    rows = []
    for method, given in answers.items():
        right: dict[tuple[str, int, int], list[bool]] = {}
        for case, answer in zip(cases, given):
            right.setdefault((case.task, case.facts, case.distance), []).append(case.is_right(answer))
        rows += [Row(method, *kind, len(all_), *wilson(sum(all_), len(all_))) for kind, all_ in right.items()]
    return rows


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """A share and its 95 % interval (Wilson, 1927)."""
    p, z = right / n, CONFIDENCE
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def ratios_of(rows: Sequence[Row], memories: Sequence[str]) -> dict[str, float | str]:
    """The paper's three ratios, with equal windows, of the best memory; and what the memory costs where none is needed.

    average: of all tasks, over the backbone with the window. other: over the best other method with that window.
    memory_heavy: on tasks whose answer may be outside of the window. no_memory: on visible facts and knowledge.
    Ratios of tasks that were not asked are missing.
    """
    methods = {row.method for row in rows}
    found: dict[str, float | str] = {}

    def mean(method: str, tasks: Sequence[str]) -> float | None:
        means = []
        for task in tasks:
            values = [row.accuracy for row in rows if row.method == method and row.task == task]
            means += [sum(values) / len(values)] if values else []
        return sum(means) / len(means) if means else None

    candidates = [name for name in (f"{memory}+window" for memory in memories) if name in methods]
    if not candidates or "window" not in methods:
        return found
    best = max(candidates, key=lambda name: mean(name, TASKS) or 0.0)
    others = [name for name in ("window", "bm25") if name in methods]
    found["best"] = best
    comparisons = {
        "average": (TASKS, ["window"]),
        "other": (TASKS, others),
        "memory_heavy": (MEMORY_HEAVY, ["window"]),
        "no_memory": (NO_MEMORY, ["window"]),
    }
    for name, (tasks, against) in comparisons.items():
        base = max((mean(method, tasks) or 0.0 for method in against), default=0.0)
        if base > 0:
            found[name] = (mean(best, tasks) or 0.0) / base
    return found


def _print(console: Console, rows: Sequence[Row], ratios: dict[str, float | str]) -> None:
    from rich.table import Table

    kinds = list(dict.fromkeys((row.task, row.facts, row.distance) for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    by_key = {(row.method, row.task, row.facts, row.distance): row for row in rows}
    title, label, cell = "Answers that are right, in % (95 % interval)", 23, 13  # columns of the terminal
    n_fit = max(1, (console.width - label) // cell)
    for some in (methods[i : i + n_fit] for i in range(0, len(methods), n_fit)):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("", width=label - 1)
        for method in some:
            table.add_column(method, justify="right", width=cell - 1)
        for task, facts, distance in kinds:
            detail = f"{distance} tokens" if distance else f"{facts} fact{'s' if facts > 1 else ''}"
            found = (by_key[method, task, facts, distance] for method in some)
            cells = (f"{100 * r.accuracy:.0f} ({100 * r.low:.0f}–{100 * r.high:.0f})" for r in found)
            table.add_row(f"{task.replace('_', ' ')}, {detail}", *cells)
        console.print(table)
    if ratios:
        names = {
            "average": "all tasks, over the backbone with the same window",
            "other": "all tasks, over the best other method with that window",
            "memory_heavy": "tasks that need memory, over the backbone with that window",
            "no_memory": "tasks that need none, over the backbone with that window",
        }
        summary = Table(title=f"Ratios of {ratios['best']}", box=None, show_header=False)
        for name, text in names.items():
            if name in ratios:
                summary.add_row(text, f"{ratios[name]:.2f} ×")
        console.print(summary)


def _show(case: Case, answers: dict[str, str]) -> None:
    print()
    for user, assistant in case.turns:
        print(f"> {user}\n{assistant}")
    print(f"> {case.question}  [{case.fact.value if case.fact else case.answer}]")
    for method, answer in answers.items():
        print(f"{'+' if case.is_right(answer) else '-'} {method}: {answer}")


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise InputError(
            "the method bm25 needs bm25s: pip install 'pydeltamem[eval]', or name other methods by --methods"
        ) from None
    return bm25s


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'pydeltamem[eval]'") from None
    return Figure


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: accuracy by the number of facts and by distance, a line for each method, with its interval."""
    figure = _matplotlib()(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, task, key in zip(panels, ("recall", "distance"), ("facts", "distance")):
        for method in dict.fromkeys(row.method for row in rows):
            points = sorted((getattr(row, key), row) for row in rows if row.method == method and row.task == task)
            if points:
                x, found = zip(*points)
                low = [row.accuracy - row.low for row in found]
                high = [row.high - row.accuracy for row in found]
                style = "--" if method in PLAIN else "-"
                axes.errorbar(x, [row.accuracy for row in found], [low, high], label=method, linestyle=style, capsize=2)
        ticks = sorted({getattr(row, key) for row in rows if row.task == task})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="facts told", ylabel="answers that are right", ylim=(-0.02, 1.02))
    panels[1].set(xlabel="tokens of small talk after four facts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()
