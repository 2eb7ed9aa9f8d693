"""HTTP: requests to `Attributor` calls, everything that goes wrong to the envelope."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from models.bundle import open_bundle
from service import metrics
from service.attributor import Attributor
from service.errors import ServiceError, error_response
from service.middleware import Gate, logger
from service.schemas import (
    AttributeJson,
    AttributeRequest,
    AttributeResponse,
    ClassifyJson,
    ClassifyRequest,
    ClassifyResponse,
    ErrorResponse,
    ModelResponse,
    validated,
)
from service.settings import Settings

Asked = TypeVar("Asked", bound=ClassifyRequest)

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 413, 415, 429, 500, 503, 504)
}


def create_app(settings: Settings) -> FastAPI:
    """The whole HTTP surface as one ASGI app; the bundle is opened and warmed up in its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        bundle = await asyncio.to_thread(open_bundle, settings.bundle)
        async with Attributor(bundle, settings) as attributor:
            app.state.attributor = attributor
            logger.info("serving bundle %s %s on %s", attributor.model.name, bundle.digest, attributor.engine.provider)
            yield
            app.state.attributor = None

    app = FastAPI(title="Vitrine", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.attributor, app.state.settings = None, settings
    app.add_middleware(Gate, max_body_bytes=settings.max_body_bytes)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    for path, endpoint, answer, shape, json_shape in (
        ("/v1/attribute", attribute, AttributeResponse, AttributeRequest, AttributeJson),
        ("/v1/classify", classify, ClassifyResponse, ClassifyRequest, ClassifyJson),
    ):
        app.post(path, response_model=answer, responses=_ERRORS, openapi_extra=_body(shape, json_shape))(endpoint)
    app.get("/v1/model", response_model=ModelResponse, responses={503: {"model": ErrorResponse}})(model)
    app.add_route("/metrics", _metrics, include_in_schema=False)
    app.add_route("/{path:path}", _elsewhere, methods=_METHODS, include_in_schema=False)
    return app


async def attribute(request: Request) -> Response:
    """Zero-shot prediction of one image, and the account of it."""
    attributor = _ready(request)
    async with _deadline(request):
        image, asked = await _read(request, AttributeRequest, AttributeJson)
        return _json(await attributor.attribute(image, asked, request.scope["request_id"]))


async def classify(request: Request) -> Response:
    """Zero-shot prediction of one image."""
    attributor = _ready(request)
    async with _deadline(request):
        image, asked = await _read(request, ClassifyRequest, ClassifyJson)
        return _json(await attributor.classify(image, asked, request.scope["request_id"]))


async def model(request: Request) -> Response:
    """The bundle that is being served, with its manifest."""
    attributor = _ready(request)
    return _json(
        ModelResponse(
            **attributor.model.model_dump(),
            provider=attributor.engine.provider,
            manifest=attributor.bundle.manifest.model_dump(mode="json"),
        )
    )


async def _metrics(request: Request) -> Response:
    """Prometheus' text format. Ours, since BentoML's own series are labelled by raw path, junk paths included."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)


def _ready(request: Request) -> Attributor:
    if request.app.state.attributor is None:
        raise ServiceError("not_ready", "the bundle is still being loaded; see /readyz")
    return request.app.state.attributor


@asynccontextmanager
async def _deadline(request: Request) -> AsyncIterator[None]:
    """Cancel what takes longer than the deadline, slow uploads included."""
    seconds = request.app.state.settings.deadline_seconds
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServiceError("deadline_exceeded", f"no answer within {seconds:g} s") from None


async def _read(request: Request, shape: type[Asked], json_shape: type[BaseModel]) -> tuple[bytes, Asked]:
    """(image bytes, what is asked) of a multipart or JSON request. Raises `ServiceError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_multipart(request, shape)
    if kind == "application/json":
        fields = _load_json(await request.body(), "the body")
        asked: Any = validated(json_shape, fields)  # `shape` and an image
        try:
            image = base64.b64decode("".join(asked.image_base64.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ServiceError("invalid_image", f"image_base64 is not base64: {error}") from error
        return image, asked
    raise ServiceError(
        "unsupported_media_type",
        f"content type {kind or '(none)'!r}: send multipart/form-data with a file part `image`, "
        "or application/json with `image_base64`",
    )


async def _read_multipart(request: Request, shape: type[Asked]) -> tuple[bytes, Asked]:
    limit = request.app.state.settings.max_body_bytes
    try:
        form = await request.form(max_files=2, max_fields=2, max_part_size=limit)
    except (LookupError, UnicodeError) as error:
        raise ServiceError("invalid_request", f"the multipart body's charset cannot be used: {error}") from error
    try:
        return await _read_parts(form, shape)
    finally:
        await form.close()


async def _read_parts(form: FormData, shape: type[Asked]) -> tuple[bytes, Asked]:
    if unknown := sorted(set(form) - {"image", "request"}):
        raise ServiceError("invalid_request", f"unknown part {unknown[0][:100]!r}; parts are `image` and `request`")
    if repeated := [name for name in form if len(form.getlist(name)) > 1]:
        raise ServiceError("invalid_request", f"part {repeated[0]!r} is there more than once")
    image, asked = form.get("image"), form.get("request")
    if image is None:
        raise ServiceError("missing_image", "the file part `image` is missing")
    if not isinstance(image, UploadFile):
        raise ServiceError("missing_image", "`image` must be a file part (curl: -F image=@photo.jpg)")
    text = await asked.read() if isinstance(asked, UploadFile) else (asked or "{}")
    return await image.read(), validated(shape, _load_json(text, "part `request`"))


def _load_json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, integers of thousands of digits, too deep
        raise ServiceError("invalid_request", f"{where} is not JSON: {error}") from error


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _body(shape: type[BaseModel], json_shape: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI document's account of a body that FastAPI does not parse for us."""
    part, whole = _inlined(shape.model_json_schema()), _inlined(json_shape.model_json_schema())
    multipart = {
        "type": "object",
        "properties": {"image": {"type": "string", "format": "binary"}, "request": part},
        "required": ["image"],
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": multipart}, "application/json": {"schema": whole}},
        }
    }


def _inlined(schema: dict[str, Any]) -> Any:
    """A JSON schema with its $defs put where they are referred to, as it stands inside another document."""
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return put(
                    definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
                )
            return {key: put(value) for key, value in node.items()}
        return [put(value) for value in node] if isinstance(node, list) else node

    return put(schema)


async def _elsewhere(request: Request) -> Response:
    """Every path and method that has no route: BentoML's outer app would answer these in plain text."""
    routes = request.app.routes[:-1]
    methods = {m for r in routes if r.matches(request.scope)[0] is Match.PARTIAL for m in getattr(r, "methods", ())}
    if methods:
        message = f"{request.method} is not possible at {request.url.path}"
        raise ServiceError("method_not_allowed", message, headers={"Allow": ", ".join(sorted(methods))})
    raise ServiceError("not_found", f"there is nothing at {request.url.path}")


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: malformed multipart bodies, unusual methods."""
    assert isinstance(error, HTTPException)
    code = "method_not_allowed" if error.status_code == 405 else "invalid_request"
    return error_response(request, ServiceError(code, error.detail, headers=dict(error.headers or {})))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return error_response(request, ServiceError("invalid_request", "the client went away before the body was whole"))
