"""The complete HTTP interface as one ASGI application."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from vitrine.service.answers.reload import RELOAD_ERRORS, Serving
from vitrine.service.engine.processors import memory_limit
from vitrine.service.errors import ServiceError
from vitrine.service.http.compression import CompressionMiddleware
from vitrine.service.http.cors import CorsMiddleware
from vitrine.service.http.errors import ErrorShapes, on_disconnect, on_http_error, on_service_error
from vitrine.service.http.middleware import RequestMiddleware
from vitrine.service.http.openapi import add_docs, document_keys
from vitrine.service.http.page import add_page
from vitrine.service.http.protocols.kserve_v1 import add_kserve_v1
from vitrine.service.http.protocols.open_inference import add_open_inference
from vitrine.service.http.protocols.openai import add_openai
from vitrine.service.http.routes.knowledge import add_knowledge
from vitrine.service.http.routes.operations import add_operations
from vitrine.service.http.routes.questions import add_questions
from vitrine.service.operations import instruments
from vitrine.service.operations.settings import Settings
from vitrine.service.processes import workers
from vitrine.service.processes.reports import reported_start

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}  # BentoML traces, we measure and log


def create_app(settings: Settings) -> FastAPI:
    """The application with all routes. Its lifespan opens the bundle and warms it up.

    Raises `SettingsError` for API keys that cannot be read.
    """
    serving = Serving(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.enter_context(workers.end_in_time(settings.shutdown_seconds))
            # before loading: by default the signal kills
            stack.enter_context(workers.on_signal(signal.SIGHUP, serving.reload_by_signal))
            with reported_start(*RELOAD_ERRORS):
                await stack.enter_async_context(serving)
            await stack.enter_async_context(instruments.running(memory_limit()[0]))
            stack.enter_context(workers.exit_with_parent())
            yield

    app = FastAPI(title="Vitrine", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY)
    app.state.serving, app.state.settings, app.state.error_shapes = serving, settings, ErrorShapes()
    app.add_middleware(RequestMiddleware, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(CompressionMiddleware)
    if settings.origins:  # the outermost, so that a page can read refusals, too
        app.add_middleware(CorsMiddleware, origins=settings.origins)
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    add_questions(app, settings)
    add_knowledge(app)
    add_openai(app)
    add_kserve_v1(app)
    add_open_inference(app)
    add_operations(app, serving)
    add_docs(app)
    add_page(app)
    protected = [
        path
        for path in app.openapi()["paths"]
        if path.startswith("/admin/") or (serving.api_keys and not path.startswith("/v2/health/"))
    ]
    document_keys(app, protected)
    app.add_route("/{path:path}", _no_route, methods=_METHODS, include_in_schema=False)
    return app


async def _no_route(request: Request) -> Response:
    """Answer every path and method without a route: BentoML's outer app would do so in plain text."""
    routes = request.app.routes[:-1]
    methods = {m for r in routes if r.matches(request.scope)[0] is Match.PARTIAL for m in getattr(r, "methods", ())}
    if methods:
        message = f"{request.method} is not allowed at {request.url.path}"
        raise ServiceError("method_not_allowed", message, headers={"Allow": ", ".join(sorted(methods))})
    raise ServiceError("not_found", f"there is no page or endpoint at {request.url.path}")
