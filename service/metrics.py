"""Prometheus metrics. Counters and histograms work across worker processes; the gauge keeps the newest value."""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SHARE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)

REQUESTS = Counter("vitrine_requests_total", "Requests answered", ["endpoint", "status"])
LATENCY = Histogram("vitrine_request_seconds", "From first byte to answer", ["endpoint"], buckets=_SECONDS)
STAGE = Histogram("vitrine_stage_seconds", "Stages of a request", ["stage"], buckets=_SECONDS)
FIDELITY_R2 = Histogram(
    "vitrine_fidelity_r2",
    "R2 of the account, an image",
    buckets=(0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 1),
)
ERROR_SHARE = Histogram("vitrine_error_share", "Share of the error row, an image", buckets=_SHARE)
BUNDLE = Gauge(
    "vitrine_bundle_info", "The bundle served", ["name", "digest", "provider"], multiprocess_mode="mostrecent"
)


def exposition() -> bytes:
    """Every series, over all worker processes (`bentoml serve` sets PROMETHEUS_MULTIPROC_DIR for them)."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)
