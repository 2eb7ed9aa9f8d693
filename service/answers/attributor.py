"""One request from image bytes to answer: decode, queue and infer, account. Knows nothing of HTTP.

Images are decoded and accounts written in a small thread pool, inference runs in the batcher's thread; the event
loop only waits. Used by the HTTP routes and by the command line alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.label_sets import DEFAULT, read_label_sets
from vitrine.service.answers.explain import account, check_explain, lens, matrix, predict
from vitrine.service.answers.features import card, check_similar, search, similar
from vitrine.service.engine.batcher import Batcher
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.images import ImageLimits, decode, to_pixels
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.errors import ServiceError, queue_full
from vitrine.service.operations import metrics
from vitrine.service.operations.settings import Settings
from vitrine.service.operations.stages import note, stage
from vitrine.service.schemas.features import (
    CardResponse,
    FeaturesQuery,
    FeaturesResponse,
    SimilarRequest,
    SimilarResponse,
)
from vitrine.service.schemas.schemas import (
    AttributeRequest,
    AttributeResponse,
    Attribution,
    BatchItem,
    BatchResponse,
    ClassifyRequest,
    ClassifyResponse,
    EmbedRequest,
    EmbedResponse,
    Explanation,
    Fidelity,
    ItemError,
    LensLayer,
    Model,
    Prediction,
)

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

    async def classify(self, image: bytes, request: ClassifyRequest, request_id: str) -> ClassifyResponse:
        """Predictions alone. Raises `ServiceError`."""
        timings: dict[str, float] = {}
        with self._admitted():
            parts, labels, _ = await self._infer(image, *self._texts(request), timings)
        with stage("predict", timings):
            scale = self.bundle.manifest.logit_scale
            predictions = await self._run(predict, parts, labels, scale, request.top_k)
        return ClassifyResponse(request_id=request_id, model=self.model, predictions=predictions, timings_ms=timings)

    async def attribute(self, image: bytes, request: AttributeRequest, request_id: str) -> AttributeResponse:
        """Predictions and their account. Raises `ServiceError`."""
        texts = self._checked(request)
        with self._admitted():
            found = await self._attribute(image, request, *texts)
        return AttributeResponse(request_id=request_id, model=self.model, **dict(found))

    async def attribute_batch(
        self, images: Sequence[bytes | ServiceError], request: AttributeRequest, request_id: str
    ) -> BatchResponse:
        """The same for each of at most `settings.images_a_request` images; one that cannot be answered has its error in
        its place.

        Raises `ServiceError` for what concerns all of them. They are admitted together or not at all.
        """
        texts = self._checked(request)

        async def item(image: bytes | ServiceError) -> BatchItem:
            try:
                if isinstance(image, ServiceError):
                    raise image
                return BatchItem(status=200, answer=await self._attribute(image, request, *texts), error=None)
            except ServiceError as error:
                metrics.REJECTED.labels(error.code).inc()
                problem = ItemError(code=error.code, message=error.message, details=error.details)
                return BatchItem(status=error.status, answer=None, error=problem)

        with self._admitted(len(images)):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(item(image)) for image in images]
        return BatchResponse(request_id=request_id, model=self.model, results=[task.result() for task in tasks])

    async def embed(self, image: bytes | None, request: EmbedRequest, request_id: str) -> EmbedResponse:
        """Unit embeddings of an image, of texts, or of both. Raises `ServiceError`."""
        if image is None and request.texts is None:
            raise ServiceError("missing_image", "send an image, `texts`, or both")
        timings: dict[str, float] = {}
        embedding = texts = None
        with self._admitted():
            if image is not None:
                with stage("decode", timings):
                    pixels = await self._run(self._decode, image)
                embedding = (await self._submit(pixels, timings)).embedding
            if request.texts is not None:
                self._check_texts(tuple(request.texts), ("{}",))
                with stage("labels", timings):
                    texts = (await self.labels.resolve(tuple(request.texts), ("{}",), self.batcher.run)).embeddings
        return EmbedResponse(
            request_id=request_id,
            model=self.model,
            embedding=None if embedding is None else embedding.tolist(),
            text_embeddings=None if texts is None else texts.tolist(),
            timings_ms=timings,
        )

    async def similar(self, image: bytes, request: SimilarRequest, request_id: str) -> SimilarResponse:
        """The reference images with the nearest sparse codes. Raises `ServiceError`."""
        check_similar(self.bundle, request)
        timings: dict[str, float] = {}
        with self._admitted():
            with stage("decode", timings):
                pixels = await self._run(self._decode, image)
            parts = await self._submit(pixels, timings)
        with stage("retrieve", timings):
            layers = await self._run(similar, self.bundle, parts, request)
        return SimilarResponse(
            request_id=request_id,
            model=self.model,
            references=self.bundle.manifest.cards.references if self.bundle.manifest.cards else 0,
            layers=layers,
            timings_ms=timings,
        )

    async def label_set(self, request: ClassifyRequest) -> LabelSet:
        """The labels that a request would be answered with. Raises `ServiceError`."""
        return await self.labels.resolve(*self._texts(request), self.batcher.run)

    async def card(self, layer: int, index: int) -> CardResponse:
        """What is known of one feature. Raises `ServiceError`."""
        return await self._run(card, self.bundle, self.model, layer, index)

    async def search(self, query: FeaturesQuery) -> FeaturesResponse:
        """A page of labelled features. Raises `ServiceError`."""
        return await self._run(search, self.bundle, self.model, query)

    def _checked(self, request: AttributeRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
        texts = self._texts(request)
        check_explain(request.explain, texts[0], self.settings.max_targets, self.engine)
        return texts

    async def _attribute(
        self, image: bytes, request: AttributeRequest, labels: tuple[str, ...], templates: tuple[str, ...]
    ) -> Attribution:
        timings, explain = dict[str, float](), request.explain
        parts, label_set, contributions = await self._infer(
            image, labels, templates, timings, explain.heatmap or explain.lens, explain.matrix
        )
        with stage("ledger", timings):
            predictions, explanations, lens_layers, fidelity = await self._run(self._account, parts, label_set, request)
        _observe(explanations, fidelity)
        return Attribution(
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
        with stage("decode", timings):
            pixels = await self._run(self._decode, image)
        with stage("labels", timings):
            label_set = await self.labels.resolve(labels, templates, self.batcher.run)
        parts = await self._submit(pixels, timings, details)
        contributions = None
        if with_matrix:
            with stage("matrix", timings):
                _, (contributions,) = await self.batcher.run(self.engine.replace, pixels[None], self._nothing)
        return parts, label_set, contributions

    async def _submit(
        self, pixels: NDArray[np.float32], timings: dict[str, float], details: bool = False
    ) -> Decomposition:
        inference = await self.batcher.submit(pixels, details)
        note("queue", inference.queue_ms, timings, ended_ms_ago=inference.inference_ms)
        note("inference", inference.inference_ms, timings)
        return inference.parts

    @contextmanager
    def _admitted(self, images: int = 1) -> Iterator[None]:
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

    def _decode(self, image: bytes) -> NDArray[np.float32]:
        return to_pixels(decode(image, self.limits), self.bundle.manifest.preprocessing, self.limits)

    def _texts(self, request: ClassifyRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(labels, templates) of a request, defaults filled in, within the limits."""
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
        self._check_texts(labels, templates)
        return labels, templates

    def _check_texts(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> None:
        """Raises `ServiceError` beyond the limits."""
        settings = self.settings
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

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


def _observe(explanations: list[Explanation], fidelity: Fidelity) -> None:
    """What an account says about the bundle, for those who watch over many."""
    metrics.FIDELITY_R2.observe(fidelity.r2)
    metrics.ERROR_SHARE.observe(fidelity.error_share)
    metrics.AGREES.labels(str(fidelity.reconstructed_top1_agrees).lower()).inc()
    for layer in explanations[0].layers:  # of the first target: the layers are as many series as there should be
        metrics.LAYER_SHARE.labels(layer.layer).observe(layer.share)
