"""Stages of a request: their times in the answer, in /metrics and, if the request is traced, as spans."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

from vitrine.service.operations import metrics

_tracer = trace.get_tracer("vitrine")


@contextmanager
def timed_stage(name: str, timings: dict[str, float]) -> Iterator[None]:
    """Time a stage; recorded only if it succeeds."""
    start = time.perf_counter()
    yield
    record_stage(name, (time.perf_counter() - start) * 1e3, timings)


def record_stage(name: str, milliseconds: float, timings: dict[str, float], ended_ms_ago: float = 0.0) -> None:
    """Record a stage that has ended."""
    timings[name] = milliseconds
    metrics.STAGE.labels(name).observe(milliseconds / 1e3)
    if trace.get_current_span().is_recording():
        end = time.time_ns() - round(ended_ms_ago * 1e6)
        _tracer.start_span(name, start_time=end - round(milliseconds * 1e6)).end(end)
