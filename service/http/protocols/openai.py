"""OpenAI's shape: `POST /v1/embeddings`, of texts and images, and `GET /v1/models`.

The official clients work unchanged, with this service's `/v1` as their base URL: they send their key as ours is sent.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from numpy.typing import NDArray
from starlette.responses import Response

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.embed import embed
from vitrine.service.answers.serialise import json_text
from vitrine.service.errors import ServiceError
from vitrine.service.http.asking import handle, json_response, lease_attributor
from vitrine.service.http.image_text import image_of_text, is_data_url
from vitrine.service.http.openapi import errors_of, json_body
from vitrine.service.http.protocols.shared import check_model, read_json
from vitrine.service.http.requests import too_many
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.embed import EmbedRequest
from vitrine.service.schemas.openai import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    OpenAIError,
    ServedModel,
    ServedModels,
    Usage,
)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_URLS = ("http://", "https://", "file://")


def add_openai(app: FastAPI) -> None:
    """`/v1/embeddings`, `/v1/models`, `/v1/models/{name}`."""
    app.state.error_shapes.add(r"/v1/embeddings|/v1/models(/[^:]*)?", error_shape)
    app.post(
        "/v1/embeddings",
        summary="Embed texts and images (OpenAI)",
        response_model=EmbeddingsResponse,
        responses=errors_of(OpenAIError, 400, 401, 404, 413, 415, 429, 500, 503, 504),
        openapi_extra=json_body(EmbeddingsRequest),
        tags=["OpenAI"],
    )(embeddings)
    known = errors_of(OpenAIError, 401, 503)
    app.get(
        "/v1/models",
        summary="List the model that is served",
        response_model=ServedModels,
        responses=known,
        tags=["OpenAI", "KServe V1"],
    )(models)
    app.get(
        "/v1/models/{name:model}",
        summary="Check that the model with this name is served",
        response_model=ServedModel,
        responses=known | errors_of(OpenAIError, 404),
        tags=["OpenAI", "KServe V1"],
    )(model)


def error_shape(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = error.details[0].get("field") if error.details else None
    return {"error": {"message": error.message, "type": kind, "param": param or None, "code": error.code}}


async def embeddings(request: Request) -> Response:
    """Embeddings of texts and images, in the format of OpenAI's API."""

    async def read() -> tuple[EmbeddingsRequest, EmbedRequest]:
        asked = validated(EmbeddingsRequest, await read_json(request))
        return asked, EmbedRequest(strict=asked.strict, edit=asked.edit)

    return Response(await handle(request, read, _answer), media_type="application/json")


async def models(request: Request) -> Response:
    """The bundle in service, as a list with one model."""
    with lease_attributor(request) as attributor:
        served = _served(attributor)
        return json_response(ServedModels(data=[served], models=[served.id]))


async def model(request: Request, name: str) -> Response:
    """The bundle in service, addressed by its name."""
    with lease_attributor(request) as attributor:
        check_model(attributor, name)
        return json_response(_served(attributor))


def _served(attributor: Attributor) -> ServedModel:
    name = attributor.model.name
    return ServedModel(id=name, created=attributor.since, name=name, ready=attributor.can_decode())


async def _answer(attributor: Attributor, asked: EmbeddingsRequest, options: EmbedRequest, _: str) -> bytes:
    check_model(attributor, asked.model)
    size = attributor.bundle.manifest.shape.embedding
    if asked.dimensions not in (None, size):
        message = f"`dimensions` must be {size}: embeddings of {attributor.model.name!r} cannot be shortened"
        raise ServiceError("invalid_request", message, [{"field": "dimensions", "problem": f"it must be {size}"}])
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    images, texts = _sorted(inputs, attributor.settings.images_per_request)
    options = options.model_copy(update={"texts": list(texts.values()) or None})
    found = await embed(attributor, list(images.values()), options, [f"input.{place}" for place in images])
    tokens = await attributor.labels.count_tokens(list(texts.values())) if texts else 0
    vectors: dict[int, NDArray[np.floating]] = dict(zip(images, found.images, strict=True))
    if found.texts is not None:
        vectors |= zip(texts, found.texts, strict=True)
    answer = EmbeddingsResponse.model_construct(
        data=[],
        model=attributor.model.name,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        edit=found.edit,
        warnings=found.notices,
    )
    return await attributor.in_thread(_written, answer, vectors, asked.encoding_format)


def _sorted(inputs: Sequence[str], most_images: int) -> tuple[dict[int, bytes], dict[int, str]]:
    """(images, texts) by their places in the input. Raises `ServiceError`."""
    images: dict[int, bytes] = {}
    texts: dict[int, str] = {}
    for place, text in enumerate(inputs):
        if text[:11].lower() == "data:image/" or (is_data_url(text) and ";base64," in text[:100]):
            if len(images) == most_images:
                raise too_many(most_images)
            images[place] = image_of_text(text, f"input.{place}")
        elif text.lower().startswith(_URLS) and len(text.split()) == 1:
            problem = "URLs are not fetched; send the image itself, as data:image/jpeg;base64,…"
            field = f"input.{place}"
            raise ServiceError("invalid_request", f"{field}: {problem}", [{"field": field, "problem": problem}])
        else:
            texts[place] = text
    return images, texts


def _written(answer: EmbeddingsResponse, vectors: dict[int, NDArray[np.floating]], encoding: str) -> bytes:
    """The answer as JSON, with its vectors."""
    answer.data = [
        Embedding.model_construct(
            index=place,
            embedding=base64.b64encode(vectors[place].astype("<f4").tobytes()).decode()
            if encoding == "base64"
            else vectors[place].tolist(),
        )
        for place in sorted(vectors)
    ]
    return json_text(answer)
