"""Reading the bodies of requests: multipart or JSON, into image bytes and a validated payload.

Bodies are parsed in a thread if they are large; whatever the client sends, the time is proportional to its length.
"""

from __future__ import annotations

import asyncio
import binascii
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from vitrine.service.errors import ServiceError
from vitrine.service.http.multipart import TooManyParts, parse_multipart
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.batch import BatchJson

Payload = TypeVar("Payload", bound=BaseModel)
Parsed = TypeVar("Parsed")

# One thread: each step of parsing holds the GIL for up to 50 ms, and several threads would take turns with each other
# before the event loop had one.
_PARSER = ThreadPoolExecutor(1, thread_name_prefix="parse")
LARGE_BYTES = 256 * 2**10  # a body of this size takes a millisecond to parse
# Values in one JSON body: far more than the largest request has. The parser holds the GIL, which stops the event loop
# even from another thread: 100 ms for a million values.
MAX_JSON_VALUES = 200_000


async def read_image(request: Request, shape: type[Payload], json_shape: type[BaseModel]) -> tuple[bytes, Payload]:
    """(image bytes, payload). `json_shape` is `shape` with `image_base64`."""
    image, payload = await read_optional_image(request, shape, json_shape)
    if image is None:
        raise ServiceError("missing_image", "the file part `image` is missing")
    return image, payload


async def read_optional_image(
    request: Request, shape: type[Payload], json_shape: type[BaseModel]
) -> tuple[bytes | None, Payload]:
    """The same, where the image is optional."""
    if _is_json(request):
        return await _parse_body(request, _parse_image, json_shape)
    images, payload = await _parse_body(request, _parse_parts, _content_type(request), shape, 1)
    return images[0] if images else None, payload


async def read_batch(request: Request, max_images: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    """(at most `max_images` images, each one or its error, and the payload for all of them)."""
    if _is_json(request):
        return await _parse_body(request, _parse_batch, max_images)
    images, payload = await _parse_body(
        request, _parse_parts, _content_type(request), AttributeRequest, max_images, many=True
    )
    if not images:
        raise ServiceError("missing_image", "send at least one file part `image`")
    return images, payload


async def _parse_body(request: Request, parse: Callable[..., Parsed], *args: Any, **options: Any) -> Parsed:
    """parse(body, *args, **options), in a thread if that is slow enough to delay other requests."""
    chunks = [chunk async for chunk in request.stream()]
    if sum(map(len, chunks)) > LARGE_BYTES:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_PARSER, lambda: parse(b"".join(chunks), *args, **options))
    return parse(b"".join(chunks), *args, **options)


def _parse_image(body: bytes, json_shape: type[BaseModel]) -> tuple[bytes | None, Any]:
    payload: Any = validated(json_shape, _load_json(body, "the body"))
    return None if payload.image_base64 is None else _image(payload.image_base64, "image_base64"), payload


def _parse_batch(body: bytes, max_images: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    payload = validated(BatchJson, _load_json(body, "the body"))
    if len(payload.images_base64) > max_images:
        raise _too_many(max_images)
    images: list[bytes | ServiceError] = []
    for number, text in enumerate(payload.images_base64):
        try:
            images.append(_image(text, f"images_base64[{number}]"))
        except ServiceError as error:
            images.append(error)
    return images, payload


def _load_json(text: bytes, where: str) -> Any:
    if len(text) > MAX_JSON_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ServiceError("invalid_request", f"{where} has more than {MAX_JSON_VALUES:,} JSON values")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, integers of thousands of digits, too deep
        raise ServiceError("invalid_request", f"{where} is not JSON: {error}") from error


def _is_json(request: Request) -> bool:
    kind = _content_type(request).partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise ServiceError(
            "unsupported_media_type",
            f"content type {kind[:100] or '(none)'!r}: send multipart/form-data with a file part `image`, "
            "or application/json with `image_base64`",
        )
    return kind == "application/json"


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _image(text: str, field: str) -> bytes:
    try:
        return binascii.a2b_base64(text.encode().translate(None, b" \t\r\n"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ServiceError("invalid_image", f"{field} is not base64: {error}") from error


def _parse_parts(
    body: bytes, content_type: str, shape: type[Payload], max_images: int, many: bool = False
) -> tuple[list[Any], Payload]:
    """(bytes of each part `image`, part `request` as `shape`). many: whether there may be several images."""
    try:
        parts = parse_multipart(
            content_type, body, max_images + 2
        )  # two `request`, one of them too many, are seen below
    except TooManyParts as error:
        raise (_too_many(max_images) if many else error) from error
    if unknown := sorted({part.name for part in parts} - {"image", "request"}):
        raise ServiceError("invalid_request", f"unknown part {unknown[0][:100]!r}; parts are `image` and `request`")
    images = [part for part in parts if part.name == "image"]
    requests = [part for part in parts if part.name == "request"]
    if repeated := [found[0].name for found in (requests, () if many else images) if len(found) > 1]:
        raise ServiceError("invalid_request", f"part {repeated[0]!r} is there more than once")
    if not all(part.is_file for part in images):
        raise ServiceError("missing_image", "`image` must be a file part (curl: -F image=@photo.jpg)")
    if len(images) > max_images:
        raise _too_many(max_images)
    text = bytes(requests[0].data) if requests else b"{}"
    return [bytes(part.data) for part in images], validated(shape, _load_json(text or b"{}", "part `request`"))


def _too_many(max_images: int) -> ServiceError:
    return ServiceError("batch_too_large", f"more than {max_images} images; send them in several requests")
