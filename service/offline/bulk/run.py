"""A bulk run from end to end: processes the remaining parts of a job, here or by Ray, and shows progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.progress import Progress
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.job import Job, lock_output
from vitrine.service.offline.bulk.ray_alone import ray_alone
from vitrine.service.offline.bulk.tables import count, done_parts, remove_partial_files
from vitrine.service.offline.bulk.work import Step, Work, Worker

NO_LOCKS = (
    "{out} is on a file system without locks, so a second run cannot be kept out. Both would write the same parts, "
    "each of them complete; hidden .part-* files of a killed run are not removed"
)


class Summary(NamedTuple):
    """Totals of the output."""

    rows: int
    problems: int


def bulk(bundle: Bundle, work: Work, console: Console, ray_workers: int = 0) -> Summary:
    """Process the remaining parts of a job, with a progress bar. ray_workers: processes that Ray starts; 0: none.

    Raises `BulkError`, `FileError`, `EngineError`, `BundleError`. However it ends, the same call resumes it.
    """
    with lock_output(work.out, work.job) as (locked, job):
        work = replace(work, job=job)
        if locked:
            remove_partial_files(work.out)
        else:
            console.print(NO_LOCKS.format(out=work.out), style="yellow", markup=False, soft_wrap=True, highlight=False)
        done = done_parts(work.out)
        parts = [part for part in range(work.job.parts) if part not in done]
        if parts:
            steps = _by_ray(bundle, work, parts, ray_workers) if ray_workers else _here(bundle, work, parts)
            _show_progress(steps, work.job, parts, console)
        return Summary(*count(work.out))


def _here(bundle: Bundle, work: Work, parts: list[int]) -> Iterator[Step]:
    with closing(Worker(bundle, work)) as worker:
        yield from worker.run(parts)


def _by_ray(bundle: Bundle, work: Work, parts: list[int], workers: int) -> Iterator[Step]:
    with ray_alone():
        try:
            from vitrine.service.offline.bulk.ray_engine import run
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise BulkError("--ray requires Ray: pip install 'vitrine[bulk]'") from error
        yield from run(bundle.path, work, parts, workers)


def _show_progress(steps: Iterator[Step], job: Job, parts: list[int], console: Console) -> None:
    """Show progress. Work of earlier runs counts as done, but not towards the speed."""
    images = sum(stop - start for start, stop in map(job.bounds, parts))
    problems = 0
    with Progress(console) as progress:
        task = progress.task("bulk", job.inputs.images, "images", job.inputs.images - images)
        for step in steps:
            problems += step.problems
            task.advance(step.images, f"{problems:,} broken" if problems else "")
