"""Answers compressed with gzip, for clients that take it.

Large ones are compressed in a thread, piece by piece: the event loop, which all other requests need, would stand still
for 20 ms a megabyte.
"""

from __future__ import annotations

import asyncio
import re
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST_BYTES = 1_024  # a smaller answer fits into one packet as it is
IN_THREAD_BYTES = 32 * 2**10
LEVEL = 1  # of JSON full of numbers the highest level saves 5 % more, in five times as long
_TYPES = re.compile(r"text/|application/(json|javascript|octet-stream)|image/svg")
_GZIP = 31  # zlib's `wbits` for it
_ZERO = re.compile(r"q=0(\.0*)?")


class CompressionMiddleware:
    """Sends texts, JSON and tensors of 1 kB and more with Content-Encoding: gzip."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            send = _Answer(send, accepts_gzip(Headers(scope=scope).get("accept-encoding", ""))).send
        await self.app(scope, receive, send)


class _Answer:
    """One answer. Its start waits until its first piece shows whether it is large enough."""

    def __init__(self, send: Send, accepted: bool) -> None:
        self._send, self._accepted = send, accepted
        self._start: Message | None = None
        self._gzip: zlib._Compress | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        start, self._start = self._start, None
        if start is not None and self._is_compressed(start, body, more):
            self._gzip = zlib.compressobj(LEVEL, wbits=_GZIP)
        if self._gzip is not None:
            large = len(body) >= IN_THREAD_BYTES
            body = await asyncio.to_thread(self._compress, body, more) if large else self._compress(body, more)
        if start is not None:
            if self._gzip is not None:
                _declare(MutableHeaders(scope=start), None if more else len(body))
            await self._send(start)
        if body or not more:
            await self._send({**message, "body": body, "more_body": more})

    def _is_compressed(self, start: Message, body: bytes, more: bool) -> bool:
        """Whether this answer is, by its headers and its first piece; said in `Vary` if it depends on the request."""
        headers = MutableHeaders(scope=start)
        kind = headers.get("content-type", "")
        if start["status"] in (204, 206, 304) or "content-encoding" in headers or not _TYPES.match(kind):
            return False
        headers.add_vary_header("Accept-Encoding")
        declared = headers.get("content-length", "")
        length = int(declared) if declared.isdecimal() else len(body)
        is_of_head = not body and not more
        return self._accepted and length >= SMALLEST_BYTES and not is_of_head

    def _compress(self, body: bytes, more: bool) -> bytes:
        assert self._gzip is not None
        compressed = self._gzip.compress(body)
        return compressed if more else compressed + self._gzip.flush()


def _declare(headers: MutableHeaders, length: int | None) -> None:
    headers["content-encoding"] = "gzip"
    del headers["content-length"]
    if length is not None:
        headers["content-length"] = str(length)
    if (etag := headers.get("etag", "")).startswith('"'):  # the content is the same, the bytes are not
        headers["etag"] = f"W/{etag}"


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header takes gzip (RFC 9110, 12.5.3)."""
    choices: dict[str, bool] = {}
    for choice in header.lower().split(","):
        name, *parameters = (piece.strip() for piece in choice.split(";"))
        choices[name] = not any(_ZERO.fullmatch(parameter.replace(" ", "")) for parameter in parameters)
    return choices.get("gzip", choices.get("x-gzip", choices.get("*", False)))
