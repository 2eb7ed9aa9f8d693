"""The pipeline of `work.py` in several processes, by Ray Data (the extra `bulk`): parts in, what was done out.

Each process loads the bundle and writes the parts that it is given: no answer travels. Where they are on several
machines, bundle, inputs and output must lie at the same paths on all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from vitrine.models.bundle.bundle import open_bundle
from vitrine.service.engine.runtime import available_processors
from vitrine.service.offline.bulk.inputs import BulkError
from vitrine.service.offline.bulk.work import Step, Work, Worker


class _Process:
    """One of Ray's, with a `Worker` in it."""

    def __init__(self, bundle: Path, work: Work) -> None:
        opened = open_bundle(bundle)
        if opened.digest != work.job.bundle:
            raise BulkError(f"{bundle} is another bundle here than where the run was started")
        self._worker = Worker(opened, work)

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        steps = list(self._worker.run(parts["item"].tolist()))
        return {name: np.array([sum(getattr(step, name) for step in steps)]) for name in Step._fields}


def run(bundle: Path, work: Work, parts: list[int], workers: int) -> Iterator[Step]:
    """Do these parts in `workers` processes; a step a part, in any order.

    They share out the processors of the cluster that RAY_ADDRESS names, else of this machine; VITRINE_THREADS says
    how many each takes instead. Raises `BulkError` where there is no such cluster, or it has not as many: Ray would
    wait for them for ever.
    """
    settings = work.settings
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise BulkError(f"no Ray at RAY_ADDRESS={address}: {error}") from error
    else:
        processors, _ = available_processors()
        own = max(processors, workers * settings.threads, workers)
        ray.init(num_cpus=own, include_dashboard=False, **quiet)
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells of its plans, across our progress bar
        ray.data.DataContext.get_current().enable_progress_bars = False
        there = ray.cluster_resources()
        threads = settings.threads or max(1, int(there.get("CPU", 0)) // workers)
        gpus = 0 if settings.provider == "cpu" else 1
        for what, wanted in (("CPU", workers * threads), ("GPU", workers * gpus)):
            if wanted > there.get(what, 0):
                raise BulkError(
                    f"--ray {workers} needs {wanted} {what}s and Ray has {there.get(what, 0):g}; take fewer"
                )
        settings = settings.model_copy(update={"threads": threads})
        shared = Work(work.job, work.source, work.out.resolve(), settings)
        found = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            _Process,
            fn_constructor_args=(bundle.resolve(), shared),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=gpus,
        )
        for done in found.iter_rows():
            yield Step(int(done["images"]), int(done["problems"]))
    finally:
        ray.shutdown()
