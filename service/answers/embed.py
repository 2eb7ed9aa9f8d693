"""Embeddings of images, of texts, or of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.service.answers.answer_size import check_answer_size
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.many import all_of
from vitrine.service.answers.notices import to_notices
from vitrine.service.answers.texts import check_texts
from vitrine.service.engine.edits import ServedEdit
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.base import Notice
from vitrine.service.schemas.edits import EditUsed
from vitrine.service.schemas.embed import EmbedRequest, EmbedResponse


class Embedded(NamedTuple):
    """Unit embeddings, in the order of what they are of."""

    images: list[NDArray[np.floating]]  # [D] each
    texts: NDArray[np.float32] | None  # [N, D]
    notices: list[Notice]
    edit: EditUsed | None  # of the images
    timings: dict[str, float]  # of one image, and of the texts


class _Image(NamedTuple):
    embedding: NDArray[np.floating]
    notices: list[Notice]
    edit: EditUsed | None


async def answer_embed(
    attributor: Attributor, image: bytes | None, request: EmbedRequest, request_id: str
) -> EmbedResponse:
    """Unit embeddings of an image, of texts, or of both. Raises `ServiceError`."""
    if image is None and request.texts is None:
        raise ServiceError("missing_image", "send an image, `texts`, or both")
    found = await embed(attributor, [] if image is None else [image], request)
    embedding = found.images[0] if found.images else None
    vectors = await attributor.in_thread(_to_lists, embedding, found.texts)
    return EmbedResponse.model_construct(
        request_id=request_id,
        model=attributor.model,
        edit=found.edit,
        warnings=found.notices,
        embedding=vectors[0],
        text_embeddings=vectors[1],
        timings_ms=found.timings,
    )


async def embed(
    attributor: Attributor, images: Sequence[bytes], request: EmbedRequest, names: Sequence[str] = ()
) -> Embedded:
    """Embeddings of images, and of the request's texts. names: of the images, for errors, where there are several.

    Raises `ServiceError`, also if one of the images cannot be used.
    """
    texts = None if request.texts is None else (tuple(request.texts), ("{}",))
    if texts is not None:
        check_texts(*texts, attributor.settings)
    values = attributor.bundle.manifest.shape.embedding * (len(images) + len(request.texts or ()))
    check_answer_size(values, attributor.settings.max_answer_values, "send fewer texts")
    edit = attributor.edits.chosen(request.edit)
    timings: dict[str, float] = {}
    label_set = None
    with attributor.admit(len(images) or 1), attributor.taking_turns():
        if texts is not None:
            await attributor.check_labels(texts, request.strict, "texts")
        found = await all_of(images, lambda image: _image(attributor, image, edit, timings), names)
        notices = [notice for image in found for notice in image.notices]
        if texts is not None:
            with timed_stage("labels", timings):
                label_set = await attributor.labels.resolve(*texts, attributor.batcher.run_between)
            notices += to_notices(label_set.notices)
    used = edit.used(any(image.edit.applied for image in found if image.edit)) if edit and found else None
    embeddings = [image.embedding for image in found]
    return Embedded(embeddings, None if label_set is None else label_set.embeddings, notices, used, timings)


async def _image(attributor: Attributor, image: bytes, edit: ServedEdit | None, timings: dict[str, float]) -> _Image:
    used = None
    with timed_stage("decode", timings):
        pixels, notes = await attributor.decoded(image)
    if edit is None:
        parts = await attributor.submit(pixels, timings)
    else:
        parts, used = await attributor.edited(edit, pixels, None, timings)
    return _Image(parts.embedding, to_notices(image=notes), used)


def _to_lists(*arrays: NDArray[np.floating] | None) -> list[Any]:
    return [None if array is None else array.tolist() for array in arrays]
