"""The pipeline of `work.py` in several processes, by Ray Data (the extra `bulk`): part numbers in, progress out.

Each process loads the bundle and writes its own parts: answers are not sent between processes. If they run on several
machines, bundle, inputs and output must be at the same paths on all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.errors import VitrineError
from vitrine.service.engine.processors import available_processors
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.work import Step, Work, Worker
from vitrine.service.processes.import_path import PACKAGE_PARENT


class _Process:
    """A Ray actor that holds a `Worker`. Our own errors are part of its answers: Ray would make tracebacks of them."""

    def __init__(self, bundle: Path, work: Work) -> None:
        self._worker, self._problem = None, ""
        try:
            opened = open_bundle(bundle)
            if opened.digest != work.job.bundle:
                raise BulkError(f"{bundle} on this machine is not the bundle that the run was started with")
            self._worker = Worker(opened, work)
        except VitrineError as error:
            self._problem = str(error)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        steps: list[Step] = []
        if self._worker is not None:
            try:
                steps = list(self._worker.run(parts["item"].tolist()))
            except VitrineError as error:
                self._problem = str(error)
        counts = {name: np.array([sum(getattr(step, name) for step in steps)]) for name in Step._fields}
        return {**counts, "problem": np.array([self._problem])}


def run(bundle: Path, work: Work, parts: list[int], workers: int) -> Iterator[Step]:
    """Process these parts in `workers` processes, with a step per part, in any order.

    They divide the processors of the cluster that RAY_ADDRESS names, else of this machine; VITRINE_THREADS sets the
    number for each instead. Raises `BulkError` if there is no such cluster or it has too few: Ray would wait for them
    forever; or with the sentence of whatever one of them raised.
    """
    settings = work.settings
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    with chdir(PACKAGE_PARENT):  # Ray puts the directory of this moment on its workers' import path
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(**options)
            except ConnectionError as error:
                raise BulkError(f"cannot connect to Ray at RAY_ADDRESS={address}: {error}") from error
        else:
            processors, _ = available_processors()
            cpus = max(processors, workers * settings.threads, workers)
            try:
                ray.init(num_cpus=cpus, include_dashboard=False, **options)
            except OSError as error:  # no room, or a TMPDIR too long for the names of sockets
                raise BulkError(f"Ray cannot start: {error}; set TMPDIR to a short path with free space") from error
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # it logs its plans, across our progress bar
        ray.data.DataContext.get_current().enable_progress_bars = False
        cluster = ray.cluster_resources()
        threads = settings.threads or max(1, int(cluster.get("CPU", 0)) // workers)
        gpus = 0 if settings.provider == "cpu" else 1
        for name, required in (("CPU", workers * threads), ("GPU", workers * gpus)):
            if required > cluster.get(name, 0):
                raise BulkError(
                    f"--ray {workers} needs {required} {name}s, but Ray has {cluster.get(name, 0):g}; set a smaller "
                    "number"
                )
        settings = settings.model_copy(update={"threads": threads})
        shared = Work(work.job, work.source, work.out.resolve(), settings)
        results = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            _Process,
            fn_constructor_args=(bundle.resolve(), shared),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=gpus,
        )
        for progress in results.iter_rows():
            if progress["problem"]:
                raise BulkError(str(progress["problem"]))
            yield Step(int(progress["images"]), int(progress["problems"]))
    finally:
        ray.shutdown()
