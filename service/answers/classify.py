"""One image's predictions alone."""

from __future__ import annotations

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.explain import predict
from vitrine.service.operations.stages import stage
from vitrine.service.schemas.classify import ClassifyRequest, ClassifyResponse


async def answer_classify(
    attributor: Attributor, image: bytes, request: ClassifyRequest, request_id: str
) -> ClassifyResponse:
    """Predictions alone. Raises `ServiceError`."""
    timings: dict[str, float] = {}
    with attributor.admitted():
        parts, labels, _ = await attributor.infer(image, *attributor.texts(request), timings)
    with stage("predict", timings):
        scale = attributor.bundle.manifest.logit_scale
        predictions = await attributor.in_thread(predict, parts, labels, scale, request.top_k)
    return ClassifyResponse(request_id=request_id, model=attributor.model, predictions=predictions, timings_ms=timings)
