"""Request bodies, multipart or JSON: image bytes and the payload. Every error in them is a `ServiceError`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.batch import BatchJson

Payload = TypeVar("Payload", bound=BaseModel)
Parsed = TypeVar("Parsed")

LARGE_BYTES = 256 * 2**10  # JSON of this size takes a millisecond to parse


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
        return await _parse_off_loop(_parse_image, await request.body(), json_shape)
    images, payload = await _read_multipart(request, shape, 1)
    return images[0] if images else None, payload


async def read_batch(request: Request, max_images: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    """(at most `max_images` images, each one or its error, and the payload for all of them)."""
    if not _is_json(request):
        parts, payload = await _read_multipart(request, AttributeRequest, max_images)
        if not parts:
            raise ServiceError("missing_image", "send at least one file part `image`")
        return parts, payload
    return await _parse_off_loop(_parse_batch, await request.body(), max_images)


async def _parse_off_loop(parse: Callable[..., Parsed], body: bytes, *args: Any) -> Parsed:
    """parse(body, *args), in a thread if it is slow enough to delay other requests."""
    return await asyncio.to_thread(parse, body, *args) if len(body) > LARGE_BYTES else parse(body, *args)


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


def _load_json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, integers of thousands of digits, too deep
        raise ServiceError("invalid_request", f"{where} is not JSON: {error}") from error


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("multipart/form-data", "application/json"):
        raise ServiceError(
            "unsupported_media_type",
            f"content type {kind or '(none)'!r}: send multipart/form-data with a file part `image`, "
            "or application/json with `image_base64`",
        )
    return kind == "application/json"


def _image(text: str, field: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServiceError("invalid_image", f"{field} is not base64: {error}") from error


async def _read_multipart(request: Request, shape: type[Payload], max_images: int) -> tuple[list[Any], Payload]:
    """(bytes of each part `image`, part `request` as `shape`)."""
    limit = request.app.state.settings.max_body_bytes
    try:
        form = await request.form(max_files=max_images + 1, max_fields=2, max_part_size=limit)
    except (LookupError, UnicodeError) as error:
        raise ServiceError("invalid_request", f"the multipart body's charset cannot be used: {error}") from error
    except HTTPException as error:
        if max_images > 1 and error.detail.startswith("Too many files"):
            raise _too_many(max_images) from error
        raise
    try:
        return await _read_parts(form, shape, max_images)
    finally:
        await form.close()


async def _read_parts(form: FormData, shape: type[Payload], max_images: int) -> tuple[list[bytes], Payload]:
    if unknown := sorted(set(form) - {"image", "request"}):
        raise ServiceError("invalid_request", f"unknown part {unknown[0][:100]!r}; parts are `image` and `request`")
    single = ("request",) if max_images > 1 else ("image", "request")
    if repeated := [name for name in single if len(form.getlist(name)) > 1]:
        raise ServiceError("invalid_request", f"part {repeated[0]!r} is there more than once")
    images = []
    for part in form.getlist("image"):
        if not isinstance(part, UploadFile):
            raise ServiceError("missing_image", "`image` must be a file part (curl: -F image=@photo.jpg)")
        images.append(await part.read())
    if len(images) > max_images:
        raise _too_many(max_images)
    request_part = form.get("request")
    text = await request_part.read() if isinstance(request_part, UploadFile) else (request_part or "{}")
    return images, validated(shape, _load_json(text, "part `request`"))


def _too_many(max_images: int) -> ServiceError:
    return ServiceError("batch_too_large", f"more than {max_images} images; send them in several requests")
