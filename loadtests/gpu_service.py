"""For gpu_steps.py: the service under growing load, and how busy the GPU and the processors are then."""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pynvml

from latency import drive
from rows import SETTLING, StepFigures, by_step, knee, read_rows
from server import CHECKOUT, Server, serving

RISE = 3.0  # by which p95 may be above that of the smallest rate
BETWEEN = 2  # rates that are tried between the last that was kept up with and the first that was not
Row = dict[str, Any]


class Sample(NamedTuple):
    """The GPU at one moment."""

    at: float  # as time.time()
    busy: float  # share of the last moments in which a kernel ran
    bytes: int
    watts: float


@contextmanager
def watching() -> Iterator[list[Sample]]:
    """Samples of the first GPU, four a second; none where there is no GPU."""
    samples: list[Sample] = []
    over = threading.Event()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # there is no driver
        yield samples
        return

    def watch() -> None:
        device = pynvml.nvmlDeviceGetHandleByIndex(0)
        while not over.wait(0.25):
            busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            used = pynvml.nvmlDeviceGetMemoryInfo(device).used
            samples.append(Sample(time.time(), busy, used, pynvml.nvmlDeviceGetPowerUsage(device) / 1e3))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        pynvml.nvmlShutdown()


def ladder(bundle: Path, settings: dict[str, str], first: int, most: int, seconds: float) -> Iterator[Row]:
    """Rows of rates that double from `first` to at most `most` requests a second, until the service does not keep up or
    p95 is more than `RISE` times that of the first; then some between; then the knee.

    settings: of the service; seconds: of each rate.
    """
    found: list[StepFigures] = []
    workers = int(settings["VITRINE_WORKERS"])
    with serving(bundle, CHECKOUT, **settings) as server:
        rate, good, bad, tried = first, 0, 0, 0
        while rate <= most and tried <= BETWEEN:
            figures, used = _at(server, rate, seconds)
            if figures is None:
                break
            found.append(figures)
            holds = figures.keeps_up and figures.percentiles[95] <= RISE * found[0].percentiles[95]
            yield {"workers": workers, "rate": rate, "holds": holds, **_figures(figures), **used}
            good, bad = (rate, bad) if holds else (good, rate)
            if not good:
                break
            tried += bool(bad)
            rate = round((good * bad) ** 0.5) if bad else 2 * rate
    limit = knee(found)
    yield {"workers": workers, "knee": limit.offered if limit else None, "steady_to": good or None}


def _at(server: Server, rate: int, seconds: float) -> tuple[StepFigures | None, Row]:
    """What clients saw at one rate, and what it took; None: too few answers to say anything."""
    with tempfile.TemporaryDirectory() as scratch, watching() as samples:
        file = Path(scratch) / "rows.csv"
        service, client = server.processor_seconds(), _children()
        drive(server.url, "attribute", "steady", rate, seconds, file)
        service, client = server.processor_seconds() - service, _children() - client
        answers = read_rows(file) if file.exists() else []
    steps = by_step(answers)
    good = sum(row.status == 200 for row in answers)
    used = {
        "service_ms_an_answer": service / good * 1e3 if good else None,
        "service_processors": service / seconds,
        "client_processors": client / seconds,
        **(_gpu(samples, answers[0].seconds + SETTLING, answers[-1].seconds) if answers else {}),
    }
    return (steps[0] if steps else None), used


def _gpu(samples: list[Sample], begin: float, end: float) -> Row:
    """Of the time under load: how busy the GPU was, and its watts, on average; the most of its memory."""
    under_load = [sample for sample in samples if begin <= sample.at <= end]
    if not under_load:
        return {}
    return {
        "gpu_busy": mean(sample.busy for sample in under_load),
        "gpu_watts": mean(sample.watts for sample in under_load),
        "gpu_bytes": max(sample.bytes for sample in under_load),
    }


def _children() -> float:
    """Processor seconds of processes that this one started and that have ended: locust, its start included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _figures(figures: StepFigures) -> Row:
    percentiles = {f"p{at}_ms": value for at, value in figures.percentiles.items()}
    return {"answered": figures.answered, "refused": figures.refused, "failed": figures.failed, **percentiles}
