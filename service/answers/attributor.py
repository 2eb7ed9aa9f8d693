"""A bundle that is ready to answer: what every kind of question needs. Knows nothing of HTTP.

Images are decoded and accounts written in a small thread pool, inference runs in the batcher's thread; the event
loop only waits. The questions themselves are functions of their own, beside this file: `attribute`, `classify`,
`embed`, `similar`. Used by the HTTP routes and by the command line alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import DEFAULT, read_label_sets
from vitrine.service.answers.texts import Texts, texts_of
from vitrine.service.engine.batcher import Batcher
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.images import ImageLimits, decode, to_pixels
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.errors import queue_full
from vitrine.service.operations import metrics
from vitrine.service.operations.settings import Settings
from vitrine.service.operations.stages import note, stage
from vitrine.service.schemas.base import Model
from vitrine.service.schemas.classify import ClassifyRequest

Result = TypeVar("Result")


class Attributor:
    """A bundle, ready to answer. Use as an async context manager; entering it loads and warms up, and may raise
    `BundleError` or `EngineError`."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle, self.settings = bundle, settings
        self.model = Model(name=bundle.manifest.name, digest=bundle.digest)
        self._nothing = np.zeros((bundle.manifest.shape.layers, 2), bool)  # replaced: CLIP as it is
        self._in_flight = 0
        self.limits = ImageLimits(settings.max_image_pixels, settings.max_image_side)

    async def __aenter__(self) -> Attributor:
        settings = self.settings
        self._label_sets = await asyncio.to_thread(read_label_sets, settings.label_sets) if settings.label_sets else {}
        # a damaged table is told now, not in the first answer
        _ = self.bundle.directions, self.bundle.fold, self.bundle.attention_fold
        await asyncio.to_thread(getattr, self.bundle, "cards")
        self.engine = await asyncio.to_thread(Engine, self.bundle, settings)
        self.labels = LabelEncoder(self.engine, settings.label_cache)
        async with AsyncExitStack() as stack:  # a start that fails leaves no thread behind
            self._pool = stack.enter_context(ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode"))
            self.batcher = await stack.enter_async_context(
                Batcher(self.engine.explain, settings.batch_size, settings.batch_wait_ms)
            )
            await self.batcher.run(self.engine.warm_up)
            await self.labels.add({DEFAULT: self.labels.named[DEFAULT], **self._label_sets}, self.batcher.run)
            self._running = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    def announce(self) -> None:
        """Say in /metrics that this bundle is in service, and how much it takes on."""
        metrics.IN_FLIGHT_LIMIT.set(self.settings.capacity)
        metrics.QUEUE_LIMIT.set(self.settings.queue_size)
        metrics.BUNDLE.labels(self.model.name, self.model.digest, self.engine.provider).set(1)

    def withdraw(self) -> None:
        """Say that it no longer is."""
        metrics.BUNDLE.labels(self.model.name, self.model.digest, self.engine.provider).set(0)

    @property
    def is_full(self) -> bool:
        """Whether not one image more would find a place."""
        return self._in_flight >= self.settings.capacity

    async def label_set(self, request: ClassifyRequest) -> LabelSet:
        """The labels that a request would be answered with. Raises `ServiceError`."""
        return await self.labels.resolve(*self.texts(request), self.batcher.run)

    def texts(self, request: ClassifyRequest) -> Texts:
        """(labels, templates) of a request. Raises `ServiceError`."""
        return texts_of(request, self.labels, self.settings)

    @contextmanager
    def admitted(self, images: int = 1) -> Iterator[None]:
        """Places among the images being decoded, waiting or inferred. Raises `ServiceError` queue_full at once."""
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
    ) -> tuple[Decomposition, LabelSet, NDArray[np.floating] | None]:
        """The image's decomposition, the labels' embeddings and, if wanted, C [2, L, L] (`Engine.replace`); the stages'
        times go into `timings`."""
        with stage("decode", timings):
            pixels = await self.in_thread(self.decode, image)
        with stage("labels", timings):
            label_set = await self.labels.resolve(labels, templates, self.batcher.run)
        parts = await self.submit(pixels, timings, details)
        contributions = None
        if with_matrix:
            with stage("matrix", timings):
                _, (contributions,) = await self.batcher.run(self.engine.replace, pixels[None], self._nothing)
        return parts, label_set, contributions

    async def submit(
        self, pixels: NDArray[np.float32], timings: dict[str, float], details: bool = False
    ) -> Decomposition:
        """One image through the vision graph; waiting and inference go into `timings`."""
        inference = await self.batcher.submit(pixels, details)
        note("queue", inference.queue_ms, timings, ended_ms_ago=inference.inference_ms)
        note("inference", inference.inference_ms, timings)
        return inference.parts

    def decode(self, image: bytes) -> NDArray[np.float32]:
        """Normalised pixels [3, H, W]. Raises `ServiceError`."""
        return to_pixels(decode(image, self.limits), self.bundle.manifest.preprocessing, self.limits)

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """function(*args), in the pool of threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
