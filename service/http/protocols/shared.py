"""What the protocols share: JSON bodies whatever their declared type, and the one model that there is."""

from __future__ import annotations

from typing import Any

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request

from vitrine.service.answers.attributor import Attributor
from vitrine.service.errors import ServiceError
from vitrine.service.http.content import check_coding, parse_body
from vitrine.service.http.requests import load_json, media_type

# `curl -d`, as in KServe's documentation, says of JSON that it is a form
JSON_TYPES = ("application/json", "application/x-www-form-urlencoded", "")


class AnyConvertor(Convertor[str]):
    """A model's name in the middle of a path: with slashes, and even line breaks, so that it is the name that is
    refused."""

    regex = r"(?s:.+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class ModelConvertor(AnyConvertor):
    """A model's name in a path that ends with it. It may have slashes, but is not what other paths end with: to those
    GET is the wrong method, and not the name of a model that is not there."""

    regex = r"(?s:(?!.*(?::predict|:explain|/infer|/ready)$).+)"


register_url_convertor("any", AnyConvertor())
register_url_convertor("model", ModelConvertor())


async def read_json(request: Request) -> Any:
    """The JSON of a body. Raises `ServiceError`, before any of it is read where it is of another type."""
    check_coding(request)
    if (kind := media_type(request)) not in JSON_TYPES:
        raise ServiceError(
            "unsupported_media_type", f"content type {kind[:100]!r} is not supported; send application/json"
        )
    return await parse_body(request, load_json, "the body")


def check_model(attributor: Attributor, name: str) -> None:
    """Raise `ServiceError` model_not_found for any model but the one in service."""
    if name != (served := attributor.model.name):
        raise ServiceError(
            "model_not_found",
            f"there is no model named {name[:100]!r}; the one in service is {served!r}",
            [{"field": "model", "problem": f"it must be {served!r}"}],
        )
