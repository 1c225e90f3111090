"""Finds the settings by which a model is fastest on this machine: for `deltamem tune`.

Successive halving, one group of settings after the other: all choices of a group take turns, in alternating order, and
after a share of the time the slower half leaves. At last the best take turns with the defaults, in new contexts each
round and with intervals, as in `deltamem bench`; `choose` decides by these times alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from time import perf_counter
from typing import Any, TypeVar

from ..runtime import library
from ..runtime.cpus import MAX_THREADS, cpu_name, usable
from ..runtime.unpacking import layouts
from ..tuned import PLAIN_TYPES, Settings
from .comparison import reasons
from .pairs import compare
from .runs import Model, Options, Runner

PROMPTS, DECODE = "prompts", "decode"
COUNTS = {"both": (PROMPTS, DECODE), PROMPTS: (PROMPTS,), DECODE: (DECODE,)}

MICRO_BATCHES = (64, 128, 256, 512)
N_CTX = 768  # the longest prompt, and decode after it
ROUNDS = 6, 24  # of the last comparison: six make an interval of 97 %
SHARES = {"n_threads": 0.1, "n_threads_batch": 0.12, "n_ubatch": 0.1, "weights": 0.2}  # of the time

# Called with what runs, the seconds that are gone, and those that it may take.
Progress = Callable[[str, int, int], None]

_Arm = TypeVar("_Arm", bound=Hashable)


@dataclass(frozen=True)
class Gain:
    """How many times as fast as the defaults: the median over rounds, and its interval."""

    ratio: float
    low: float
    high: float


SAME = Gain(1.0, 1.0, 1.0)  # of settings that are the defaults


@dataclass(frozen=True)
class Candidate:
    """Settings, and what each kind of run (PROMPTS, DECODE) gains by them."""

    settings: Settings
    gains: Mapping[str, Gain]

    def reason_against(self, counts: Sequence[str]) -> str:
        """Why it must not be chosen; empty if it may."""
        for kind in counts:
            if not self.gains[kind].ratio >= 1:
                return f"slower in {kind}"
        return "" if any(self.gains[kind].low > 1 for kind in counts) else "no gain beyond the interval"

    def score(self, counts: Sequence[str]) -> float:
        """The mean gain (geometric)."""
        return math.exp(mean(math.log(self.gains[kind].ratio) for kind in counts))


def choose(candidates: Sequence[Candidate], counts: Sequence[str]) -> Candidate | None:
    """The candidate with the greatest mean gain in what counts, then in all, among those that were slower than the
    defaults in nothing that counts, and surely faster in something. None: the defaults.
    """
    good = [candidate for candidate in candidates if not candidate.reason_against(counts)]
    return max(good, key=lambda candidate: (candidate.score(counts), candidate.score((PROMPTS, DECODE))), default=None)


def halve(
    arms: Sequence[_Arm],
    times_of: Callable[[_Arm], Sequence[float]],
    seconds: float,
    keep: int = 1,
) -> tuple[list[_Arm], dict[_Arm, float]]:
    """Successive halving: all take turns, the slower half leaves, until `keep` are left.

    Args:
        times_of: runs one, and returns its times; their geometric mean counts.
        seconds: for all of it, shared out evenly; each round of turns takes place twice in any case.

    Returns those that are left, the fastest first, and of each how fast it was, relative to the fastest beside which it
    ran last.
    """
    left, speeds = list(arms), dict.fromkeys(arms, 1.0)
    n_rungs = max(1, math.ceil(math.log2(len(left) / keep)))
    while len(left) > keep:
        end = perf_counter() + seconds / n_rungs
        logs: dict[_Arm, list[float]] = {arm: [] for arm in left}
        n_rounds = 0
        while n_rounds < 2 or perf_counter() < end:
            times = {arm: mean(map(math.log, times_of(arm))) for arm in (left[::-1] if n_rounds % 2 else left)}
            middle = mean(times.values())  # what a round's neighbours share: the machine was fast or slow
            for arm, time in times.items():
                logs[arm].append(time - middle)
            n_rounds += 1
        slowness = {arm: median(logs[arm]) for arm in left}
        left.sort(key=slowness.__getitem__)
        speeds.update({arm: math.exp(slowness[left[0]] - slowness[arm]) for arm in left})
        left = left[: max(keep, (len(left) + 1) // 2)]
    return left, speeds


def thread_counts(n_cpus: int) -> tuple[int, ...]:
    """The numbers of threads that are tried: one, and quarters of the CPUs."""
    n_cpus = min(n_cpus, MAX_THREADS)
    return tuple(sorted({1, *(max(1, n_cpus * quarters // 4) for quarters in (1, 2, 3, 4))}))


def weights_and_attention(
    settings: Settings, kv_types: Sequence[str], layouts: Sequence[tuple[bool, str]]
) -> list[Settings]:
    """The choices that concern prompts and decode both. layouts: of the model's weights (`unpacking.layouts`)."""
    return [
        replace(settings, repack=repack, unpack=unpack, flash_attn=flash_attn, type_k=kv_type, type_v=kv_type)
        for kv_type in dict.fromkeys((settings.type_k, *kv_types))
        for repack, unpack in layouts
        for flash_attn in (False, True)
        if flash_attn or kv_type in PLAIN_TYPES
    ]


