"""The work on parts of a bulk run: read and decode, infer in full batches, account, write.

Inference runs in the main thread and releases the GIL, so that other threads read the next images, wait for the
processes that decode them, and account for the previous ones. Memory is bounded: a few batches of pixels and two parts
of answers.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger
from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.images.decode import ImageLimits, Note
from vitrine.models.inputs.source import Item, Source
from vitrine.models.interventions.edit import NONE
from vitrine.service.answers.sources import directions, source_accounts
from vitrine.service.engine.decoders import Decoders
from vitrine.service.engine.edits import load_edits, run_edited
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.offline.bulk.errors import BulkError
from vitrine.service.offline.bulk.job import Job
from vitrine.service.offline.bulk.tables import Problem, Sources, row, row_types, short_sources, write_part
from vitrine.service.offline.failures import failure
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import Explain

AHEAD = 4  # batches decoded, or queued for decoding, while one is inferred


class Step(NamedTuple):
    """Progress since the last step."""

    images: int
    problems: int


@dataclass(frozen=True)
class Work:
    """The input of every process that works on a job. Can be pickled."""

    job: Job
    source: Source
    out: Path
    settings: Settings


class _Decoded(NamedTuple):
    item: Item
    pixels: NDArray[np.float32]
    notes: tuple[Note, ...]


class Worker:
    """A bundle and its labels, loaded, for the parts of one job. Raises `EngineError`, `BundleError`."""

    def __init__(self, bundle: Bundle, work: Work) -> None:
        self.bundle, self.work, job = bundle, work, work.job
        _ = bundle.directions, bundle.fold, bundle.cards  # loaded here, not by several threads at once
        unused = {"replacement": False, "sources": job.sources > 0}  # graphs that are not run
        self.engine = Engine(bundle, work.settings.model_copy(update=unused))
        if self.engine.sources is not None:
            self.engine.sources.open()  # an error comes before the first image
        self.edit = load_edits(self.engine, work.settings).chosen(job.edit or NONE)
        if self.edit is not None and self.edit.edit.digest != job.edit_digest:
            raise BulkError(
                f"the edit {job.edit!r} has changed since the run was started; restore it, or write to another folder"
            )
        encoder = LabelEncoder(self.engine, capacity=len(job.labels))
        self.labels = asyncio.run(encoder.resolve(job.labels, job.templates, _call_directly))
        self.engine.warm_up()
        self.reader = work.source.reader()  # one for all parts: it goes forward

    def run(self, parts: Iterable[int]) -> Iterator[Step]:
        """Process these parts one after the other, with a step per batch."""
        bounds = {part: self.work.job.bounds(part) for part in parts}
        items = itertools.chain.from_iterable(self.reader.items(*limits) for limits in bounds.values())
        # two thread pools: one decodes and accounts, one writes
        settings, job = self.work.settings, self.work.job
        types = row_types(job.sources > 0, job.edit is not None, job.columns)
        limits = ImageLimits(job.max_image_pixels, job.max_image_side, job.max_jpeg_pixels)
        decoders = Decoders(
            settings.decode_threads, self.bundle.manifest.preprocessing, limits, settings.decode_seconds
        )
        pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        writing: Future[None] | None = None
        try:
            decoded = self._decoded(items, pool, decoders)
            for part, (start, stop) in bounds.items():
                rows: list[Future[str]] = []
                problems: list[Problem] = []
                yield from self._answer(itertools.islice(decoded, stop - start), pool, rows, problems)
                if writing is not None:
                    writing.result()  # at most one part is being written while the next is computed
                writing = writer.submit(_write, self.work.out, part, rows, problems, types)
            if writing is not None:
                writing.result()
        finally:
            with decoders:  # ended first: a thread may wait for a process
                for threads in (pool, writer):
                    threads.shutdown(wait=False, cancel_futures=True)
            for threads in (pool, writer):
                threads.shutdown()

    def close(self) -> None:
        """Close what is read. The worker can go on, from there anew."""
        self.reader.close()

    def _decoded(
        self, items: Iterable[Item], pool: ThreadPoolExecutor, decoders: Decoders
    ) -> Iterator[_Decoded | Problem]:
        """Decode the items in order, some batches ahead."""
        waiting: deque[Future[_Decoded | Problem]] = deque()
        for item in items:
            waiting.append(pool.submit(_decode, item, decoders))
            if len(waiting) > AHEAD * self.work.settings.batch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _answer(
        self,
        part: Iterable[_Decoded | Problem],
        pool: ThreadPoolExecutor,
        rows: list[Future[str]],
        problems: list[Problem],
    ) -> Iterator[Step]:
        """Infer a part in full batches, without broken images; appends to `rows` and `problems`."""
        batch: list[_Decoded] = []
        for decoded in part:
            if isinstance(decoded, Problem):
                problems.append(decoded)
                yield Step(1, 1)
                continue
            batch.append(decoded)
            if len(batch) == self.work.settings.batch_size:
                rows += self._infer(batch, pool)
                yield Step(len(batch), 0)
                batch = []
        if batch:
            rows += self._infer(batch, pool)
            yield Step(len(batch), 0)

    def _infer(self, batch: list[_Decoded], pool: ThreadPoolExecutor) -> list[Future[str]]:
        job = self.work.job
        common = (self.labels, self.bundle, job.top_k, job.features)
        stacked = np.stack([decoded.pixels for decoded in batch])
        edited = run_edited(self.engine, self.edit, stacked, self.labels.embeddings)
        rows = []
        for (item, pixels, notes), (parts, applied) in zip(batch, edited, strict=True):
            sources, was_edited = self._sources(pixels, parts), None if self.edit is None else applied
            rows.append(pool.submit(row, item.id, item.name, parts, *common, notes, sources, was_edited))
        return rows

    def _sources(self, pixels: NDArray[np.float32], parts: Decomposition) -> Sources | None:
        """The source account of an image's top-1, if the job asks for it.

        It is made here and not in the pool: an image's trace may have tens of megabytes, and must not wait there.
        """
        job, graphs = self.work.job, self.engine.sources
        if not job.sources:
            return None
        assert graphs is not None  # see `make_job`
        explain = Explain(sources=True, source_features=job.sources, baseline=job.baseline)
        values = ledger.logits(parts.embedding, self.labels.embeddings, self.bundle.manifest.logit_scale)
        of = directions(self.labels, explain, int(values.argmax()))
        trace, outputs = graphs.run(pixels, of)
        (account,) = source_accounts(self.bundle, trace, outputs, of, explain)
        return short_sources(account)


def _decode(item: Item, decoders: Decoders) -> _Decoded | Problem:
    try:
        return _Decoded(item, *decoders.decode(item.read()))
    except (ServiceError, OSError) as error:
        code, message = failure(error)
    return Problem(id=item.id, name=item.name, code=code, message=message)


def _write(out: Path, part: int, rows: list[Future[str]], problems: list[Problem], types: Mapping[str, str]) -> None:
    lines = (problem.model_dump_json() for problem in problems)
    write_part(out, part, (row.result() for row in rows), lines, types)


async def _call_directly(function: Callable[..., Any], *arguments: Any, spent: float) -> Any:
    """The label encoder's `run`: call directly, as no other task could be blocked."""
    return function(*arguments)
