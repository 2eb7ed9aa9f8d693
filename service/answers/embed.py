"""Unit embeddings of an image, of texts, or of both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.service.answers.answer_size import check_answer_size
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
    if request.texts is not None:
        check_texts(tuple(request.texts), ("{}",), attributor.settings)
    values = attributor.bundle.manifest.shape.embedding * ((image is not None) + len(request.texts or ()))
    check_answer_size(values, attributor.settings.max_answer_values, "send fewer texts")
    timings: dict[str, float] = {}
    embedding = texts = None
    with attributor.admit():
        if image is not None:
            with timed_stage("decode", timings):
                pixels, _notes = await attributor.decoded(image)
            embedding = (await attributor.submit(pixels, timings)).embedding
        if request.texts is not None:
            with timed_stage("labels", timings):
                resolve, run = attributor.labels.resolve, attributor.batcher.run_between
                texts = (await resolve(tuple(request.texts), ("{}",), run)).embeddings
    vectors = await attributor.in_thread(_to_lists, embedding, texts)
    return EmbedResponse.model_construct(
        request_id=request_id,
        model=attributor.model,
        embedding=vectors[0],
        text_embeddings=vectors[1],
        timings_ms=timings,
    )


def _to_lists(*arrays: NDArray[np.floating] | None) -> list[Any]:
    return [None if array is None else array.tolist() for array in arrays]
