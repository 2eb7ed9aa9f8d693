"""Errors as responses: envelope, status, metrics and log."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics

Shape = Callable[[ServiceError], dict[str, Any]]  # an error's body, as another protocol has it


class ErrorShapes:
    """Which paths have errors in the shape of another protocol. A path decides: some errors come before a route."""

    def __init__(self) -> None:
        self._shapes: list[tuple[re.Pattern[str], Shape]] = []

    def add(self, paths: str, shape: Shape) -> None:
        """paths: a regular expression for the whole of a path. The first one added that matches decides."""
        self._shapes.append((re.compile(paths, re.DOTALL), shape))  # a name in a path may have line breaks

    def of(self, path: str) -> Shape | None:
        return next((shape for paths, shape in self._shapes if paths.fullmatch(path)), None)


def error_response(request: Request, error: ServiceError) -> Response:
    """The envelope, or another protocol's error, with the status of the code."""
    metrics.REJECTED.labels(error.code).inc()
    request.scope.setdefault("vitrine.log", {})["error"] = error.code
    shapes: ErrorShapes = request.app.state.error_shapes
    shape = shapes.of(request.scope["path"])
    body = shape(error) if shape else _envelope(error, request.scope.get("request_id", ""))
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def raw_response(error: ServiceError, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The same as the bytes of an HTTP/1.1 response that ends its connection, for what is no request yet."""
    request_id = uuid.uuid4().hex
    body = json.dumps(_envelope(error, request_id)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "x-request-id": request_id,
        "x-content-type-options": "nosniff",
        "connection": "close",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in default_headers]
    lines += [f"{name}: {value}".encode() for name, value in headers.items()]
    return b"\r\n".join([*lines, b"", body])


def _envelope(error: ServiceError, request_id: str) -> dict[str, Any]:
    body = {"code": error.code, "message": error.message, "details": error.details, "request_id": request_id}
    return {"error": body}


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(request, error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: malformed multipart bodies, unusual methods, missing files."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return error_response(request, ServiceError(code, error.detail, headers=dict(error.headers or {})))


async def on_disconnect(request: Request, error: Exception) -> Response:
    return error_response(
        request, ServiceError("client_gone", "the client closed the connection before the answer was ready")
    )
