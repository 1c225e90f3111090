"""The results of benchmarks: reads the JSON lines of runs, joins shards, and writes tables, JSON and a plot."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..formats.kinds import json_of
from .answer_file import OF_MACHINE, read_answers
from .bootstrap import Estimate, Sample, ratio
from .plot import matplotlib_figure
from .run import BESIDE, LORA

RESULTS = json_of("results of deltamem eval", {"setups", "rows", "ratios"})

# What all methods of a benchmark should have alike; of other models and questions they cannot be compared at all
OF_ONE = ("model", "questions")
OF_ALL = (*OF_ONE, "version", "n_ctx", "seed", "flash_attn", "KV cache", "unpack")

Answers = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by benchmark, method and id of the question


@dataclass(frozen=True)
class Row:
    """A metric of one method; kind "": of all questions of the benchmark."""

    benchmark: str
    kind: str
    metric: str
    method: str
    n: int
    mean: Estimate


@dataclass(frozen=True)
class Ratio:
    """The main metric of one method over that of another, of the questions that both answered; benchmark "average": of
    the benchmarks' means."""

    benchmark: str
    method: str
    over: str
    n: int
    ratio: Estimate


@dataclass(frozen=True)
class Results:
    """What a report shows. setups: of each file. notes: what is missing, and how intervals were made."""

    setups: list[dict[str, Any]]
    rows: list[Row]
    ratios: list[Ratio]
    notes: list[str]


def results_of(folders: Iterable[str | Path]) -> Results:
    """Joins the files *.jsonl in the folders. Raises InputError if there are none, or if they do not fit together."""
    setups, answers, notes = _read(folders)
    rows: list[Row] = []
    ratios: list[Ratio] = []
    pairs: dict[str, dict[tuple[str, str], tuple[Any, Any, int]]] = {}  # means of both methods, and of how many
    for benchmark, by_method in answers.items():
        metrics = list(next(iter(next(iter(by_method.values())).values()))["scores"])
        everything = {id for of in by_method.values() for id in of}
        for method, of in by_method.items():
            if len(of) < len(everything):
                notes.append(f"{benchmark}: {method} has {len(of)} of {len(everything)} questions so far")
            kinds = dict.fromkeys(answer["kind"] for answer in of.values())
            for kind in ("", *(filter(None, kinds) if len(kinds) > 1 else ())):
                some = {id: answer for id, answer in of.items() if kind in ("", answer["kind"])}
                for metric in metrics:
                    sample = _sample(benchmark, {method: some}, metric)
                    if not kind:
                        whole = sample
                    if metric == metrics[0] and (not kind or whole.by_context):
                        notes += _few_contexts(f"{benchmark}, {kind}" if kind else benchmark, some, sample)
                    rows.append(Row(benchmark, kind, metric, method, sample.n, sample.mean(method)))
        pairs[benchmark] = {}
        for method, over in _compared(by_method):
            ids = [id for id in by_method[method] if id in by_method[over]]
            if not ids:
                continue
            both = {name: {id: by_method[name][id] for id in ids} for name in (method, over)}
            sample = _sample(benchmark, both, metrics[0])
            pairs[benchmark][method, over] = sample.means(method), sample.means(over), sample.n_drawn
            ratios += _ratio(benchmark, method, over, sample.n, *pairs[benchmark][method, over])
            notes += _few_contexts(benchmark, both[method], sample)
    if len(pairs) > 1:
        for method, over in next(iter(pairs.values())):
            if all((method, over) in of for of in pairs.values()):
                means = [of[method, over] for of in pairs.values()]
                above, below = (np.mean([of[i] for of in means], axis=0) for i in (0, 1))
                ratios += _ratio("average", method, over, len(means), above, below, min(of[2] for of in means))
    notes = list(dict.fromkeys(notes))
    return Results(setups, rows, ratios, notes)


