"""Predictions without an account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vitrine.service.answers.answer_size import check_answer_size
from vitrine.service.answers.attributor import Attributor, Inferred
from vitrine.service.answers.explain import predict
from vitrine.service.answers.many import all_of
from vitrine.service.answers.notices import to_notices, unlike_labels
from vitrine.service.answers.scoring import scoring_of, verdict
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.base import Notice
from vitrine.service.schemas.classify import ClassifyRequest, ClassifyResponse, Prediction, Verdict


class Classified(NamedTuple):
    """What is said of one image, and what that was made of."""

    predictions: list[Prediction]
    verdict: Verdict | None
    inferred: Inferred
    warnings: list[Notice]
    timings: dict[str, float]


async def answer_classify(
    attributor: Attributor, image: bytes, request: ClassifyRequest, request_id: str
) -> ClassifyResponse:
    """Predictions without an account. Raises `ServiceError`."""
    (found,) = await classify(attributor, [image], request)
    return ClassifyResponse(
        request_id=request_id,
        model=attributor.model,
        edit=found.inferred.edit,
        warnings=found.warnings,
        predictions=found.predictions,
        verdict=found.verdict,
        timings_ms=found.timings,
    )


async def classify(
    attributor: Attributor, images: Sequence[bytes], request: ClassifyRequest, names: Sequence[str] = ()
) -> list[Classified]:
    """Predictions of each image. names: of the images, for errors, where there are several.

    Raises `ServiceError`, also if one of the images cannot be used. They are admitted together or not at all.
    """
    texts, edit = attributor.texts(request), attributor.edits.chosen(request.edit)
    scale = attributor.bundle.manifest.logit_scale
    scoring = scoring_of(request, texts[0], scale)
    values = 4 * len(images) * min(request.top_k, len(texts[0]))
    check_answer_size(values, attributor.settings.max_answer_values, "send fewer images, or set a smaller `top_k`")

    async def one(image: bytes) -> Classified:
        timings: dict[str, float] = {}
        inferred = await attributor.infer(image, *texts, timings, edit=edit)
        of = inferred.parts, inferred.labels, scale
        with timed_stage("predict", timings):
            predictions = await attributor.in_thread(predict, *of, request.top_k, scoring)
        judged = verdict(*of, scoring)
        notes = (*inferred.notes, *unlike_labels(attributor.bundle.manifest.text.fit, predictions, judged))
        notices = to_notices(inferred.labels.notices, notes)
        return Classified(predictions, judged, inferred, notices, timings)

    with attributor.admit(len(images)), attributor.taking_turns():
        await attributor.check_labels(texts, request.strict)
        return await all_of(images, one, names)
