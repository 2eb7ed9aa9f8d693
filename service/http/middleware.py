"""What every request passes through: a request id, a limit on its body, a count, an answer come what may. ASGI."""

from __future__ import annotations

import re
import uuid
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrine.service.errors import ServiceError
from vitrine.service.http.errors import error_response
from vitrine.service.operations import metrics
from vitrine.service.operations.logs import logger, trace_id

_SILENT = ("/metrics",)  # asked for every few seconds, by nobody whom a line would help
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """Takes over or makes `X-Request-ID` (echoed on every answer), refuses bodies over the limit, counts requests.

    The limit holds for the announced length at once and for the bytes that really come.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        scope["request_id"] = request_id
        start, seen, status = perf_counter(), 0, 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise self._too_large()
            return message

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                answered["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            announced = headers.get("content-length", "0")
            if announced.isdecimal() and int(announced) > self.max_body_bytes:
                await error_response(Request(scope), self._too_large())(scope, receive, tagged)
            else:
                await self.app(scope, counted, tagged)
        except Exception as error:
            # Anything unforeseen: the client learns the request id, under which the log has the rest. Answered here,
            # since Starlette's own handler raises again after its answer, which drops the connection.
            logger.error("request %s failed", request_id, exc_info=error)
            if status:
                raise
            unforeseen = ServiceError("internal", "something went wrong here; the request id is in our log")
            await error_response(Request(scope), unforeseen)(scope, receive, tagged)
        finally:
            endpoint, seconds = _endpoint(scope), perf_counter() - start
            metrics.REQUESTS.labels(endpoint, status).inc()
            metrics.LATENCY.labels(endpoint).observe(seconds)
            if endpoint not in _SILENT:
                fields = {"id": request_id, "endpoint": endpoint, "status": status, "ms": round(seconds * 1e3, 2)}
                extra = {"trace_id": trace_id(), **scope.get("vitrine.log", {})}
                fields |= {key: value for key, value in extra.items() if value is not None}
                logger.info("%s %s %d", scope["method"], endpoint, status, extra={"request": fields})

    def _too_large(self) -> ServiceError:
        return ServiceError("body_too_large", f"the body is larger than {self.max_body_bytes:,} bytes")


def _endpoint(scope: Scope) -> str:
    """The route's pattern, never the raw path, so that junk requests make no new time series."""
    return getattr(scope.get("route"), "path", "other")
