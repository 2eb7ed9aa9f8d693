"""Routes for questions about an image: prediction, account, embeddings, similar images."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI, Request
from starlette.responses import Response

from vitrine.service.answers.attribute import answer_attribute, answer_batch
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.answers.classify import answer_classify
from vitrine.service.answers.embed import answer_embed
from vitrine.service.answers.intervene import answer_intervene
from vitrine.service.answers.similar import answer_similar
from vitrine.service.http.asking import PiecesResponse, handle, json_response, large_json_response, log_predictions
from vitrine.service.http.openapi import errors, multipart_or_json
from vitrine.service.http.requests import read_batch, read_image, read_optional_image
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeJson, AttributeRequest, AttributeResponse
from vitrine.service.schemas.batch import BatchJson, BatchResponse
from vitrine.service.schemas.circuit import CircuitJson, CircuitRequest, CircuitResponse
from vitrine.service.schemas.classify import ClassifyJson, ClassifyRequest, ClassifyResponse
from vitrine.service.schemas.embed import EmbedJson, EmbedRequest, EmbedResponse
from vitrine.service.schemas.features import (
    SimilarJson,
    SimilarRequest,
    SimilarResponse,
)
from vitrine.service.schemas.intervene import InterveneJson, InterveneRequest, InterveneResponse

_STATUSES = (400, 401, 413, 415, 429, 431, 500, 503, 504)


def add_questions(app: FastAPI, settings: Settings) -> None:
    """`/v1/attribute`, `/v1/attribute:batch`, `/v1/classify`, `/v1/embed`, `/v1/circuit`, `/v1/intervene`,
    `/v1/similar`."""
    batch_limit = settings.images_per_request
    for path, summary, endpoint, answer, part, json_body, min_images, max_images in (
        (
            "/v1/attribute",
            "Predict the label of an image, with its account",
            attribute,
            AttributeResponse,
            AttributeRequest,
            AttributeJson,
            1,
            1,
        ),
        (
            "/v1/attribute:batch",
            "Predict the labels of many images, with their accounts",
            attribute_batch,
            BatchResponse,
            AttributeRequest,
            BatchJson,
            1,
            batch_limit,
        ),
        (
            "/v1/classify",
            "Predict the label of an image",
            classify,
            ClassifyResponse,
            ClassifyRequest,
            ClassifyJson,
            1,
            1,
        ),
        ("/v1/embed", "Embed an image, texts, or both", embed, EmbedResponse, EmbedRequest, EmbedJson, 0, 1),
        (
            "/v1/circuit",
            "Find the features that made the features of a logit",
            circuit,
            CircuitResponse,
            CircuitRequest,
            CircuitJson,
            1,
            1,
        ),
        (
            "/v1/intervene",
            "Change features, rows or heads, and compare",
            intervene,
            InterveneResponse,
            InterveneRequest,
            InterveneJson,
            1,
            1,
        ),
        (
            "/v1/similar",
            "Find reference images with the same features",
            similar,
            SimilarResponse,
            SimilarRequest,
            SimilarJson,
            1,
            1,
        ),
    ):
        body = multipart_or_json(part, json_body, min_images, max_images)
        app.post(
            path,
            summary=summary,
            response_model=answer,
            responses=errors(*_STATUSES),
            openapi_extra=body,
            tags=["ask"],
        )(endpoint)


async def attribute(request: Request) -> Response:
    """Zero-shot prediction of one image, and its account."""
    read = partial(read_image, request, AttributeRequest, AttributeJson)
    answer = await handle(request, read, answer_attribute)
    log_predictions(request, answer.predictions)
    if len(answer.explanations) > 1 or answer.explanations[0].heatmap:
        return await large_json_response(answer)
    return json_response(answer)


async def attribute_batch(request: Request) -> Response:
    """Zero-shot predictions of many images, and their accounts; each image is answered or refused separately."""
    read = partial(read_batch, request, request.app.state.settings.images_per_request)
    answer = await handle(request, read, answer_batch)
    log_predictions(request, *answer.predictions)
    return PiecesResponse(answer.pieces)


async def classify(request: Request) -> Response:
    """Zero-shot prediction of one image."""
    read = partial(read_image, request, ClassifyRequest, ClassifyJson)
    answer = await handle(request, read, answer_classify)
    log_predictions(request, answer.predictions)
    return json_response(answer)


async def embed(request: Request) -> Response:
    """CLIP's embeddings of an image, of texts, or of both: vectors of length 1, so that their products are cosines."""
    read = partial(read_optional_image, request, EmbedRequest, EmbedJson)
    answer = await handle(request, read, answer_embed)
    return await large_json_response(answer) if answer.text_embeddings else json_response(answer)


async def circuit(request: Request) -> Response:
    """Which features made the features that made a logit: its pruned attribution graph."""
    read = partial(read_image, request, CircuitRequest, CircuitJson)
    answer = await handle(request, read, answer_circuit)
    log_predictions(request, answer.predictions)
    return await large_json_response(answer)


async def intervene(request: Request) -> Response:
    """What the prediction would be with some features, ledger rows or heads changed; or what must be removed for
    another label to come first."""
    read = partial(read_image, request, InterveneRequest, InterveneJson)
    answer = await handle(request, read, answer_intervene)
    log_predictions(request, answer.before.predictions)
    return await large_json_response(answer)


async def similar(request: Request) -> Response:
    """The reference images whose sparse codes are nearest to this image's, layer by layer."""
    read = partial(read_image, request, SimilarRequest, SimilarJson)
    return json_response(await handle(request, read, answer_similar))
