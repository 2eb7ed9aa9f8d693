"""A loaded bundle, with what every kind of question needs to be answered. Independent of HTTP.

Images are decoded in processes of their own, for which a few threads wait; accounts are computed in one thread,
inference runs in the batcher's, and the event loop only waits. The questions themselves are functions in the files
beside this one: `attribute`, `classify`, `embed`, `similar`. Used by both the HTTP routes and the command line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle, BundleError
from vitrine.models.bundle.label_sets import DEFAULT, read_label_sets
from vitrine.models.bundle.layout import CARDS
from vitrine.models.images.decode import Note
from vitrine.models.interventions.network import BundleNetwork
from vitrine.service.answers.notices import refuse, to_notices
from vitrine.service.answers.texts import Texts, resolve_texts
from vitrine.service.engine.batcher import Batcher
from vitrine.service.engine.decoders import Decoded, Decoders
from vitrine.service.engine.edits import Edited, ServedEdit, load_edits, rerun, rerun_graph
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.engine.on_first_use import GraphsOnFirstUse
from vitrine.service.engine.runtime import EngineError, session_errors
from vitrine.service.errors import ServiceError, queue_full
from vitrine.service.operations import metrics
from vitrine.service.operations.logs import logger
from vitrine.service.operations.settings import Settings
from vitrine.service.operations.stages import record_stage, timed_stage
from vitrine.service.schemas.base import Model, Notice
from vitrine.service.schemas.classify import LabelsRequest
from vitrine.service.schemas.edits import EditUsed

Result = TypeVar("Result")

_turns: ContextVar[asyncio.Semaphore | None] = ContextVar("turns", default=None)  # see `Attributor.taking_turns`


class Inferred(NamedTuple):
    """What an image's answer is made of."""

    parts: Decomposition
    labels: LabelSet
    pixels: NDArray[np.float32]  # [3, H, W], normalised
    contributions: NDArray[np.floating] | None  # C [2, L, L] (`Engine.replace`), if requested
    notes: tuple[Note, ...]  # of the image
    edit: EditUsed | None  # what `parts` are of

    @property
    def warnings(self) -> list[Notice]:
        """All that the answer says beside what was asked for."""
        return to_notices(self.labels.notices, self.notes)


