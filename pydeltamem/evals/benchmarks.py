"""The benchmarks of the publication, by name, with what each asks for in a few words."""

from __future__ import annotations

from .gpqa import GPQA
from .hotpotqa import HOTPOTQA
from .ifeval import IFEVAL
from .items import Benchmark
from .locomo import LOCOMO
from .memory_agent_bench import MEMORY_AGENT_BENCH
from .qa import QA

BENCHMARKS: dict[str, tuple[Benchmark, str]] = {
    benchmark.name: (benchmark, summary)
    for benchmark, summary in (
        (LOCOMO, "ask about very long conversations of two people"),
        (MEMORY_AGENT_BENCH, "ask for facts that later facts replace"),
        (HOTPOTQA, "ask what two of ten passages say together"),
        (IFEVAL, "give instructions whose results a program can check"),
        (GPQA, "ask hard questions of science, from a file that you have"),
        (QA, "ask about a paragraph"),
    )
}
