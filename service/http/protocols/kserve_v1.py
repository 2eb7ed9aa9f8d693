"""KServe's V1 protocol: `:predict` is `/v1/classify` and `:explain` is `/v1/attribute`, of many images.

Its list of models and their readiness are in `protocols.openai`, whose paths are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from vitrine.service.answers.attribute import attribute_each
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.classify import Classified, classify
from vitrine.service.errors import ServiceError
from vitrine.service.http.asking import PiecesResponse, handle, json_response, log_predictions
from vitrine.service.http.image_text import image_of_text
from vitrine.service.http.openapi import errors_of, json_body
from vitrine.service.http.protocols.shared import check_model, read_json
from vitrine.service.http.requests import too_many
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.classify import ClassifyRequest, Prediction
from vitrine.service.schemas.kserve import (
    Base64Bytes,
    ExplainRequest,
    ExplainResponse,
    ImageInstance,
    InstancePrediction,
    PlainError,
    PredictRequest,
    PredictResponse,
)

_STATUSES = (400, 401, 404, 413, 415, 429, 500, 503, 504)
_NAMES = ("b64", "image", "image_bytes", "data")


def add_kserve_v1(app: FastAPI) -> None:
    """`/v1/models/{name}:predict` and `/v1/models/{name}:explain`."""
    app.state.error_shapes.add(r"/v1/models/.*:.*", error_shape)
    for verb, summary, endpoint, answer, body in (
        ("predict", "Predict labels of images (KServe V1)", predict, PredictResponse, PredictRequest),
        (
            "explain",
            "Predict labels of images, with their accounts (KServe V1)",
            explain,
            ExplainResponse,
            ExplainRequest,
        ),
    ):
        app.post(
            f"/v1/models/{{name:any}}:{verb}",
            summary=summary,
            response_model=answer,
            responses=errors_of(PlainError, *_STATUSES),
            openapi_extra=json_body(body),
            tags=["KServe V1"],
        )(endpoint)


def error_shape(error: ServiceError) -> dict[str, Any]:
    """KServe's error: one text. The code comes first in it."""
    return {"error": f"{error.code}: {error.message}"}


async def predict(request: Request, name: str) -> Response:
    """Zero-shot predictions of one or more images, in the format of KServe's V1 protocol."""
    keys: list[str | int | None] = []

    async def read() -> tuple[list[bytes], ClassifyRequest]:
        asked = validated(PredictRequest, await read_json(request))
        keys.extend(it.key if isinstance(it, ImageInstance) else None for it in asked.instances)
        return _images(asked.instances, request.app.state.settings.images_per_request), asked.parameters

    async def answer(attributor: Attributor, images: list[bytes], asked: ClassifyRequest, _: str) -> list[Classified]:
        check_model(attributor, name)
        return await classify(attributor, images, asked, _places(images))

    found = await handle(request, read, answer)
    log_predictions(request, *(one.predictions for one in found))
    predictions = [
        InstancePrediction(
            key=key,
            predictions=one.predictions,
            verdict=one.verdict,
            edit=one.inferred.edit,
            warnings=one.warnings,
        )
        for key, one in zip(keys, found, strict=True)
    ]
    return json_response(PredictResponse(predictions=predictions))


async def explain(request: Request, name: str) -> Response:
    """Zero-shot predictions of one or more images with their accounts, in the format of KServe's V1 protocol."""

    async def read() -> tuple[list[bytes], AttributeRequest]:
        asked = validated(ExplainRequest, await read_json(request))
        return _images(asked.instances, request.app.state.settings.images_per_request), asked.parameters

    async def answer(
        attributor: Attributor, images: list[bytes], asked: AttributeRequest, _: str
    ) -> list[tuple[bytes, list[Prediction]]]:
        check_model(attributor, name)
        return await attribute_each(attributor, images, asked, _places(images))

    found = await handle(request, read, answer)
    log_predictions(request, *(predictions for _, predictions in found))
    pieces = [b'{"explanations":[']
    for text, _ in found:
        pieces += (text, b",")
    pieces[-1] = b"]}"
    return PiecesResponse(pieces)


def _images(instances: Sequence[str | ImageInstance], most: int) -> list[bytes]:
    """The image of each instance. Raises `ServiceError`."""
    if len(instances) > most:
        raise too_many(most)
    return [_image(instance, f"instances.{place}") for place, instance in enumerate(instances)]


def _image(instance: str | ImageInstance, field: str) -> bytes:
    if isinstance(instance, str):
        return image_of_text(instance, field)
    found = [(name, value) for name in _NAMES if (value := getattr(instance, name)) is not None]
    if len(found) != 1:
        problem = f"it must have one image, under one of the names {', '.join(_NAMES)}"
        raise ServiceError("missing_image", f"{field}: {problem}", [{"field": field, "problem": problem}])
    ((name, value),) = found
    return image_of_text(value.b64 if isinstance(value, Base64Bytes) else value, f"{field}.{name}")


def _places(images: Sequence[bytes]) -> list[str]:
    return [f"instances.{place}" for place in range(len(images))]
