"""Embeddings of an image, of texts, or of both."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.service.answers.answer_size import check_answer_size
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.notices import to_notices
from vitrine.service.answers.texts import check_texts
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.base import Notice
from vitrine.service.schemas.embed import EmbedRequest, EmbedResponse


async def answer_embed(
    attributor: Attributor, image: bytes | None, request: EmbedRequest, request_id: str
) -> EmbedResponse:
    """Unit embeddings of an image, of texts, or of both. Raises `ServiceError`."""
    if image is None and request.texts is None:
        raise ServiceError("missing_image", "send an image, `texts`, or both")
    texts = None if request.texts is None else (tuple(request.texts), ("{}",))
    if texts is not None:
        check_texts(*texts, attributor.settings)
    values = attributor.bundle.manifest.shape.embedding * ((image is not None) + len(request.texts or ()))
    check_answer_size(values, attributor.settings.max_answer_values, "send fewer texts")
    edit = attributor.edits.chosen(request.edit)
    timings: dict[str, float] = {}
    embedding = text_embeddings = used = None
    notices: list[Notice] = []
    with attributor.admit():
        if texts is not None:
            await attributor.check_labels(texts, request.strict, "texts")
        if image is not None:
            with timed_stage("decode", timings):
                pixels, notes = await attributor.decoded(image)
            notices += to_notices(image=notes)
            if edit is None:
                parts = await attributor.submit(pixels, timings)
            else:
                parts, used = await attributor.edited(edit, pixels, None, timings)
            embedding = parts.embedding
        if texts is not None:
            with timed_stage("labels", timings):
                label_set = await attributor.labels.resolve(*texts, attributor.batcher.run_between)
            text_embeddings = label_set.embeddings
            notices += to_notices(label_set.notices)
    vectors = await attributor.in_thread(_to_lists, embedding, text_embeddings)
    return EmbedResponse.model_construct(
        request_id=request_id,
        model=attributor.model,
        edit=used,
        warnings=notices,
        embedding=vectors[0],
        text_embeddings=vectors[1],
        timings_ms=timings,
    )


def _to_lists(*arrays: NDArray[np.floating] | None) -> list[Any]:
    return [None if array is None else array.tolist() for array in arrays]
