"""Times a model with and without an adapter, and another llama library, in turn.

Two contexts of one loaded model, one with the adapter and one without, take turns in one process. The runs of a pair
follow each other directly and their order alternates, so that a drift of the machine falls on both. Another llama
library needs its own process. It takes turns with an identical process over this library; both have no adapter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DeltaMemError, LibraryError, ModelError
from ..runtime import library
from ..runtime.cpus import cpu_name
from .nodes import Nodes
from .nodes import measure as measure_nodes
from .pairs import OFF, ON, OTHER, PLAIN, Side, measure
from .runs import Model, Options, Runner
from .worker import Worker

# Called with what runs, how many of its runs are done, and how many there are.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is timed, and how often."""

    prompts: tuple[int, ...] = (512,)  # tokens of each
    depths: tuple[int, ...] = (0,)  # tokens of text before decode, of each test
    n_decode: int = 32  # tokens of decode; 0: none
    n_pairs: int = 10
    n_renew: int = 1  # pairs after which contexts and processes are new; 0: never
    n_resident: int = 0  # tokens of the prompt after which RAM is measured; 0: do not
    by_node: bool = False  # times every node of the graphs, instead of whole runs

    @property
    def tests(self) -> list[tuple[str, tuple[int, ...]]]:
        """The tests, as `measure` takes them: kind and arguments."""
        tests: list[tuple[str, tuple[int, ...]]] = [("prompt", (n,)) for n in self.prompts]
        return tests + [("decode", (depth, self.n_decode)) for depth in self.depths if self.n_decode]

    @property
    def n_ctx(self) -> int:
        """Tokens that a context must hold, padded as llama.cpp does."""
        longest = max([*self.prompts, self.n_resident + 1, max(self.depths, default=0) + self.n_decode])
        return -(-longest // 256) * 256


def run(
    options: Options,
    adapter: str | None,
    plan: Plan,
    against: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Times a model as planned. Returns the report that `deltamem bench --json` writes (docs/reference/performance.md).

    Args:
        options: model and context; n_ctx is the plan's.
        adapter: GGUF, or the packed model itself. None: both sides are alike, which shows the measurement's
            noise; with `against` only the two libraries are compared.
        against: folder of another llama library.

    Raises ModelError, AdapterError, LibraryError or DecodeError.
    """
    options = replace(options, n_ctx=plan.n_ctx)
    report: dict[str, Any] = {
        "setup": {
            **asdict(options), "deltamem": adapter, "control": adapter is None, "cpu": cpu_name(),
            "pairs": plan.n_pairs, "renew": plan.n_renew,
        }
    }  # fmt: skip
    ours = library.library_folder()
    memory: dict[str, Any] = {}
    if plan.n_resident and adapter is not None and not plan.by_node:
        memory = {"prompt": plan.n_resident, **_resident(ours, options, adapter, plan.n_resident, progress)}

    with contextlib.ExitStack() as stack:
        nodes = {name: Nodes() for name in (ON, OFF)} if plan.by_node else {}
        runners: dict[str, Runner] = {}
        workers: dict[str, Worker] = {}
        if against is None or adapter is not None:
            runners = _open(stack, options, adapter, nodes)
            report["setup"].update(runners[OFF].model.describe())
        if against is not None:
            for name, folder in ((PLAIN, ours), (OTHER, against)):
                workers[name] = Worker(folder, options)
                stack.callback(workers[name].close)
            report["setup"].update(workers[PLAIN].description)
            report["setup"]["against"] = {"folder": against, "system": workers[OTHER].description["system"]}
        if adapter is not None:
            memory = {**{f"{key}_bytes": n for key, n in runners[ON].n_bytes.items()}, **memory}
            memory["adapter_file_bytes"] = os.path.getsize(adapter) if adapter != options.model else None
        report["memory"] = memory

        report.update(_timed(plan, runners, workers, nodes, progress))
    return report


def _timed(
    plan: Plan,
    runners: Mapping[str, Runner],
    workers: Mapping[str, Worker],
    nodes: Mapping[str, Nodes],
    progress: Progress,
) -> dict[str, Any]:
    """What the report says of times: of whole runs, or with `nodes` of the nodes of the runners' graphs."""
    report: dict[str, Any] = {}
    sides: dict[str, Side] = {**runners, **workers}
    total = len(plan.tests) * (plan.n_pairs + 1) * len(sides)
    done = 0
    for kind, arguments in plan.tests:

        def advance(what: str = label(kind, arguments)) -> None:
            nonlocal done
            done += 1
            progress(what, done, total)

        if nodes:
            both = {name: (runners[name], nodes[name]) for name in nodes}
            found = measure_nodes(both, kind, arguments, plan.n_pairs, plan.n_renew, advance)
            report.setdefault("nodes", []).append({"test": label(kind, arguments), **found})
        else:
            runs = report.setdefault(kind, {"runs": []})["runs"]
            runs.append(measure(sides, kind, arguments, plan.n_pairs, advance, plan.n_renew))
    for kind in ("prompt", "decode"):  # the report repeats the first of several at its top
        if kind in report:
            first = report[kind]["runs"][0]
            report[kind] = {**{key: value for key, value in first.items() if key != "ns"}, **report[kind]}
    return report


def label(kind: str, arguments: tuple[int, ...]) -> str:
    """A test in a few words."""
    return f"prompt {arguments[0]}" if kind == "prompt" else f"decode {arguments[1]} at {arguments[0]}"


def library_in(path: str) -> str:
    """The folder of a llama library, given that folder or the library. Raises LibraryError if there is none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not any((folder / name).is_file() for name in ("libllama.so", "libllama.dylib", "llama.dll", "libllama.dll")):
        raise LibraryError(f"{path}: holds no llama library: name the folder of a build's libllama")
    return str(folder.resolve())


def unpacks(folder: str) -> bool:
    """Whether the library there knows products in BF16 (runtime/unpacking.py): an unpatched or older one does not. Its
    files are read, because two libraries of one name are not loaded together.
    """
    name = b"ggml_backend_deltamem_bf16_buffer_type"
    return any(name in path.read_bytes() for path in Path(folder).glob("*ggml-base*") if path.is_file())


def _open(
    stack: contextlib.ExitStack, options: Options, adapter: str | None, nodes: dict[str, Nodes]
) -> dict[str, Runner]:
    """The two sides of this process; without an adapter they are alike."""
    with reasons():
        model = Model(library.llama_cpp, options)
        stack.callback(model.close)
        sides = {}
        for name in (ON, OFF):
            observer = nodes[name].callback if nodes else None
            sides[name] = Runner(model, adapter if name == ON else None, observer)
            stack.callback(sides[name].close)
    return sides


@contextlib.contextmanager
def reasons() -> Iterator[None]:
    """Ends the sentence of a ModelError with the reason that llama.cpp logs."""
    with library.errors_held() as log:
        try:
            yield
        except ModelError as error:
            reason = library.reason(log)
            log.clear()
            raise ModelError(f"{error}{reason}") from error
        except DeltaMemError:
            log.clear()
            raise


def _resident(folder: str, options: Options, adapter: str, n_tokens: int, progress: Progress) -> dict[str, Any]:
    """Resident bytes with and without the adapter, each in its own process, after a prompt and one more token."""
    result: dict[str, Any] = {}
    for i, (name, path) in enumerate(((OFF, None), (ON, adapter))):
        progress(f"RAM, adapter {name}", i, 2)
        worker = Worker(folder, options, path)
        try:
            worker.prompt(n_tokens)
            worker.decode(n_tokens, 1)
            result[name] = worker.resident()
        finally:
            worker.close()
    result["extra"] = {key: result[ON][key] - result[OFF][key] for key in result[ON]}
    return result
