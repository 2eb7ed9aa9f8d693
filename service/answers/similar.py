"""The reference images whose sparse codes are nearest to an image's."""

from __future__ import annotations

import numpy as np

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.features import cards_of, reference
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import stage
from vitrine.service.schemas.features import SimilarImage, SimilarLayer, SimilarRequest, SimilarResponse


async def answer_similar(
    attributor: Attributor, image: bytes, request: SimilarRequest, request_id: str
) -> SimilarResponse:
    """The reference images with the nearest sparse codes. Raises `ServiceError`."""
    bundle = attributor.bundle
    _check(bundle, request)
    timings: dict[str, float] = {}
    with attributor.admitted():
        with stage("decode", timings):
            pixels = await attributor.in_thread(attributor.decode, image)
        parts = await attributor.submit(pixels, timings)
    with stage("retrieve", timings):
        layers = await attributor.in_thread(_nearest, bundle, parts, request)
    return SimilarResponse(
        request_id=request_id,
        model=attributor.model,
        references=bundle.manifest.cards.references if bundle.manifest.cards else 0,
        layers=layers,
        timings_ms=timings,
    )


def _check(bundle: Bundle, request: SimilarRequest) -> None:
    """Raise `ServiceError` no_cards, or invalid_request for layers that there are not, or named twice."""
    cards, layers = cards_of(bundle), request.layers or []
    if not len(cards.references[0]):
        raise ServiceError("no_cards", f"the cards of {bundle.manifest.name!r} have no reference images")
    if unknown := [layer for layer in layers if layer >= cards.layers]:
        raise ServiceError("invalid_request", f"layers: there is no layer {unknown[0]}, only 0 to {cards.layers - 1}")
    if len(set(layers)) < len(layers):
        raise ServiceError("invalid_request", "layers must differ from one another")


def _nearest(bundle: Bundle, parts: Decomposition, request: SimilarRequest) -> list[SimilarLayer]:
    """The reference images of the nearest codes at [CLS], layer by layer, equal ones in their order."""
    cards = cards_of(bundle)
    layers = request.layers or range(parts.layers)
    found = []
    for layer in layers:
        near = cards.similarities(layer, parts.feature_indices[layer], parts.feature_values[layer])
        order = np.argsort(-near, kind="stable")[request.offset : request.offset + request.limit]
        found.append((layer, order.tolist(), near[order].tolist()))
    wanted = sorted({image for _, order, _ in found for image in order})
    images = dict(zip(wanted, cards.images(wanted), strict=True))
    return [
        SimilarLayer(
            layer=layer,
            images=[
                SimilarImage(**reference(images[image]), similarity=similarity)
                for image, similarity in zip(order, near, strict=True)
            ],
        )
        for layer, order, near in found
    ]
