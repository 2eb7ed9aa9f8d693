"""Pages of other origins may ask this service if `VITRINE_CORS_ORIGINS` names them (the Fetch standard's CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vitrine.service.errors import ServiceError
from vitrine.service.http.errors import error_response

METHODS = ("GET", "HEAD", "POST")
READABLE = ("X-Request-ID", "Retry-After", "Inference-Header-Content-Length")
PREFLIGHT_SECONDS = 600  # before a browser asks again


class CorsMiddleware(CORSMiddleware):
    """Starlette's, with refusals in the service's envelope. Any header may be sent, no cookies: keys are headers."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers="*",
            expose_headers=READABLE,
            max_age=PREFLIGHT_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if scope.get("method") == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            response = self.preflight_response(headers)
            if response.status_code != 200:
                text = bytes(response.body).decode()
                methods = ", ".join(METHODS)
                message = f"{text}: VITRINE_CORS_ORIGINS lists the allowed origins; the allowed methods are {methods}"
                refusal = ServiceError("invalid_request", message, headers={"Vary": "Origin"})
                response = error_response(Request(scope), refusal)
            await response(scope, receive, send)
            return
        await super().__call__(scope, receive, send)