class Attributor:
    """A bundle, ready to answer. Use as an async context manager; entering it loads the bundle and warms it up, and
    may raise `BundleError`, `LabelSetError`, `EditError` or `EngineError`."""

    def __init__(self, bundle: Bundle, settings: Settings, in_service: Batcher | None = None) -> None:
        """in_service: of the bundle that this one replaces; label sets are encoded between that one's batches."""
        self.bundle, self.settings, self._in_service = bundle, settings, in_service
        self.model = Model(name=bundle.manifest.name, digest=bundle.digest)
        self._no_replacement = np.zeros((bundle.manifest.shape.layers, 2), bool)  # CLIP as it is
        self.one_circuit = asyncio.Semaphore(1)
        self._openings: dict[str, asyncio.Task[None]] = {}  # of graphs, by their name
        self._in_flight = 0
        self.since = int(time.time())  # when it came into service, or began to
        self._decoders = Decoders(
            settings.decode_threads, bundle.manifest.preprocessing, settings.image_limits, settings.decode_seconds
        )

    async def __aenter__(self) -> Attributor:
        settings = self.settings
        self._label_sets = await asyncio.to_thread(read_label_sets, settings.label_sets) if settings.label_sets else {}
        # read now, so that a damaged table fails the start and not the first request; beside the event loop, which
        # answers with the previous bundle meanwhile
        for table in ("directions", "fold", "attention_fold", "baseline", *CARDS.values()):
            await asyncio.to_thread(getattr, self.bundle, table)
        self.engine = await asyncio.to_thread(Engine, self.bundle, settings)
        self.edits = await asyncio.to_thread(load_edits, self.engine, settings)
        self.labels = await asyncio.to_thread(LabelEncoder, self.engine, settings.label_cache)
        async with AsyncExitStack() as stack:  # a failed start leaves no thread behind
            self._waiters = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="account")
            self._queries = ThreadPoolExecutor(1, thread_name_prefix="cards")
            for pool in (self._waiters, self._thread, self._queries):
                stack.push_async_callback(asyncio.to_thread, pool.shutdown)  # waits for what its threads still do
            stack.enter_context(self._decoders)  # left before the threads are, which may wait for a process
            stack.push_async_callback(self._end_openings)
            await asyncio.to_thread(self._decoders.start)
            self.batcher = await stack.enter_async_context(
                Batcher(self.engine.explain, settings.batch_size, settings.batch_wait_ms)
            )
            await self.batcher.run(self.engine.warm_up)
            run = (self._in_service or self.batcher).run_between
            self._in_service = None
            with session_errors(self.bundle.path / "text.onnx"):
                await self.labels.add({DEFAULT: self.labels.named[DEFAULT], **self._label_sets}, run)
            await asyncio.to_thread(self._decoders.wait)
            self._resources = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resources.aclose()

    def announce(self) -> None:
        """Report in /metrics that this bundle is in service, and its limits."""
        metrics.IN_FLIGHT_LIMIT.set(self.settings.capacity)
        metrics.QUEUE_LIMIT.set(self.settings.queue_size)
        metrics.BUNDLE.labels(self.model.name, self.model.digest, self.engine.provider).set(1)

    def withdraw(self) -> None:
        """Report in /metrics that this bundle is no longer in service."""
        metrics.BUNDLE.labels(self.model.name, self.model.digest, self.engine.provider).set(0)

    @cached_property
    def network(self) -> BundleNetwork:
        """What interventions have to know; its tables are read once. Raises `InterventionError` for a bundle from
        before interventions."""
        return BundleNetwork(self.bundle)

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another image."""
        return self._in_flight >= self.settings.capacity

    async def label_set(self, request: LabelsRequest) -> LabelSet:
        """The label set of a request. Raises `ServiceError`."""
        return await self.labels.resolve(*self.texts(request), self.batcher.run_between)

    def texts(self, request: LabelsRequest) -> Texts:
        """(labels, templates) of a request. Raises `ServiceError`."""
        return resolve_texts(request, self.labels, self.settings)

    async def check_labels(self, texts: Texts, strict: bool, field: str = "labels") -> None:
        """Raise `ServiceError` for a strict request with labels that there is something to say of."""
        if strict:
            refuse(await self.labels.notices(*texts), field)

    @contextmanager
    def admit(self, images: int = 1) -> Iterator[None]:
        """Reserve places for images to be decoded, queued and inferred. Raises `ServiceError` queue_full at once."""
        if self._in_flight + images > self.settings.capacity:
            raise queue_full()
        self._in_flight += images
        metrics.IN_FLIGHT.inc(images)
        try:
            yield
        finally:
            self._in_flight -= images
            metrics.IN_FLIGHT.dec(images)

    async def infer(
        self,
        image: bytes,
        labels: tuple[str, ...],
        templates: tuple[str, ...],
        timings: dict[str, float],
        details: bool = False,
        with_matrix: bool = False,
        components: bool = False,
        edit: ServedEdit | None = None,
    ) -> Inferred:
        """What the image's answer is made of. Adds the stages' times to `timings`. With an edit there are neither
        details nor matrix (`check_edited`)."""
        with timed_stage("decode", timings):
            pixels, notes = await self.decoded(image)
        with timed_stage("labels", timings):
            label_set = await self.labels.resolve(labels, templates, self.batcher.run_between)
        used = contributions = None
        if edit is None:
            parts = await self.submit(pixels, timings, details, components)
        else:
            parts, used = await self.edited(edit, pixels, label_set, timings)
        if with_matrix:
            with timed_stage("matrix", timings):
                replacement = self.engine.replacement
                assert replacement is not None  # see `check_explain`
                await self.open(replacement)
                _, (contributions,) = await self.batcher.run(replacement.run, pixels[None], self._no_replacement)
        return Inferred(parts, label_set, pixels, contributions, notes, used)

    async def edited(
        self, edit: ServedEdit, pixels: NDArray[np.float32], labels: LabelSet | None, timings: dict[str, float]
    ) -> tuple[Decomposition, EditUsed]:
        """One image with an edit. labels: of the request; None: it has none, and where labels decide whether the edit
        is applied, the bundle's own do."""
        if labels is None and edit.needs_labels:
            default = self.labels.named[DEFAULT]
            templates = default.templates or self.labels.default_templates
            labels = await self.labels.resolve(default.labels, templates, self.batcher.run_between)
        embeddings = None if labels is None else labels.embeddings
        plain = None
        if edit.needs_plain:
            plain = await self.submit(pixels, timings, edit.needs_details, edit.is_direct)
        with timed_stage("edit", timings):
            if plain is not None and edit.is_direct:
                found = await self.in_thread(edit.directly, plain, embeddings)
            elif plain is not None and not edit.may_apply(plain):
                found = Edited(plain, False)
            else:
                await self.open(rerun_graph(self.engine, edit))
                (parts,) = await self.batcher.run_between(rerun, self.engine, edit, pixels[None], spent=0.0)
                found = Edited(parts, True) if plain is None else edit.compared(plain, parts, embeddings)
        metrics.EDITS.labels(edit.edit.name, str(found.applied).lower()).inc()
        return found.parts, edit.used(found.applied)

    async def submit(
        self, pixels: NDArray[np.float32], timings: dict[str, float], details: bool = False, components: bool = False
    ) -> Decomposition:
        """Run one image through the vision graph. Adds the times of queueing and inference to `timings`."""
        inference = await self.batcher.submit(pixels, details, components)
        record_stage("queue", inference.queue_ms, timings, ended_ms_ago=inference.inference_ms)
        record_stage("inference", inference.inference_ms, timings)
        return inference.parts

    async def open(self, graphs: GraphsOnFirstUse[Any]) -> None:
        """Open graphs unless they are, once for all that ask meanwhile, in a thread where no inference waits for it.

        A cancelled caller stops no opening. Raises `ServiceError` internal for all that wait; the log says why.
        """
        if graphs.is_open:
            return
        opening = self._openings.get(graphs.name)
        if opening is None:
            opening = self._openings[graphs.name] = asyncio.create_task(self._open(graphs))
            opening.add_done_callback(partial(self._opened, graphs.name))
        await asyncio.shield(opening)

    async def _open(self, graphs: GraphsOnFirstUse[Any]) -> None:
        start = time.perf_counter()
        try:
            await asyncio.to_thread(graphs.open)
        except (BundleError, EngineError) as error:
            logger.error("the graphs of %s cannot be opened: %s", graphs.name, error)
            raise ServiceError(
                "internal",
                f"the graphs of {graphs.name} of the bundle {self.model.name!r} cannot be opened; the service's log "
                "has the reason, and the next request that needs them tries again",
            ) from error
        logger.info("the graphs of %s were opened in %.2f s", graphs.name, time.perf_counter() - start)

    def _opened(self, name: str, opening: asyncio.Task[None]) -> None:
        del self._openings[name]
        if not opening.cancelled():
            opening.exception()  # was raised where it was waited for, and logged: nobody may wait any more

    async def _end_openings(self) -> None:
        await asyncio.gather(*self._openings.values(), return_exceptions=True)

    def can_decode(self) -> bool:
        """Whether images can be decoded: false while no process can be started for it."""
        return self._decoders.can_decode()

    def decode(self, image: bytes) -> Decoded:
        """Raises `ServiceError`."""
        return self._decoders.decode(image)

    @contextmanager
    def taking_turns(self) -> Iterator[None]:
        """For a request of many images: only as many of them wait for a decoder, or for the thread, as there are
        decoders, so that other requests need not wait for all of its images."""
        token = _turns.set(asyncio.Semaphore(self.settings.decode_threads))
        try:
            yield
        finally:
            _turns.reset(token)

    async def decoded(self, image: bytes) -> Decoded:
        """An image's pixels, by a decoder, and its notes. Raises `ServiceError`."""
        async with _turns.get() or nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self._waiters, self.decode, image)

    async def in_thread(self, function: Callable[..., Result], *args: Any, in_turn: bool = True) -> Result:
        """Call function(*args) in the thread for accounts and answers.

        There is one: two would take turns with each other at the GIL before the event loop had one, and gain little.
        in_turn: False for what ends a call that had its turn.
        """
        async with (in_turn and _turns.get()) or nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def query(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call function(*args), which reads the cards, in a thread where many of them delay no account."""
        return await asyncio.get_running_loop().run_in_executor(self._queries, function, *args)
