"""The bytes of a body: all of them, inflated if the client sent them compressed."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import Request

from vitrine.service.errors import ServiceError, uploads_full
from vitrine.service.http.budget import ACCOUNT, Account

Parsed = TypeVar("Parsed")

# One thread: each step of parsing holds the GIL for up to 50 ms, and several threads would take turns with each other
# before the event loop had one.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="parse")
LARGE_BYTES = 256 * 2**10  # a body of this size takes a millisecond to parse
WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's `wbits` for each coding


def check_coding(request: Request) -> str | None:
    """The body's Content-Encoding, None if it has none. Raises `ServiceError` for one that cannot be undone here."""
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding not in WINDOWS:
        raise ServiceError(
            "unsupported_media_type",
            f"Content-Encoding {coding[:100]!r} is not supported; send the body uncompressed, or compressed once with "
            "gzip or deflate",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    return coding


async def parse_body(request: Request, parse: Callable[..., Parsed], *args: Any, **options: Any) -> Parsed:
    """parse(body, *args, **options), in a thread if that is slow enough to delay other requests.

    Raises `ServiceError`: also body_too_large for a body that is too large once it is inflated.
    """
    coding = check_coding(request)
    chunks = [chunk async for chunk in request.stream()]
    loop = asyncio.get_running_loop()
    if coding is not None:
        limit = request.app.state.settings.max_body_bytes
        chunks = [await loop.run_in_executor(_PARSER, inflate, b"".join(chunks), coding, limit)]
        account: Account | None = request.scope.get(ACCOUNT)
        if account is not None and not account.take(len(chunks[0])):
            raise uploads_full()
    if sum(map(len, chunks)) > LARGE_BYTES:
        return await loop.run_in_executor(_PARSER, lambda: parse(b"".join(chunks), *args, **options))
    return parse(b"".join(chunks), *args, **options)


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """A compressed body as it was, at most `limit` bytes. Never more than these are made. Raises `ServiceError`."""
    inflater = zlib.decompressobj(WINDOWS[coding])
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise _invalid(f"cannot be decompressed as {coding}, its Content-Encoding: {error}") from error
    if len(inflated) > limit:
        raise ServiceError("body_too_large", f"the body is larger than {limit:,} bytes after decompression")
    if not inflater.eof:
        raise _invalid(f"ends before the end of its {coding} stream")
    if inflater.unused_data:
        raise _invalid(f"continues after the end of its {coding} stream")
    return inflated


def _invalid(problem: str) -> ServiceError:
    return ServiceError("invalid_request", f"the body {problem}")
