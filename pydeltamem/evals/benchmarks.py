"""The benchmarks of the publication, by name."""

from __future__ import annotations

from .gpqa import GPQA
from .hotpotqa import HOTPOTQA
from .ifeval import IFEVAL
from .items import Benchmark
from .locomo import LOCOMO
from .memory_agent_bench import MEMORY_AGENT_BENCH
from .qa import QA

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (LOCOMO, MEMORY_AGENT_BENCH, HOTPOTQA, IFEVAL, GPQA, QA)
}
