"""Errors as responses: envelope, status, metrics and log."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics


def error_response(request: Request, error: ServiceError) -> Response:
    """The envelope, with the status of the code."""
    metrics.REJECTED.labels(error.code).inc()
    request.scope.setdefault("vitrine.log", {})["error"] = error.code
    request_id = request.scope.get("request_id", "")
    body = {"code": error.code, "message": error.message, "details": error.details, "request_id": request_id}
    return JSONResponse({"error": body}, status_code=error.status, headers=error.headers)


async def on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(request, error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: malformed multipart bodies, unusual methods, missing files."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return error_response(request, ServiceError(code, error.detail, headers=dict(error.headers or {})))


async def on_disconnect(request: Request, error: Exception) -> Response:
    return error_response(request, ServiceError("client_gone", "the client went away before it was answered"))
