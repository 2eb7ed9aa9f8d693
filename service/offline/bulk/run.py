"""A bulk run from end to end: what is left of a job is done, here or by Ray, and shown as it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vitrine.models.bundle.bundle import Bundle
from vitrine.service.offline.bulk.inputs import BulkError
from vitrine.service.offline.bulk.job import Job, claimed
from vitrine.service.offline.bulk.tables import count, done_parts, sweep
from vitrine.service.offline.bulk.work import Step, Work, Worker


class Summary(NamedTuple):
    """What lies in the output."""

    rows: int
    problems: int


def bulk(bundle: Bundle, work: Work, console: Console, ray_workers: int = 0) -> Summary:
    """Do what is left of a job, with a progress bar. ray_workers: processes that Ray starts; 0: this one alone.

    Raises `BulkError`, `EngineError`, `BundleError`. Whatever ends it, the same call takes it up.
    """
    with claimed(work.out, work.job):
        sweep(work.out)
        done = done_parts(work.out)
        left = [part for part in range(work.job.parts) if part not in done]
        if left:
            steps = _by_ray(bundle, work, left, ray_workers) if ray_workers else Worker(bundle, work).run(left)
            _follow(steps, work.job, left, console)
        return Summary(*count(work.out))


def _by_ray(bundle: Bundle, work: Work, parts: list[int], workers: int) -> Iterator[Step]:
    try:
        from vitrine.service.offline.bulk.ray_engine import run
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise BulkError("--ray needs Ray: pip install 'vitrine[bulk]'") from error
    return run(bundle.path, work, parts, workers)


def _follow(steps: Iterator[Step], job: Job, left: list[int], console: Console) -> None:
    """Show how far it is. What earlier runs have done counts as done, and not as speed."""
    images = sum(stop - start for start, stop in map(job.bounds, left))
    columns = (
        TextColumn("bulk"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("[yellow]{task.fields[broken]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    problems = 0
    with Progress(*columns, console=console) as progress:
        total = job.inputs.images
        task = progress.add_task("bulk", total=total, completed=total - images, speed="", broken="")
        for step in steps:
            problems += step.problems
            speed = progress.tasks[task].speed
            progress.update(
                task,
                advance=step.images,
                speed=f"{speed:.1f} images/s" if speed else "",
                broken=f"{problems:,} broken" if problems else "",
            )
