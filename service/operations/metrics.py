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

REQUESTS = Counter("vitrine_requests_total", "Number of answered requests", ["endpoint", "status"])
LATENCY = Histogram(
    "vitrine_request_seconds", "Time from the first byte of a request to its answer", ["endpoint"], buckets=_SECONDS
)
STAGE = Histogram("vitrine_stage_seconds", "Time of each stage of a request", ["stage"], buckets=_SECONDS)
FIDELITY_R2 = Histogram(
    "vitrine_fidelity_r2",
    "R2 of the account of an image",
    buckets=(0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 1),
)
ERROR_SHARE = Histogram("vitrine_error_share", "Share of the error row in the account of an image", buckets=_SHARE)
SOURCE_ERROR_SHARE = Histogram(
    "vitrine_source_error_share", "Share of the error rows in a source account", buckets=_SHARE
)
AGREES = Counter(
    "vitrine_reconstructed_top1_total",
    "Number of images, by whether the top-1 stays the same without the error row",
    ["agrees"],
)
LAYER_SHARE = Histogram(
    "vitrine_layer_share",
    "Share of a layer's CLT row in an account",
    ["layer"],
    buckets=(0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1),
)
IN_FLIGHT = Gauge(
    "vitrine_images_in_flight", "Number of images being decoded, waiting or in inference", multiprocess_mode="livesum"
)
QUEUE = Gauge("vitrine_queue_images", "Number of images waiting for the engine", multiprocess_mode="livesum")
IN_FLIGHT_LIMIT = Gauge(
    "vitrine_images_in_flight_limit",
    "Maximum number of images in flight; more are refused",
    multiprocess_mode="livesum",
)
QUEUE_LIMIT = Gauge("vitrine_queue_images_limit", "Maximum number of waiting images", multiprocess_mode="livesum")
BATCH = Histogram("vitrine_batch_images", "Number of images per inference", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
REJECTED = Counter("vitrine_rejected_total", "Number of refused requests, and of refused images in batches", ["code"])
CONNECTIONS = Gauge("vitrine_connections", "Number of open connections", multiprocess_mode="livesum")
CONNECTIONS_LIMIT = Gauge(
    "vitrine_connections_limit", "Maximum number of open connections", multiprocess_mode="livesum"
)
CONNECTIONS_REFUSED = Counter(
    "vitrine_connections_refused_total",
    "Number of connections that were closed or refused because of a limit",
    ["reason"],
)
BYTES_IN_HAND = Gauge(
    "vitrine_bytes_in_hand", "Size of received request bodies and unsent answers", multiprocess_mode="livesum"
)
BYTES_IN_HAND_LIMIT = Gauge(
    "vitrine_bytes_in_hand_limit",
    "Maximum size of received request bodies and unsent answers; uploads beyond it are refused",
    multiprocess_mode="livesum",
)
LABELS = Counter("vitrine_labels_total", "Number of labels, by where their embeddings came from", ["source"])
EDITS = Counter(
    "vitrine_edits_total", "Number of images sent with an edit, by whether it was applied", ["edit", "applied"]
)
RELOADS = Counter(
    "vitrine_reloads_total", "Number of reloads, by whether the new bundle was taken or refused", ["outcome"]
)
DECODER_RESTARTS = Counter(
    "vitrine_decoder_restarts_total", "Number of decoder processes that ended and were replaced", ["reason"]
)
BUNDLE = Gauge(
    "vitrine_bundle_info", "The bundle in service", ["name", "digest", "provider"], multiprocess_mode="mostrecent"
)

STALL = Histogram(
    "vitrine_loop_stall_seconds",
    "Delay of the event loop; all requests of the worker wait this long",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
STALL_MAX = Gauge(
    "vitrine_loop_stall_max_seconds",
    "Longest delay of the event loop since the worker started",
    multiprocess_mode="livemax",
)
MEMORY = Gauge(
    "vitrine_memory_bytes", "Resident memory of the workers and their child processes", multiprocess_mode="livesum"
)
MEMORY_LIMIT = Gauge(
    "vitrine_memory_limit_bytes",
    "Memory that the server may use: the container's limit, or the machine's memory",
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
