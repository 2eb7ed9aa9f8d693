"""One request from image bytes to answer: decode, queue and infer, account. Knows nothing of HTTP.

Images are decoded and accounts written in a small thread pool, inference runs in the batcher's thread; the event
loop only waits. Used by the HTTP routes and by the command line alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.label_sets import DEFAULT, read_label_sets
from models.ledger import Decomposition
from service import metrics
from service.batcher import Batcher
from service.engine import Engine
from service.errors import ServiceError, queue_full
from service.explain import account, check_explain, lens, matrix, predict
from service.images import ImageLimits, decode, to_pixels
from service.labels import LabelEncoder, LabelSet
from service.schemas import (
    AttributeRequest,
    AttributeResponse,
    ClassifyRequest,
    ClassifyResponse,
    Explanation,
    Fidelity,
    LensLayer,
    Model,
    Prediction,
)
from service.settings import Settings

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
        _ = (
            self.bundle.directions,
            self.bundle.fold,
            self.bundle.attention_fold,
        )  # a damaged table is told now, not in the first answer
        self.engine = await asyncio.to_thread(Engine, self.bundle, settings)
        self.labels = LabelEncoder(self.engine, settings.label_cache)
        async with AsyncExitStack() as stack:  # a start that fails leaves no thread behind
            self._pool = stack.enter_context(ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode"))
            self.batcher = await stack.enter_async_context(
                Batcher(self.engine.explain, settings.batch_size, settings.queue_size)
            )
            await self.batcher.run(self.engine.warm_up)
            await self.labels.add({DEFAULT: self.labels.named[DEFAULT], **self._label_sets}, self.batcher.run)
            self._running = stack.pop_all()
        metrics.BUNDLE.labels(self.model.name, self.model.digest, self.engine.provider).set(1)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()

    async def classify(self, image: bytes, request: ClassifyRequest, request_id: str) -> ClassifyResponse:
        """Predictions alone. Raises `ServiceError`."""
        timings: dict[str, float] = {}
        parts, labels, _ = await self._infer(image, *self._texts(request), timings)
        with _stage("predict", timings):
            scale = self.bundle.manifest.logit_scale
            predictions = await self._run(predict, parts, labels, scale, request.top_k)
        return ClassifyResponse(request_id=request_id, model=self.model, predictions=predictions, timings_ms=timings)

    async def attribute(self, image: bytes, request: AttributeRequest, request_id: str) -> AttributeResponse:
        """Predictions and their account. Raises `ServiceError`."""
        texts, timings = self._texts(request), dict[str, float]()
        explain = request.explain
        check_explain(explain, texts[0], self.settings.max_targets, self.engine)
        details = explain.heatmap or explain.lens
        parts, labels, contributions = await self._infer(image, *texts, timings, details, explain.matrix)
        with _stage("ledger", timings):
            predictions, explanations, lens_layers, fidelity = await self._run(self._account, parts, labels, request)
        metrics.FIDELITY_R2.observe(fidelity.r2)
        metrics.ERROR_SHARE.observe(fidelity.error_share)
        return AttributeResponse(
            request_id=request_id,
            model=self.model,
            predictions=predictions,
            explanations=explanations,
            lens=lens_layers,
            matrix=None if contributions is None else matrix(contributions),
            fidelity=fidelity,
            timings_ms=timings,
        )

    def _account(
        self, parts: Decomposition, labels: LabelSet, request: AttributeRequest
    ) -> tuple[list[Prediction], list[Explanation], list[LensLayer] | None, Fidelity]:
        scale = self.bundle.manifest.logit_scale
        predictions = predict(parts, labels, scale, request.top_k)
        explanations, fidelity = account(parts, labels, self.bundle, request.explain)
        return predictions, explanations, lens(parts, labels, scale) if request.explain.lens else None, fidelity

    async def _infer(
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
        with self._admitted():
            with _stage("decode", timings):
                pixels = await self._run(self._decode, image)
            with _stage("labels", timings):
                label_set = await self.labels.resolve(labels, templates, self.batcher.run)
            inference = await self.batcher.submit(pixels, details)
            contributions = None
            if with_matrix:
                with _stage("matrix", timings):
                    _, (contributions,) = await self.batcher.run(self.engine.replace, pixels[None], self._nothing)
        _note("queue", inference.queue_ms, timings)
        _note("inference", inference.inference_ms, timings)
        return inference.parts, label_set, contributions

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """A place among the images being decoded, waiting or inferred. Raises `ServiceError` queue_full at once."""
        if self._in_flight >= self.settings.queue_size + self.settings.batch_size:
            raise queue_full()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def _decode(self, image: bytes) -> NDArray[np.float32]:
        return to_pixels(decode(image, self.limits), self.bundle.manifest.preprocessing, self.limits)

    def _texts(self, request: ClassifyRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(labels, templates) of a request, defaults filled in, within the limits."""
        settings = self.settings
        if request.labels is not None and request.label_set is not None:
            raise ServiceError("invalid_request", "give `labels` or `label_set`, not both")
        name = request.label_set or DEFAULT
        if (named := self.labels.named.get(name)) is None:
            known = ", ".join(self.labels.named)
            raise ServiceError("unknown_label_set", f"no label set {name[:100]!r}; there are: {known}")
        if request.labels is None and request.templates is None:  # encoded already, whatever its size
            return named.labels, named.templates or self.labels.default_templates
        labels = tuple(request.labels or named.labels)
        templates = tuple(request.templates or self.labels.default_templates)
        if len(labels) > settings.max_labels:
            raise ServiceError("invalid_request", f"{len(labels):,} labels; at most {settings.max_labels:,} are taken")
        if len(templates) > settings.max_templates:
            raise ServiceError(
                "invalid_request", f"{len(templates)} templates; at most {settings.max_templates} are taken"
            )
        if len(labels) * len(templates) > settings.max_prompts:
            raise ServiceError(
                "invalid_request",
                f"{len(labels):,} labels under {len(templates)} templates are {len(labels) * len(templates):,} texts; "
                f"at most {settings.max_prompts:,} are taken",
            )
        if too_long := [text for text in (*labels, *templates) if len(text) > settings.max_label_chars]:
            raise ServiceError(
                "invalid_request",
                f"a label or template has {len(too_long[0]):,} characters; "
                f"at most {settings.max_label_chars} are taken",
            )
        return labels, templates

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


@contextmanager
def _stage(name: str, timings: dict[str, float]) -> Iterator[None]:
    """Time a stage that succeeds."""
    start = perf_counter()
    yield
    _note(name, (perf_counter() - start) * 1e3, timings)


def _note(stage: str, milliseconds: float, timings: dict[str, float]) -> None:
    timings[stage] = milliseconds
    metrics.STAGE.labels(stage).observe(milliseconds / 1e3)