def relevant(settings: Settings, kind: str) -> tuple[Any, ...]:
    """What of the settings decides the time of this kind."""
    own = (settings.n_threads,) if kind == DECODE else (settings.n_threads_batch, settings.n_ubatch)
    return (settings.repack, settings.unpack, settings.flash_attn, settings.type_k, settings.type_v, *own)


def candidates_of(
    finalists: Sequence[Settings], default: Settings, gains: Mapping[tuple[str, tuple[Any, ...]], Gain]
) -> list[Candidate]:
    """The finalists with their gains, which `gains` has by kind and `relevant` settings. With weights and attention as
    by default, also those in which only prompts, or only decode, differ from the defaults.
    """
    all_of = list(finalists)
    for settings in finalists:
        for other in (
            replace(default, n_threads=settings.n_threads),
            replace(default, n_threads_batch=settings.n_threads_batch, n_ubatch=settings.n_ubatch),
        ):
            if all((kind, relevant(other, kind)) in gains for kind in (PROMPTS, DECODE)):
                all_of.append(other)
    return [
        Candidate(settings, {kind: gains[kind, relevant(settings, kind)] for kind in (PROMPTS, DECODE)})
        for settings in dict.fromkeys(all_of)
        if settings != default
    ]


def run(
    model: str,
    adapter: str | None,
    *,
    seconds: float = 120,
    counts: str = "both",
    kv_types: Sequence[str] = (),
    n_gpu_layers: int = -1,
    use_mmap: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Settings, dict[str, Any]]:
    """Measures, and chooses. Returns the settings, and what was found: for the record, and for the table.

    Args:
        adapter: GGUF, the packed model itself, or None.
        seconds: about how long it may take.
        counts: "both", or of "prompts" and "decode" the one that counts.
        kv_types: types of the KV cache to try beside F16.

    Raises ModelError, AdapterError or DecodeError.
    """
    bench = _Bench(model, adapter, n_gpu_layers, use_mmap, seconds, progress)
    try:
        return _search(bench, counts, kv_types)
    finally:
        bench.close()


def _search(bench: _Bench, counts: str, kv_types: Sequence[str]) -> tuple[Settings, dict[str, Any]]:
    default = best = Settings.default()
    bench.say("loading")
    bench.size_up(default)
    tried: dict[str, list[dict[str, Any]]] = {}

    def tune(name: str, choices: Sequence[Settings], kinds: Sequence[str], keep: int = 1) -> list[Settings]:
        bench.say(name)
        if len(choices) <= keep:
            return list(choices)
        left, speeds = halve(
            choices, lambda choice: [bench.time(choice, kind) for kind in kinds], bench.seconds * SHARES[name], keep
        )
        tried[name] = [{"settings": asdict(choice), "speed": speed} for choice, speed in speeds.items()]
        bench.forget(left)
        return left

    for name, kind, values in (
        ("n_threads", DECODE, (default.n_threads, *thread_counts(usable()))),
        ("n_threads_batch", PROMPTS, (default.n_threads_batch, *thread_counts(usable()))),
        ("n_ubatch", PROMPTS, (default.n_ubatch, *(n for n in MICRO_BATCHES if n < bench.n_prompt))),
    ):
        choices = [Settings(**{**asdict(best), name: value}) for value in dict.fromkeys(values)]
        best = tune(name, choices, (kind,))[0]
    finalists = tune("weights", weights_and_attention(best, kv_types, layouts(bench.model)), COUNTS[counts], keep=2)
    finalists = [settings for settings in dict.fromkeys((*finalists, best)) if settings != default]
    bench.forget(())

    gains, speeds = bench.compare(finalists, default)
    candidates = candidates_of(finalists, default, gains)
    chosen = choose(candidates, COUNTS[counts])
    settings = default if chosen is None else chosen.settings
    return settings, {
        "counts": counts,
        "deltamem": bench.adapter,
        "processor": cpu_name(),
        "n_prompt": bench.n_prompt,
        "n_decode": bench.n_decode,
        "seconds": bench.gone(),
        "rounds": bench.n_rounds,
        "default": asdict(default),
        "tokens_per_second": {
            kind: {
                "default": speeds[kind, relevant(default, kind)],
                "tuned": speeds[kind, relevant(settings, kind)],
                **asdict(gains[kind, relevant(settings, kind)]),
            }
            for kind in (PROMPTS, DECODE)
        },
        "tried": tried,
        "not_taken": [
            {
                "settings": asdict(candidate.settings),
                "gains": {kind: asdict(gain) for kind, gain in candidate.gains.items()},
                "reason": candidate.reason_against(COUNTS[counts]),
            }
            for candidate in candidates
            if candidate is not chosen and candidate.settings in finalists
        ],
    }


