"""What is watched, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from .answer import Answer
from .records import StoreError
from .service import AsyncDeltaMem

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PATIENCE = 1.0  # seconds that a scrape waits for the database
# close enough to tell a median and a 99th percentile from
_STEPS = (*(round(x * 10**e, 4) for e in (-3, -2, -1, 0) for x in (1, 1.5, 2, 3, 5, 7)), 10)


class Metrics:
    """The metrics of one server. `service` gives it once it is loaded."""

    def __init__(self, service: Callable[[], AsyncDeltaMem | None]) -> None:
        self._service = service
        # a thread of its own: where the database hangs, so does this thread, and no other
        self._counting = concurrent.futures.ThreadPoolExecutor(1, "deltamem-metrics")
        self._asked: concurrent.futures.Future[None] | None = None
        self._n_sessions = float("nan")
        self.registry = registry = CollectorRegistry()
        self.tokens = Counter(
            "deltamem_tokens", "Tokens, by kind: prompt, cached, generated", ["kind"], registry=registry
        )
        self.requests = Counter(
            "deltamem_requests", "Requests, by endpoint and status", ["endpoint", "status"], registry=registry
        )
        self.errors = Counter("deltamem_errors", "Errors, by code", ["code"], registry=registry)
        self.first = Histogram(
            "deltamem_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.each = Histogram(
            "deltamem_time_per_token_seconds",
            "Of an answer, after its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.steps = Histogram(
            "deltamem_step_seconds", "One decode for all slots, with its sampling", buckets=_STEPS, registry=registry
        )
        self.commits = Histogram(
            "deltamem_store_commit_seconds", "To commit a turn", buckets=_SECONDS, registry=registry
        )

        def gauge(name: str, text: str, value: Callable[[AsyncDeltaMem], float]) -> None:
            def now() -> float:
                loaded = service()
                return 0.0 if loaded is None else float(value(loaded))

            Gauge(name, text, registry=registry).set_function(now)

        gauge("deltamem_slots", "Slots", lambda s: s.worker.n_slots)
        gauge("deltamem_slots_used", "Slots whose request is decoded", lambda s: s.worker.n_active)
        gauge("deltamem_queue", "Requests that wait for a slot", lambda s: s.worker.n_waiting)
        gauge("deltamem_sessions", "Sessions in the store", lambda s: self._n_sessions)
        gauge("deltamem_sessions_ready", "Sessions kept ready in memory", lambda s: s.n_ready)
        registry.register(_Evictions(service))

    def watch(self, service: AsyncDeltaMem) -> None:
        """Measures what a service does between requests."""
        service.worker.llm._engine.stepped = self.steps.observe

    def answered(self, answer: Answer) -> None:
        """Counts an answer."""
        self.tokens.labels("cached").inc(answer.n_cached)
        self.tokens.labels("prompt").inc(max(0, answer.n_prompt - answer.n_cached))
        self.tokens.labels("generated").inc(answer.n_generated)
        if answer.first_at:
            self.first.observe(answer.first_at - answer.begun_at)
            if answer.n_generated > 1:
                self.each.observe((answer.ended_at - answer.first_at) / (answer.n_generated - 1))
        if answer.commit_seconds:
            self.commits.observe(answer.commit_seconds)

    def text(self) -> bytes:
        """All of them, in Prometheus' format, without asking the database."""
        return generate_latest(self.registry)

    async def scraped(self) -> bytes:
        """As `text`, after asking the database. One that does not answer soon leaves what it said last."""
        service = self._service()
        if service is not None:
            if self._asked is None or self._asked.done():
                self._asked = self._counting.submit(self._count, service)
            await asyncio.wait([asyncio.wrap_future(self._asked)], timeout=_PATIENCE)
        return self.text()

    def _count(self, service: AsyncDeltaMem) -> None:
        try:
            self._n_sessions = float(service.n_stored)
        except StoreError:
            self._n_sessions = float("nan")

    def close(self) -> None:
        """Ends its thread, once that has its answer."""
        self._counting.shutdown(wait=False)


class _Evictions(Collector):
    """A counter that the service keeps."""

    def __init__(self, service: Callable[[], AsyncDeltaMem | None]) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        service = self._service()
        n = 0 if service is None else service.n_evicted
        yield CounterMetricFamily("deltamem_evictions", "Sessions that left memory for others", value=n)
