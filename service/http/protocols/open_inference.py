"""The Open Inference Protocol (KServe's V2, Triton's): health, metadata, and `/v1/classify` as tensors.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.classify import Classified, classify
from vitrine.service.errors import ServiceError
from vitrine.service.http.asking import handle, json_response, lease_attributor, log_predictions
from vitrine.service.http.content import check_coding, parse_body
from vitrine.service.http.image_text import image_of_text
from vitrine.service.http.openapi import errors_of, json_body
from vitrine.service.http.protocols.kserve_v1 import error_shape
from vitrine.service.http.protocols.shared import JSON_TYPES, check_model
from vitrine.service.http.protocols.tensors import (
    LENGTH_HEADER,
    Inputs,
    Output,
    parse_infer,
    texts_of,
    write_infer,
)
from vitrine.service.http.requests import media_type, too_many
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.classify import ClassifyRequest
from vitrine.service.schemas.kserve import PlainError
from vitrine.service.schemas.open_inference import (
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    Note,
    Notes,
    Ready,
    ServerMetadata,
    TensorMetadata,
)

BINARY_TYPE = "application/octet-stream"
_VERSION_CHARS = 12  # of the bundle's digest
_TAG = "Open Inference Protocol"
_TEXTS = ("labels", "templates")
_NUMBERS = ("probability", "logit", "cosine")
_BY_DEFAULT = ("label", *_NUMBERS)
_PATHS = r"/v2|/v2/health/(live|ready)|/v2/models/.*"


def add_open_inference(app: FastAPI) -> None:
    """Everything below `/v2`. Health is asked for without a key, as probes are."""
    app.state.error_shapes.add(_PATHS, error_shape)

    def get(path: str, summary: str, endpoint: Any, answer: type[BaseModel], *statuses: int, **more: Any) -> None:
        known = errors_of(PlainError, *statuses)
        app.get(path, summary=summary, response_model=answer, responses=known, tags=[_TAG], **more)(endpoint)

    get("/v2/health/live", "Check that the process answers", live, Live)
    get("/v2/health/ready", "Check that the service can answer questions about images", ready, Ready, 503)
    get("/v2", "Name and version of the server", server, ServerMetadata, 401, 503)
    # The paths with a version first: a model's name may have slashes.
    version = {"parameters": [{"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}]}
    for path, whole, more in (
        ("/v2/models/{name:any}/versions/{version}", "/v2/models/{name:any}/versions/{version}", version),
        ("/v2/models/{name:any}", "/v2/models/{name:model}", {}),
    ):
        get(
            f"{path}/ready", "Check that the model is ready", model_ready, ModelReady, 401, 404, 503, openapi_extra=more
        )
        app.post(
            f"{path}/infer",
            summary="Predict labels of images, with tensors",
            response_model=InferResponse,
            responses=errors_of(PlainError, 400, 401, 404, 413, 415, 429, 500, 503, 504),
            openapi_extra=json_body(InferRequest) | more,
            tags=[_TAG],
        )(infer)
        get(
            whole,
            "List the model's input and output tensors",
            metadata,
            ModelMetadata,
            401,
            404,
            503,
            openapi_extra=more,
        )


async def live() -> Response:
    """Answers 200 as long as the process answers."""
    return json_response(Live(live=True))


async def ready(request: Request) -> Response:
    """Answers 200 if the bundle is loaded and images can be decoded, otherwise 503."""
    attributor = request.app.state.serving.attributor
    if attributor is None or not attributor.can_decode():
        raise ServiceError("not_ready", "no bundle is in service yet, or images cannot be decoded; see /readyz")
    return json_response(Ready(ready=True))


async def server(request: Request) -> Response:
    """Name, version and extensions of the server."""
    with lease_attributor(request):
        extensions = ["binary_tensor_data"]
        return json_response(ServerMetadata(name="vitrine", version=request.app.version, extensions=extensions))


async def model_ready(request: Request, name: str) -> Response:
    """Whether the bundle in service, addressed by its name, is ready."""
    with lease_attributor(request) as attributor:
        _check(attributor, request)
        return json_response(ModelReady(name=name, ready=attributor.can_decode()))


async def metadata(request: Request, name: str) -> Response:
    """The input and output tensors of the bundle in service."""
    with lease_attributor(request) as attributor:
        _check(attributor, request)
        inputs = [TensorMetadata(name=it, datatype="BYTES", shape=[-1]) for it in ("image", *_TEXTS)]
        outputs = [TensorMetadata(name="label", datatype="BYTES", shape=[-1, -1])]
        outputs += [TensorMetadata(name=it, datatype="FP32", shape=[-1, -1]) for it in _NUMBERS]
        size = attributor.bundle.manifest.shape.embedding
        outputs.append(TensorMetadata(name="embedding", datatype="FP32", shape=[-1, size]))
        versions = [_version(attributor)]
        return json_response(
            ModelMetadata(name=name, versions=versions, platform="vitrine_onnx", inputs=inputs, outputs=outputs)
        )


async def infer(request: Request, name: str) -> Response:
    """Zero-shot predictions of images, as tensors. They follow as bytes after the JSON if the request sets that."""
    asked: list[InferRequest] = []
    outputs: dict[str, bool] = {}  # whether each follows as bytes

    async def read() -> tuple[list[bytes], ClassifyRequest]:
        check_coding(request)
        if (kind := media_type(request)) not in (*JSON_TYPES, BINARY_TYPE):
            message = (
                f"content type {kind[:100]!r} is not supported; send application/json, or {BINARY_TYPE} with "
                f"{LENGTH_HEADER}"
            )
            raise ServiceError("unsupported_media_type", message)
        inputs = await parse_body(request, parse_infer, request.headers.get(LENGTH_HEADER))
        asked.append(inputs.request)
        outputs.update(_outputs(inputs.request))
        return _images(inputs, request.app.state.settings.images_per_request), _options(inputs)

    async def answer(
        attributor: Attributor, images: list[bytes], options: ClassifyRequest, _: str
    ) -> tuple[bytes, int | None, list[Classified]]:
        _check(attributor, request)
        found = await classify(attributor, images, options, [f"image[{place}]" for place in range(len(images))])
        head = {"model_name": name, "model_version": _version(attributor)}
        head |= {"id": asked[0].id} if asked[0].id is not None else {}
        return *await attributor.in_thread(_written, head, outputs, found), found

    body, length, found = await handle(request, read, answer)
    log_predictions(request, *(one.predictions for one in found))
    if length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type=BINARY_TYPE, headers={LENGTH_HEADER: str(length)})


def _check(attributor: Attributor, request: Request) -> None:
    """Raise `ServiceError` for a path of another model, or of another version."""
    name, version = request.path_params["name"], request.path_params.get("version")
    check_model(attributor, name)
    if version is not None and version != (served := _version(attributor)):
        message = f"{name!r} has no version {version[:100]!r}; the one in service is {served!r}"
        raise ServiceError("model_not_found", message)


def _version(attributor: Attributor) -> str:
    return attributor.model.digest.removeprefix("sha256:")[:_VERSION_CHARS]


def _images(inputs: Inputs, most: int) -> list[bytes]:
    elements: Sequence[str | bytes] = inputs.elements.get("image", [])
    if not elements:
        raise ServiceError("missing_image", "the input `image` is missing, or has no elements")
    if len(elements) > most:
        raise too_many(most)
    return [
        image_of_text(element, f"image[{place}]") if isinstance(element, str) else element
        for place, element in enumerate(elements)
    ]


def _options(inputs: Inputs) -> ClassifyRequest:
    """The options of `/v1/classify`: the request's parameters, and its texts. Raises `ServiceError`."""
    fields = {name: value for name, value in inputs.request.parameters.items() if name != "binary_data_output"}
    for name in _TEXTS:
        if name in inputs.elements:
            if name in fields:
                raise ServiceError("invalid_request", f"{name!r} is both an input and a parameter; send it once")
            fields[name] = texts_of(inputs.elements[name], name)
    return validated(ClassifyRequest, fields)


