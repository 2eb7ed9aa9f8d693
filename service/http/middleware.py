"""ASGI middleware for every request: request id, body limit, metrics, log line, and an answer in any case."""

from __future__ import annotations

import re
import uuid
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.service.errors import ServiceError, uploads_full
from vitrine.service.http.budget import ACCOUNT, UNLIMITED, Account
from vitrine.service.http.errors import error_response
from vitrine.service.operations import metrics
from vitrine.service.operations.logs import logger, trace_id

_UNLOGGED = ("/metrics",)  # scraped every few seconds; log lines would not help anyone
_PIECE_BYTES = 256 * 2**10  # of an answer; the server takes the next one when the client has read enough
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestMiddleware:
    """Accepts or creates `X-Request-ID` (returned with every answer), refuses bodies over the limit, counts requests.

    The limit applies to the declared length, at once, and to the bytes that are received.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        client_request_id = headers.get("x-request-id", "")
        request_id = client_request_id if _REQUEST_ID.fullmatch(client_request_id) else uuid.uuid4().hex
        scope["request_id"] = request_id
        start, received, status = perf_counter(), -1, 0
        account: Account = scope.get(ACCOUNT) or Account(UNLIMITED)

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received = max(received, 0) + len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise self._too_large()
            if account.is_overdrawn:
                raise uploads_full()
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = request_id
                response_headers["x-content-type-options"] = "nosniff"
                if received < 0 and headers.get("expect", "").lower() == "100-continue":
                    response_headers["connection"] = "close"  # else nobody knows whether the body is still to come
                await send(message)
                return
            body = message.get("body", b"")
            account.hold(len(body))
            for place in range(0, len(body) or 1, _PIECE_BYTES):
                more = place + _PIECE_BYTES < len(body) or message.get("more_body", False)
                await send({**message, "body": body[place : place + _PIECE_BYTES], "more_body": more})
            account.give_back(len(body))

        try:
            content_length = headers.get("content-length", "0")
            if content_length.isdecimal() and int(content_length) > self.max_body_bytes:
                await error_response(Request(scope), self._too_large())(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive_limited, send_with_headers)
        except Exception as error:
            # Unexpected errors: the client gets the request id, under which the log has the details. Answered here,
            # since Starlette's own handler raises again after its answer, which drops the connection.
            logger.error("request %s failed", request_id, exc_info=error)
            if status:
                raise
            internal_error = ServiceError(
                "internal", "the service has a fault; its log has the details under this request id"
            )
            await error_response(Request(scope), internal_error)(scope, receive, send_with_headers)
        finally:
            endpoint, seconds = _endpoint(scope), perf_counter() - start
            metrics.REQUESTS.labels(endpoint, status).inc()
            metrics.LATENCY.labels(endpoint).observe(seconds)
            if endpoint not in _UNLOGGED:
                fields = {"id": request_id, "endpoint": endpoint, "status": status, "ms": round(seconds * 1e3, 2)}
                extra = {"trace_id": trace_id(), **scope.get("vitrine.log", {})}
                fields |= {key: value for key, value in extra.items() if value is not None}
                logger.info("%s %s %d", scope["method"], endpoint, status, extra={"request": fields})

    def _too_large(self) -> ServiceError:
        return ServiceError("body_too_large", f"the body is larger than {self.max_body_bytes:,} bytes")


def _endpoint(scope: Scope) -> str:
    """The route's pattern, never the raw path, so that junk requests create no new time series."""
    return getattr(scope.get("route"), "path", "other")