def _compared(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Every method over the backbone, and those without the text over no context."""
    names = list(methods)
    return [
        (method, over)
        for method in names
        for over in ("backbone", "none")
        if over in names and method not in ("backbone", "none") and (over == "backbone" or "/memory" in method)
    ]


def _ratio(benchmark: str, method: str, over: str, n: int, above: Any, below: Any, n_drawn: int) -> list[Ratio]:
    """Empty if the second mean is 0."""
    found = ratio(above, below, n_drawn)
    return [] if found is None else [Ratio(benchmark, method, over, n, found)]


def _few_contexts(title: str, answers: Mapping[str, Mapping[str, Any]], sample: Sample) -> list[str]:
    """A note if questions were drawn where several are about one context. title: what they are of."""
    contexts = {answer["about"] for answer in answers.values()}
    if sample.by_context or not 1 <= len(contexts - {None}) < sample.n:
        return []
    return [f"{title}: too few contexts ({len(contexts)}) to draw them: questions were drawn"]


def _sample(benchmark: str, by_method: Mapping[str, Mapping[str, Any]], metric: str) -> Sample:
    """Methods of one benchmark are drawn together, those of another apart from them."""
    ids = sorted(next(iter(by_method.values())))

    def values(answer: Any) -> list[float]:
        score = answer["scores"][metric]
        return score if isinstance(score, list) else [score]

    scores = {method: [values(of[id]) for id in ids] for method, of in by_method.items()}
    first = next(iter(by_method.values()))
    return Sample(scores, [first[id]["about"] for id in ids], zlib.crc32(benchmark.encode()))


def _read(folders: Iterable[str | Path]) -> tuple[list[dict[str, Any]], Answers, list[str]]:
    """The setups, the answers, and notes of what is missing and what is not alike."""
    setups: list[dict[str, Any]] = []
    answers: Answers = {}
    notes: list[str] = []
    conditions: dict[tuple[str, str], dict[str, Any]] = {}  # by benchmark and method: under what it was asked
    machines: dict[tuple[str, str], set[str]] = {}  # by benchmark and name of OF_MACHINE
    metrics: dict[str, Mapping[str, Any]] = {}  # by benchmark: scores of an answer
    paths = _paths(folders)
    for path in paths:
        setup, records = read_answers(path)
        setups.append({**setup, "file": path.name})
        machine = {name: _in_words(setup[name]) for name in OF_MACHINE if setup.get(name) is not None}
        expected = setup.get("questions", 0) * len(setup.get("methods") or ())
        if len(records) < expected:
            notes.append(f"{path}: has {len(records)} of {expected} answers so far")
        for record in records:
            benchmark, method = record["benchmark"], record["method"]
            for name, value in machine.items():
                machines.setdefault((benchmark, name), set()).add(value)
            scores = record["scores"]
            if scores.keys() != metrics.setdefault(benchmark, scores).keys():
                raise InputError(
                    f"{path}: has {', '.join(scores)} of {benchmark} here and {', '.join(metrics[benchmark])} in"
                    " another file: report them one by one"
                )
            now = _conditions(setup, method)
            for name, value in conditions.setdefault((benchmark, method), now).items():
                if now[name] != value and None not in (now[name], value):
                    raise InputError(
                        f"{path}: {method} has {name} {now[name]} here and {value} in another file: report them one by"
                        " one"
                    )
            of = answers.setdefault(benchmark, {}).setdefault(method, {})
            if record["id"] in of and of[record["id"]]["answer"] != record["answer"]:
                raise InputError(f"{path}: question {record['id']} has another answer in another file")
            of[record["id"]] = record
    if not answers:
        raise InputError(f"{paths[0]}: has no answer yet")
    notes += _not_alike(conditions)
    for (benchmark, name), values in machines.items():
        if len(values) > 1:
            notes.append(f"{benchmark}: not all answers are of the same {name}: {' and '.join(sorted(values))}")
    return setups, answers, notes + _missing_parts(setups)


def _paths(folders: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and those in folders. Raises InputError if a folder has none."""
    paths: list[Path] = []
    for folder in map(Path, folders):
        found = [folder] if folder.is_file() else sorted(folder.glob("*.jsonl"))
        if not found:
            raise InputError(f"{folder}: has no answers of deltamem eval (*.jsonl)")
        paths += found
    return paths


def _not_alike(conditions: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Notes about what the methods of a benchmark should have alike, and have not. Raises InputError where they cannot
    be compared at all.
    """
    notes = []
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in conditions):
        of_methods = [under for (of, _), under in conditions.items() if of == benchmark]
        for name in OF_ALL:
            values = {under[name] for under in of_methods} - {None}
            note = f"{benchmark}: not all methods have the same {name}: {' and '.join(sorted(map(str, values)))}"
            if len(values) > 1 and name in OF_ONE:
                raise InputError(f"{note}: report the files one by one")
            if len(values) > 1:
                notes.append(note)
    return notes


def _in_words(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _missing_parts(setups: Iterable[Mapping[str, Any]]) -> list[str]:
    """Notes about questions that were shared out by --shard, if not all their files are here."""
    found: dict[tuple[str, ...], set[str]] = {}
    for setup in setups:
        part, _, n = str(setup.get("shard") or "1/1").partition("/")
        alike = (str(setup.get(name)) for name in ("methods", "kinds", "limit", "seed"))
        found.setdefault((setup["benchmark"], n, *alike), set()).add(part)
    return [
        f"{benchmark}: has parts {', '.join(sorted(parts))} of {n} of the questions (--shard) so far"
        for (benchmark, n, *_), parts in found.items()
        if str(len(parts)) != n
    ]


def _conditions(setup: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What decides the answers of a method, from a setup; None: it does not say, or it does not matter. Files are told
    apart by SHA-256, or by name in what earlier versions wrote.
    """
    adapter, _, protocol = method.partition("/")
    digests, adapters, cache = setup.get("sha256") or {}, setup.get("adapters") or {}, setup.get("cache")
    searches = method in BESIDE or "+" in protocol
    return {
        "model": digests.get("model") or setup["model"],
        "questions": digests.get("data"),
        "version": setup.get("version") or "an earlier one",
        **{name: setup.get(name) for name in ("n_ctx", "seed", "flash_attn")},
        "KV cache": "/".join(map(str, cache)) if cache else None,
        "unpack": setup.get("unpack") or "none",
        "window": setup.get("window") if searches else None,
        "answer_writes": setup.get("answer_writes") if protocol else None,
        "rehearse": bool(setup.get("rehearse")) if protocol.startswith("memory") else None,
        "defer_replies": bool(setup.get("defer_replies")) if protocol else None,
        "adapter": {**adapters, **(digests.get("adapters") or {})}.get(adapter) if protocol else None,
        "load_memory": (digests.get("load_memory") or setup.get("load_memory") or "none") if protocol else None,
        "LoRA adapter": (digests.get("lora") or setup.get("lora")) if method == LORA else None,
    }


#
# output
#


def markdown(results: Results) -> str:
    """Tables of means and ratios, in %, with 95 % intervals."""
    lines: list[str] = []
    for benchmark in dict.fromkeys(row.benchmark for row in results.rows):
        rows = [row for row in results.rows if row.benchmark == benchmark]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        lines += [f"## {benchmark}", ""]
        lines += _table(["method", "questions", *metrics], [
            [method, str(next(r.n for r in rows if r.method == method)),
             *(_percent(r.mean) for r in rows if r.method == method and not r.kind)]
            for method in dict.fromkeys(r.method for r in rows)
        ])  # fmt: skip
        kinds = [kind for kind in dict.fromkeys(row.kind for row in rows) if kind]
        if kinds:
            by_key = {(r.method, r.kind): r for r in rows if r.metric == metrics[0]}
            lines += _table([f"{metrics[0]} of", *kinds], [
                [method, *(_percent(by_key[method, k].mean) if (method, k) in by_key else "" for k in kinds)]
                for method in dict.fromkeys(r.method for r in rows)
            ])  # fmt: skip
    if results.ratios:
        lines += ["## ratios", ""]
        lines += _table(["benchmark", "method", "over", "ratio"], [
            [r.benchmark, r.method, r.over, str(r.ratio)]
            for r in results.ratios
        ])  # fmt: skip
    return "\n".join([*lines, *(f"- {note}" for note in results.notes)]).rstrip() + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _percent(mean: Estimate) -> str:
    return f"{100 * mean.value:.1f} ({100 * mean.low:.1f}–{100 * mean.high:.1f})"


def as_json(results: Results) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(of) for name, of in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(
        {
            "setups": results.setups,
            "rows": [plain(asdict(row)) for row in results.rows],
            "ratios": [plain(asdict(of)) for of in results.ratios],
            "notes": results.notes,
        },
        indent=1,
        ensure_ascii=False,
    )


def plot(results: Results) -> bytes:
    """The main metric of each benchmark and method as PNG. Raises InputError if matplotlib is not installed."""
    figure_type = matplotlib_figure()
    benchmarks = list(dict.fromkeys(row.benchmark for row in results.rows))
    figure = figure_type(figsize=(3.2 * len(benchmarks) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(benchmarks), squeeze=False)[0]
    for axes, benchmark in zip(panels, benchmarks):
        rows = [row for row in results.rows if row.benchmark == benchmark and not row.kind]
        rows = [row for row in rows if row.metric == rows[0].metric]
        errors = [
            [100 * max(0, r.mean.value - r.mean.low) for r in rows],
            [100 * (r.mean.high - r.mean.value) for r in rows],
        ]
        axes.barh([r.method for r in rows], [100 * r.mean.value for r in rows], xerr=errors, capsize=2, alpha=0.8)
        axes.invert_yaxis()
        axes.set(title=f"{benchmark} ({rows[0].n})", xlabel=f"{rows[0].metric}, %")
        axes.grid(alpha=0.3, axis="x")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()