def _outputs(asked: InferRequest) -> dict[str, bool]:
    """The outputs that are asked for, and whether each is to follow as bytes. Raises `ServiceError`."""
    as_bytes = _flag(asked.parameters, "binary_data_output")
    if asked.outputs is None:
        return dict.fromkeys(_BY_DEFAULT, as_bytes)
    for output in asked.outputs:
        if unknown := sorted(output.parameters.keys() - {"binary_data"}):
            message = f"the output {output.name!r} has an unknown parameter {unknown[0][:100]!r}"
            raise ServiceError("invalid_request", message)
    return {output.name: _flag(output.parameters, "binary_data", as_bytes) for output in asked.outputs}


def _written(head: dict[str, Any], outputs: dict[str, bool], found: list[Classified]) -> tuple[bytes, int | None]:
    notes = Notes(
        [Note(edit=one.inferred.edit, verdict=one.verdict, warnings=one.warnings) for one in found]
    ).model_dump_json()
    head = head | {"parameters": {"notes": notes}}
    return write_infer(head, [Output(name, _values(name, found), as_bytes) for name, as_bytes in outputs.items()])


def _values(name: str, found: list[Classified]) -> Any:
    """An output's values [images, columns]."""
    if name == "label":
        return [[prediction.label for prediction in one.predictions] for one in found]
    if name == "embedding":
        return np.stack([one.inferred.parts.embedding for one in found])
    return np.array([[getattr(prediction, name) for prediction in one.predictions] for one in found])


def _flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ServiceError("invalid_request", f"the parameter {name!r} must be true or false, not {str(value)[:100]!r}")
    return value
