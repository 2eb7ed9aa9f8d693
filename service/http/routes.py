"""HTTP: requests to `Attributor` calls, everything that goes wrong to the envelope."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.reload import REFUSED, Serving
from vitrine.service.errors import ServiceError, error_response, queue_full
from vitrine.service.http.middleware import Gate
from vitrine.service.http.openapi import add_docs, ask_for_keys, errors, multipart_or_json, query_of
from vitrine.service.http.page import add_page
from vitrine.service.http.requests import read_batch, read_image, read_optional_image
from vitrine.service.operations import metrics
from vitrine.service.operations.keys import Keys
from vitrine.service.operations.settings import Settings
from vitrine.service.processes import workers
from vitrine.service.schemas.features import (
    CardResponse,
    FeaturesQuery,
    FeaturesResponse,
    SimilarJson,
    SimilarRequest,
    SimilarResponse,
)
from vitrine.service.schemas.schemas import (
    AttributeJson,
    AttributeRequest,
    AttributeResponse,
    BatchJson,
    BatchResponse,
    ClassifyJson,
    ClassifyRequest,
    ClassifyResponse,
    EmbedJson,
    EmbedRequest,
    EmbedResponse,
    LabelSetResponse,
    LabelsResponse,
    ModelResponse,
    Prediction,
    ReloadResponse,
    validated,
)

Given = TypeVar("Given")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_NO_SECOND_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}  # BentoML traces, we measure and log
_POSTED = (400, 401, 413, 415, 429, 500, 503, 504)


def create_app(settings: Settings) -> FastAPI:
    """The whole HTTP surface as one ASGI app; the bundle is opened and warmed up in its lifespan.

    Raises `SettingsError` for API keys that cannot be read.
    """
    serving = Serving(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with serving:
            with workers.on_signal(signal.SIGHUP, serving.reload_by_signal), workers.end_with_parent():
                yield

    app = FastAPI(title="Vitrine", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=_NO_SECOND_TELEMETRY)
    app.state.serving, app.state.settings = serving, settings
    app.add_middleware(Gate, max_body_bytes=settings.max_body_bytes)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    many = settings.images_a_request
    for path, endpoint, answer, part, whole, least, most in (
        ("/v1/attribute", attribute, AttributeResponse, AttributeRequest, AttributeJson, 1, 1),
        ("/v1/attribute:batch", attribute_batch, BatchResponse, AttributeRequest, BatchJson, 1, many),
        ("/v1/classify", classify, ClassifyResponse, ClassifyRequest, ClassifyJson, 1, 1),
        ("/v1/embed", embed, EmbedResponse, EmbedRequest, EmbedJson, 0, 1),
        ("/v1/similar", similar, SimilarResponse, SimilarRequest, SimilarJson, 1, 1),
    ):
        body = multipart_or_json(part, whole, least, most)
        app.post(path, response_model=answer, responses=errors(*_POSTED), openapi_extra=body, tags=["ask"])(endpoint)
    app.get("/v1/model", response_model=ModelResponse, responses=errors(401, 503), tags=["know"])(model)
    app.get("/v1/labels", response_model=LabelsResponse, responses=errors(401, 503), tags=["know"])(labels)
    app.get(
        "/v1/features",
        response_model=FeaturesResponse,
        responses=errors(400, 401, 404, 503),
        openapi_extra=query_of(FeaturesQuery),
        tags=["know"],
    )(features)
    # The converters leave what is no number to the 404 of paths that there are not.
    app.get(
        "/v1/features/{layer:int}/{index:int}",
        response_model=CardResponse,
        responses=errors(401, 404, 503),
        tags=["know"],
    )(feature)
    if serving.admin_keys:
        app.post("/admin/reload", response_model=ReloadResponse, responses=errors(401, 409, 503), tags=["operate"])(
            reload
        )
    app.get("/metrics", include_in_schema=False)(_metrics)
    add_docs(app)
    add_page(app)
    guarded = [path for path in app.openapi()["paths"] if path.startswith("/admin/") or serving.api_keys]
    ask_for_keys(app, guarded)
    app.add_route("/{path:path}", _elsewhere, methods=_METHODS, include_in_schema=False)
    return app


async def attribute(request: Request) -> Response:
    """Zero-shot prediction of one image, and the account of it."""
    reading = partial(read_image, request, AttributeRequest, AttributeJson)
    answer = await _ask(request, reading, Attributor.attribute)
    _log(request, answer.predictions)
    return _json(answer)


async def attribute_batch(request: Request) -> Response:
    """The same for many images; each is answered or refused for itself."""
    reading = partial(read_batch, request, request.app.state.settings.images_a_request)
    answer = await _ask(request, reading, Attributor.attribute_batch)
    _log(request, *(item.answer.predictions for item in answer.results if item.answer))
    return _json(answer)


async def classify(request: Request) -> Response:
    """Zero-shot prediction of one image."""
    reading = partial(read_image, request, ClassifyRequest, ClassifyJson)
    answer = await _ask(request, reading, Attributor.classify)
    _log(request, answer.predictions)
    return _json(answer)


async def embed(request: Request) -> Response:
    """CLIP's embeddings of an image, of texts, or of both: vectors of length 1, whose products are cosines."""
    reading = partial(read_optional_image, request, EmbedRequest, EmbedJson)
    return _json(await _ask(request, reading, Attributor.embed))


