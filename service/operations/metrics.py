"""Prometheus metrics across worker processes.

Counters and histograms add up; gauges sum over live processes, except `BUNDLE`, which keeps the newest value.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import mark_process_dead

from vitrine.service.operations.metric_files import AllWorkers
from vitrine.service.processes import metrics_folder

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # the server's workers share it
    metrics_folder.hold(os.environ["PROMETHEUS_MULTIPROC_DIR"])
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
SOURCE_ERROR_SHARE = Histogram(
    "vitrine_source_error_share", "Share of the error rows of a source account, an explanation", buckets=_SHARE
)
AGREES = Counter(
    "vitrine_reconstructed_top1_total", "Images, by whether the top-1 stays without the error row", ["agrees"]
)
LAYER_SHARE = Histogram(
    "vitrine_layer_share",
    "Share of a layer's CLT row, an explanation",
    ["layer"],
    buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1),
)
IN_FLIGHT = Gauge("vitrine_images_in_flight", "Images being decoded, waiting or inferred", multiprocess_mode="livesum")
QUEUE = Gauge("vitrine_queue_images", "Images waiting for the engine", multiprocess_mode="livesum")
IN_FLIGHT_LIMIT = Gauge(
    "vitrine_images_in_flight_limit", "Images that may be in flight; one more is refused", multiprocess_mode="livesum"
)
QUEUE_LIMIT = Gauge("vitrine_queue_images_limit", "Images that may wait", multiprocess_mode="livesum")
BATCH = Histogram("vitrine_batch_images", "Images in an inference", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
REJECTED = Counter("vitrine_rejected_total", "Requests, and images of a batch, refused", ["code"])
CONNECTIONS = Gauge("vitrine_connections", "Connections open", multiprocess_mode="livesum")
CONNECTIONS_LIMIT = Gauge("vitrine_connections_limit", "Connections that may be open", multiprocess_mode="livesum")
CONNECTIONS_REFUSED = Counter("vitrine_connections_refused_total", "Connections ended by a limit", ["reason"])
BYTES_IN_HAND = Gauge(
    "vitrine_bytes_in_hand", "Bytes of bodies received and of answers not sent", multiprocess_mode="livesum"
)
BYTES_IN_HAND_LIMIT = Gauge(
    "vitrine_bytes_in_hand_limit", "Bytes that may be in hand; uploads beyond are refused", multiprocess_mode="livesum"
)
LABELS = Counter("vitrine_labels_total", "Labels, by where their embeddings came from", ["source"])
EDITS = Counter("vitrine_edits_total", "Images asked with an edit, by whether it was applied", ["edit", "applied"])
RELOADS = Counter("vitrine_reloads_total", "Bundles taken over and refused", ["outcome"])
DECODER_RESTARTS = Counter(
    "vitrine_decoder_restarts_total", "Decoder processes that ended and were replaced", ["reason"]
)
BUNDLE = Gauge(
    "vitrine_bundle_info", "The bundle served", ["name", "digest", "provider"], multiprocess_mode="mostrecent"
)

STALL = Histogram(
    "vitrine_loop_stall_seconds",
    "How much later than asked the event loop ran what was due; all requests of the worker wait that long",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
STALL_MAX = Gauge(
    "vitrine_loop_stall_max_seconds", "The longest of them since the worker started", multiprocess_mode="livemax"
)
MEMORY = Gauge(
    "vitrine_memory_bytes", "Resident memory of the workers and of their child processes", multiprocess_mode="livesum"
)
MEMORY_LIMIT = Gauge(
    "vitrine_memory_limit_bytes",
    "Memory that the server may use: the container's, or the machine's",
    multiprocess_mode="livemax",
)


def exposition() -> bytes:
    """Every series, over all worker processes (the server sets PROMETHEUS_MULTIPROC_DIR for them)."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return generate_latest(REGISTRY)
    for file in Path(folder).glob("gauge_live*_*.db"):  # of a killed worker: nothing else marks it as dead
        if not psutil.pid_exists(pid := int(file.stem.rpartition("_")[2])):
            mark_process_dead(pid)
    registry = CollectorRegistry()
    registry.register(AllWorkers(folder))
    return generate_latest(registry)
