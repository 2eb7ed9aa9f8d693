"""Predictions of one image, without an account."""

from __future__ import annotations

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.explain import predict
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.classify import ClassifyRequest, ClassifyResponse


async def answer_classify(
    attributor: Attributor, image: bytes, request: ClassifyRequest, request_id: str
) -> ClassifyResponse:
    """Predictions without an account. Raises `ServiceError`."""
    timings: dict[str, float] = {}
    with attributor.admit():
        texts, edit = attributor.texts(request), attributor.edits.chosen(request.edit)
        await attributor.check_labels(texts, request.strict)
        inferred = await attributor.infer(image, *texts, timings, edit=edit)
    with timed_stage("predict", timings):
        scale = attributor.bundle.manifest.logit_scale
        predictions = await attributor.in_thread(predict, inferred.parts, inferred.labels, scale, request.top_k)
    return ClassifyResponse(
        request_id=request_id,
        model=attributor.model,
        edit=inferred.edit,
        warnings=inferred.warnings,
        predictions=predictions,
        timings_ms=timings,
    )
