"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
STAGES = ("upload", "wait", "read", "compute", "write")


class Counts:
    """Of one server. stages: upload, wait (for a thread), read, compute (the turn of the device included), write."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()
        ProcessCollector(registry=self._all)
        self.requests = Counter("copedit_requests", "Requests answered.", ["path", "status"], registry=self._all)
        self.failures = Counter("copedit_failures", "Answers of 5xx, by what failed.", ["kind"], registry=self._all)
        self.seconds = Histogram(
            "copedit_request_seconds", "From request to answer.", ["path"], registry=self._all, buckets=_SECONDS
        )
        self.stages = Histogram(
            "copedit_stage_seconds", "A stage of a request.", ["stage"], registry=self._all, buckets=_SECONDS
        )
        self.queue = Gauge("copedit_queue", "Requests that came and have no answer yet.", registry=self._all)
        self.running = Gauge("copedit_running", "Requests that are being worked on.", registry=self._all)
        for stage in STAGES:
            self.stages.labels(stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, whether it ends well or not."""
        start = perf_counter()
        try:
            yield
        finally:
            self.stages.labels(name).observe(perf_counter() - start)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self._all)
