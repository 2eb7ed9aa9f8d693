"""Reading the bodies of requests: multipart, JSON or an image as it is, into image bytes and a validated payload.

Bodies are parsed in a thread if they are large; whatever the client sends, the time is proportional to its length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from vitrine.service.errors import ServiceError
from vitrine.service.http.content import check_coding, parse_body
from vitrine.service.http.image_text import image_of_text, is_data_url
from vitrine.service.http.multipart import Part, TooManyParts, parse_multipart
from vitrine.service.http.query import merged, query_fields
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.batch import BatchJson

Payload = TypeVar("Payload", bound=BaseModel)

# Values in one JSON body: far more than the largest request has. The parser holds the GIL, which stops the event loop
# even from another thread: 100 ms for a million values.
MAX_JSON_VALUES = 200_000
# `image[]` is how PHP, Rails and jQuery name the files of a list, `image[0]` how axios may.
_IMAGE = re.compile(r"image(?:\[(\d{0,6})\])?")
RAW_TYPES = ("image/*", "application/octet-stream")


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
    kind, query = _kind(request), query_fields(request, shape)
    if kind == "json":
        return await parse_body(request, _parse_image, json_shape, query)
    if kind == "raw":
        return await parse_body(request, bytes), validated(shape, query)
    images, payload = await parse_body(request, _parse_parts, _content_type(request), shape, query, 1)
    return images[0] if images else None, payload


async def read_batch(request: Request, max_images: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    """(at most `max_images` images, each one or its error, and the payload for all of them)."""
    kind, query = _kind(request), query_fields(request, AttributeRequest)
    if kind == "json":
        return await parse_body(request, _parse_batch, query, max_images)
    if kind == "raw":
        return [await parse_body(request, bytes)], validated(AttributeRequest, query)
    images, payload = await parse_body(
        request, _parse_parts, _content_type(request), AttributeRequest, query, max_images, many=True
    )
    if not images:
        raise ServiceError("missing_image", "send at least one file part `image`")
    return images, payload


def _parse_image(body: bytes, json_shape: type[BaseModel], query: dict[str, Any]) -> tuple[bytes | None, Any]:
    payload: Any = validated(json_shape, merged(query, load_json(body, "the body")))
    return None if payload.image_base64 is None else image_of_text(payload.image_base64, "image_base64"), payload


def _parse_batch(
    body: bytes, query: dict[str, Any], max_images: int
) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    payload = validated(BatchJson, merged(query, load_json(body, "the body")))
    if len(payload.images_base64) > max_images:
        raise too_many(max_images)
    images: list[bytes | ServiceError] = []
    for number, text in enumerate(payload.images_base64):
        try:
            images.append(image_of_text(text, f"images_base64[{number}]"))
        except ServiceError as error:
            images.append(error)
    return images, payload


def load_json(text: bytes, where: str) -> Any:
    """Parsed JSON. Raises `ServiceError` for what is none, or has too many values."""
    if len(text) > MAX_JSON_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ServiceError(
            "invalid_request", f"{where} has more than {MAX_JSON_VALUES:,} JSON values; send less in one request"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, integers of thousands of digits, too deep
        raise ServiceError("invalid_request", f"{where} is not JSON: {error}") from error


def _kind(request: Request) -> str:
    """`multipart`, `json` or `raw`. What cannot be read is refused before any of it is."""
    check_coding(request)
    kind = media_type(request)
    if kind in ("multipart/form-data", "application/json"):
        return kind.partition("/")[0].replace("application", "json")
    if kind.startswith("image/") or kind in RAW_TYPES:
        return "raw"
    raise ServiceError(
        "unsupported_media_type",
        f"content type {kind[:100] or '(none)'!r} is not supported; send multipart/form-data with a file part "
        "`image`, application/json with `image_base64`, or the bytes of an image with its own type, such as image/jpeg",
    )


def media_type(request: Request) -> str:
    """The body's Content-Type without its parameters."""
    return _content_type(request).partition(";")[0].strip().lower()


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _parse_parts(
    body: bytes,
    content_type: str,
    shape: type[Payload],
    query: dict[str, Any],
    max_images: int,
    many: bool = False,
) -> tuple[list[Any], Payload]:
    """(bytes of each part `image`, part `request` as `shape`). many: whether there may be several images."""
    try:
        parts = parse_multipart(
            content_type, body, max_images + 2
        )  # two `request`, one of them too many, are seen below
    except TooManyParts as error:
        raise (too_many(max_images) if many else error) from error
    if unknown := sorted(part.name for part in parts if part.name != "request" and not _IMAGE.fullmatch(part.name)):
        raise ServiceError(
            "invalid_request", f"there is no part {unknown[0][:100]!r}; the parts are `image` and `request`"
        )
    requests = [part for part in parts if part.name == "request"]
    images = _in_order([part for part in parts if part.name != "request"])
    if repeated := [
        name for name, found in (("request", requests), ("image", () if many else images)) if len(found) > 1
    ]:
        raise ServiceError("invalid_request", f"part {repeated[0]!r} is sent more than once")
    contents = [_image_of_part(part) for part in images]
    if len(images) > max_images:
        raise too_many(max_images)
    text = bytes(requests[0].data) if requests else b"{}"
    return contents, validated(shape, merged(query, load_json(text or b"{}", "part `request`")))


def _in_order(images: Sequence[Part]) -> list[Part]:
    """Numbered parts (`image[1]`) by their numbers, all others as they came."""
    numbers = [int(found[1]) if (found := _IMAGE.fullmatch(part.name)) and found[1] else 0 for part in images]
    return [images[place] for place in sorted(range(len(images)), key=numbers.__getitem__)]


def _image_of_part(part: Part) -> bytes:
    """An image's bytes. A part without a file name is a file, too, unless it is text."""
    data = bytes(part.data)
    if part.is_file or part.media_type.startswith("image/") or part.media_type in RAW_TYPES:
        return data
    try:
        text = data.decode()
    except UnicodeDecodeError:  # as every JPEG, PNG and WebP is
        return data
    if is_data_url(text):  # of a form's field, into which a script wrote what a canvas drew
        return image_of_text(text, "part `image`")
    raise ServiceError(
        "missing_image",
        "`image` must be a file part (curl: -F image=@photo.jpg) or a data URL; other URLs are not fetched",
    )


def too_many(max_images: int) -> ServiceError:
    """The error for more images than one request may have."""
    return ServiceError("batch_too_large", f"there are more than {max_images} images; send them in several requests")
