"""The reference images with the sparse codes nearest to an image's."""

from __future__ import annotations

import numpy as np

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.features import reference, require_cards
from vitrine.service.answers.notices import to_notices
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.features import SimilarImage, SimilarLayer, SimilarRequest, SimilarResponse


async def answer_similar(
    attributor: Attributor, image: bytes, request: SimilarRequest, request_id: str
) -> SimilarResponse:
    """The reference images with the nearest sparse codes. Raises `ServiceError`."""
    bundle = attributor.bundle
    _check_request(bundle, request)
    timings: dict[str, float] = {}
    with attributor.admit():
        with timed_stage("decode", timings):
            pixels, notes = await attributor.decoded(image)
        parts = await attributor.submit(pixels, timings)
    with timed_stage("retrieve", timings):
        layers = await attributor.query(_nearest, bundle, parts, request)
    return SimilarResponse(
        request_id=request_id,
        model=attributor.model,
        warnings=to_notices(image=notes),
        references=bundle.manifest.cards.references if bundle.manifest.cards else 0,
        layers=layers,
        timings_ms=timings,
    )


def _check_request(bundle: Bundle, request: SimilarRequest) -> None:
    """Raise `ServiceError` no_cards, or invalid_request for layers that do not exist or are named twice."""
    cards, layers, count = require_cards(bundle), request.layers or [], bundle.manifest.shape.layers
    if not len(cards.references[0]):
        raise ServiceError("no_cards", f"the cards of the bundle {bundle.manifest.name!r} have no reference images")
    if unknown := [layer for layer in layers if layer >= count]:
        raise ServiceError("invalid_request", f"there is no layer {unknown[0]}; `layers` may name 0 to {count - 1}")
    if len(set(layers)) < len(layers):
        raise ServiceError("invalid_request", "`layers` must differ from one another; send each layer once")


def _nearest(bundle: Bundle, parts: Decomposition, request: SimilarRequest) -> list[SimilarLayer]:
    """The reference images with the nearest codes at [CLS], layer by layer; ties keep their order."""
    cards = require_cards(bundle)
    layers = request.layers or range(parts.layers)
    neighbours = []
    for layer in layers:
        similarities = cards.similarities(layer, parts.feature_indices[layer], parts.feature_values[layer])
        order = np.argsort(-similarities, kind="stable")[request.offset : request.offset + request.limit]
        neighbours.append((layer, order.tolist(), similarities[order].tolist()))
    numbers = sorted({image for _, order, _ in neighbours for image in order})
    images = dict(zip(numbers, cards.images(numbers), strict=True))
    return [
        SimilarLayer(
            layer=layer,
            images=[
                SimilarImage(**reference(images[image]), similarity=similarity)
                for image, similarity in zip(order, similarities, strict=True)
            ],
        )
        for layer, order, similarities in neighbours
    ]
