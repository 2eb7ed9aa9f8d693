"""The bodies of requests, multipart or JSON: image bytes and what is asked. Every mistake is a `ServiceError`."""

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

Asked = TypeVar("Asked", bound=BaseModel)
Parsed = TypeVar("Parsed")

LARGE_BYTES = 256 * 2**10  # of JSON: a millisecond of parsing


async def read_image(request: Request, shape: type[Asked], json_shape: type[BaseModel]) -> tuple[bytes, Asked]:
    """(image bytes, what is asked). `json_shape` is `shape` and `image_base64`."""
    image, asked = await read_optional_image(request, shape, json_shape)
    if image is None:
        raise ServiceError("missing_image", "the file part `image` is missing")
    return image, asked


async def read_optional_image(
    request: Request, shape: type[Asked], json_shape: type[BaseModel]
) -> tuple[bytes | None, Asked]:
    """The same, where an image is not needed."""
    if _is_json(request):
        return await _off_the_loop(_parse_image, await request.body(), json_shape)
    images, asked = await _read_multipart(request, shape, 1)
    return images[0] if images else None, asked


async def read_batch(request: Request, most: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    """(at most `most` images or why one cannot be read, what is asked of all)."""
    if not _is_json(request):
        parts, asked = await _read_multipart(request, AttributeRequest, most)
        if not parts:
            raise ServiceError("missing_image", "send at least one file part `image`")
        return parts, asked
    return await _off_the_loop(_parse_batch, await request.body(), most)


async def _off_the_loop(parse: Callable[..., Parsed], body: bytes, *args: Any) -> Parsed:
    """parse(body, *args), in a thread where it takes so long that others would notice."""
    return await asyncio.to_thread(parse, body, *args) if len(body) > LARGE_BYTES else parse(body, *args)


def _parse_image(body: bytes, json_shape: type[BaseModel]) -> tuple[bytes | None, Any]:
    asked: Any = validated(json_shape, _load_json(body, "the body"))
    return None if asked.image_base64 is None else _image(asked.image_base64, "image_base64"), asked


def _parse_batch(body: bytes, most: int) -> tuple[list[bytes | ServiceError], AttributeRequest]:
    asked = validated(BatchJson, _load_json(body, "the body"))
    if len(asked.images_base64) > most:
        raise _too_many(most)
    images: list[bytes | ServiceError] = []
    for number, text in enumerate(asked.images_base64):
        try:
            images.append(_image(text, f"images_base64[{number}]"))
        except ServiceError as error:
            images.append(error)
    return images, asked


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


async def _read_multipart(request: Request, shape: type[Asked], most: int) -> tuple[list[Any], Asked]:
    """(bytes of each part `image`, part `request` as `shape`)."""
    limit = request.app.state.settings.max_body_bytes
    try:
        form = await request.form(max_files=most + 1, max_fields=2, max_part_size=limit)
    except (LookupError, UnicodeError) as error:
        raise ServiceError("invalid_request", f"the multipart body's charset cannot be used: {error}") from error
    except HTTPException as error:
        if most > 1 and error.detail.startswith("Too many files"):
            raise _too_many(most) from error
        raise
    try:
        return await _read_parts(form, shape, most)
    finally:
        await form.close()


async def _read_parts(form: FormData, shape: type[Asked], most: int) -> tuple[list[bytes], Asked]:
    if unknown := sorted(set(form) - {"image", "request"}):
        raise ServiceError("invalid_request", f"unknown part {unknown[0][:100]!r}; parts are `image` and `request`")
    single = ("request",) if most > 1 else ("image", "request")
    if repeated := [name for name in single if len(form.getlist(name)) > 1]:
        raise ServiceError("invalid_request", f"part {repeated[0]!r} is there more than once")
    images = []
    for part in form.getlist("image"):
        if not isinstance(part, UploadFile):
            raise ServiceError("missing_image", "`image` must be a file part (curl: -F image=@photo.jpg)")
        images.append(await part.read())
    if len(images) > most:
        raise _too_many(most)
    asked = form.get("request")
    text = await asked.read() if isinstance(asked, UploadFile) else (asked or "{}")
    return images, validated(shape, _load_json(text, "part `request`"))


def _too_many(most: int) -> ServiceError:
    return ServiceError("batch_too_large", f"more than {most} images; send them in several requests")