async def similar(request: Request) -> Response:
    """The reference images whose sparse codes are nearest to this image's, layer by layer."""
    reading = partial(read_image, request, SimilarRequest, SimilarJson)
    return _json(await _ask(request, reading, Attributor.similar))


async def _ask(
    request: Request,
    read: Callable[[], Awaitable[tuple[Given, Asked]]],
    answer: Callable[[Attributor, Given, Asked, str], Coroutine[Any, Any, Answer]],
) -> Answer:
    """The attributor's answer to what is read, within the deadline and while the client is there."""
    with _served(request) as attributor:
        async with _deadline(request):
            given, asked = await read()
            return await _unless_gone(request, answer(attributor, given, asked, request.scope["request_id"]))


async def model(request: Request) -> Response:
    """The bundle that is being served, with its manifest."""
    with _served(request) as attributor:
        return _json(
            ModelResponse(
                **attributor.model.model_dump(),
                provider=attributor.engine.provider,
                precision=attributor.engine.runtime.precision,
                manifest=attributor.bundle.manifest.model_dump(mode="json"),
            )
        )


async def labels(request: Request) -> Response:
    """The named label sets."""
    with _served(request) as attributor:
        sets = [
            LabelSetResponse(name=name, labels=list(named.labels), templates=list(named.templates or ()))
            for name, named in attributor.labels.named.items()
        ]
        return _json(LabelsResponse(model=attributor.model, label_sets=sets))


async def features(request: Request) -> Response:
    """Labelled features, best label first; with `label`, those whose label contains it."""
    with _served(request) as attributor:
        return _json(await attributor.search(validated(FeaturesQuery, dict(request.query_params))))


async def feature(request: Request, layer: int, index: int) -> Response:
    """What is known of one feature: its label, if it earned one, exemplars, statistics."""
    with _served(request) as attributor:
        return _json(await attributor.card(layer, index))


async def reload(request: Request) -> Response:
    """Take over the bundle, label sets and keys that the settings name, as they are now, without losing a request."""
    serving = request.app.state.serving
    _authorise(request, serving.admin_keys)
    try:
        now, before = await serving.reload()
    except REFUSED as error:
        raise ServiceError("bundle_refused", f"{error}; {serving.attributor.model.digest} stays in service") from error
    workers.signal_others(signal.SIGHUP)
    return _json(ReloadResponse(model=now.model, previous=before.model))


async def _metrics(request: Request) -> Response:
    """Prometheus' text format. Ours, since BentoML's own series are labelled by raw path, junk paths included."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=metrics.CONTENT_TYPE)


@contextmanager
def _served(request: Request) -> Iterator[Attributor]:
    """A lease of the attributor, for those who may have it, while it has places: no body is read for a refusal."""
    serving: Serving = request.app.state.serving
    _authorise(request, serving.api_keys)
    with serving.lease() as attributor:
        if request.method == "POST" and attributor.is_full:
            raise queue_full()
        yield attributor


def _authorise(request: Request, keys: Keys) -> None:
    """Before anything of the body is read. Raises `ServiceError` unauthorized."""
    if keys and not keys.accept(request.headers.get("authorization", "")):
        raise ServiceError(
            "unauthorized", "send a valid key: `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
        )


@asynccontextmanager
async def _deadline(request: Request) -> AsyncIterator[None]:
    """Cancel what takes longer than the deadline, slow uploads included."""
    seconds = request.app.state.settings.deadline_seconds
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ServiceError("deadline_exceeded", f"no answer within {seconds:g} s") from None


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer, which is cancelled when the client goes away: its place is for others then.

    Raises `ClientDisconnect`.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


def _log(request: Request, *predictions: list[Prediction]) -> None:
    """Put what was predicted into the request's log line, if that is set."""
    if request.app.state.settings.log_labels:
        request.scope["vitrine.log"] = {"predicted": [found[0].label for found in predictions]}


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


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
    """Starlette's own refusals: malformed multipart bodies, unusual methods, files that are not there."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return error_response(request, ServiceError(code, error.detail, headers=dict(error.headers or {})))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return error_response(request, ServiceError("client_gone", "the client went away before it was answered"))