class _Bench:
    """Times settings of one model. Loads the weights once for each layout that is asked for."""

    def __init__(
        self, model: str, adapter: str | None, n_gpu_layers: int, use_mmap: bool, seconds: float, progress: Progress
    ) -> None:
        self.model, self.adapter, self.seconds = model, adapter, seconds
        self.n_gpu_layers, self.use_mmap, self.progress = n_gpu_layers, use_mmap, progress
        self.n_prompt, self.n_decode, self.n_rounds = 512, 32, 0
        self.begun, self.doing = perf_counter(), ""
        self.models: dict[tuple[bool, str], Model] = {}
        self.runners: dict[Settings, Runner] = {}

    def say(self, doing: str) -> None:
        self.doing = doing
        self.advance()

    def advance(self) -> None:
        self.progress(self.doing, min(int(self.gone()), int(self.seconds)), max(int(self.seconds), 1))

    def gone(self) -> float:
        return perf_counter() - self.begun

    def size_up(self, default: Settings) -> None:
        """Decides how long the runs are: a prompt takes at most 1/60 of the time, decode 1/200."""
        runner = self._runner(default)
        runner.prompt(32)
        rate = 32e9 / runner.prompt(32)[0]
        self.n_prompt = max([n for n in (64, 128, 256, 512) if n / rate <= self.seconds / 60], default=32)
        rate = 2e9 / runner.decode(32, 2)[0]
        self.n_decode = min(max(int(self.seconds / 200 * rate), 4), 32)
        self.forget(())

    def time(self, settings: Settings, kind: str) -> float:
        """Nanoseconds of one run. The first of a context is not counted: it is run once more."""
        runner = self._runner(settings)
        self.advance()
        if kind == PROMPTS:
            if not runner.n_tokens:
                runner.prompt(self.n_prompt)
            return runner.prompt(self.n_prompt)[0]
        return runner.decode(self.n_prompt, self.n_decode)[0]

    def compare(
        self, finalists: Sequence[Settings], default: Settings
    ) -> tuple[dict[tuple[str, tuple[Any, ...]], Gain], dict[tuple[str, tuple[Any, ...]], float]]:
        """Gains and tokens/s by kind and `relevant` settings. Each is timed once, however many finalists share it."""
        self.say("against the defaults")
        asked = [(settings, kind) for settings in (default, *finalists) for kind in (PROMPTS, DECODE)]
        runs = {(kind, relevant(settings, kind)): (settings, kind) for settings, kind in reversed(asked)}
        runs = dict(reversed(runs.items()))  # the first of those that are alike: the default's
        times: dict[tuple[str, tuple[Any, ...]], list[float]] = {key: [] for key in runs}
        least, most = ROUNDS
        while self.n_rounds < most and (self.n_rounds < least or self.gone() < self.seconds):
            self.forget(())
            keys = list(runs)
            for key in reversed(keys) if self.n_rounds % 2 else keys:
                times[key].append(self.time(*runs[key]))
            self.n_rounds += 1
        gains, speeds = {}, {}
        for kind, n_tokens in ((PROMPTS, self.n_prompt), (DECODE, self.n_decode)):
            base = kind, relevant(default, kind)
            for key in runs:
                if key[0] == kind:
                    speeds[key] = n_tokens * 1e9 / median(times[key])
                    found = compare(times[base], times[key], 1)
                    gains[key] = SAME if key == base else Gain(found["ratio"], found["low"], found["high"])
        return gains, speeds

    def forget(self, but: Sequence[Settings]) -> None:
        """Closes the contexts of all other settings."""
        for settings in [settings for settings in self.runners if settings not in but]:
            self.runners.pop(settings).close()

    def close(self) -> None:
        self.forget(())
        for model in self.models.values():
            model.close()

    def _runner(self, settings: Settings) -> Runner:
        if settings not in self.runners:
            options = Options(
                model=self.model, n_ctx=N_CTX, n_batch=512, n_gpu_layers=self.n_gpu_layers, use_mmap=self.use_mmap,
                **asdict(settings),
            )  # fmt: skip
            with reasons():
                layout = settings.repack, settings.unpack
                if layout not in self.models:
                    self.models[layout] = Model(library.llama_cpp, options)
                self.runners[settings] = Runner(self.models[layout], self.adapter, options=options)
        return self.runners[settings]
