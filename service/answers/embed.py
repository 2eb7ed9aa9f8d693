"""Unit embeddings of an image, of texts, or of both."""

from __future__ import annotations

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.texts import check_texts
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.embed import EmbedRequest, EmbedResponse


async def answer_embed(
    attributor: Attributor, image: bytes | None, request: EmbedRequest, request_id: str
) -> EmbedResponse:
    """Unit embeddings of an image, of texts, or of both. Raises `ServiceError`."""
    if image is None and request.texts is None:
        raise ServiceError("missing_image", "send an image, `texts`, or both")
    timings: dict[str, float] = {}
    embedding = texts = None
    with attributor.admit():
        if image is not None:
            with timed_stage("decode", timings):
                pixels = await attributor.in_thread(attributor.decode, image)
            embedding = (await attributor.submit(pixels, timings)).embedding
        if request.texts is not None:
            check_texts(tuple(request.texts), ("{}",), attributor.settings)
            with timed_stage("labels", timings):
                resolve, run = attributor.labels.resolve, attributor.batcher.run_between
                texts = (await resolve(tuple(request.texts), ("{}",), run)).embeddings
    return EmbedResponse(
        request_id=request_id,
        model=attributor.model,
        embedding=None if embedding is None else embedding.tolist(),
        text_embeddings=None if texts is None else texts.tolist(),
        timings_ms=timings,
    )
