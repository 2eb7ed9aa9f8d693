"""Fields of a request in its query: `?labels=cat&labels=dog&top_k=1`. A raw image has no other place for them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from vitrine.service.errors import ServiceError


def query_fields(request: Request, shape: type[BaseModel]) -> dict[str, Any]:
    """The fields of `shape` that the query has: texts as they are, lists of texts one by one, all else as JSON.

    Raises `ServiceError` for names that are no fields, and for what is no JSON.
    """
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(request.query_params):
        values = request.query_params.getlist(name)
        kind = kinds(shape).get(name)
        if kind is None:
            known = ", ".join(kinds(shape))
            raise _invalid(f"there is no query parameter {name[:100]!r}; the parameters are: {known}")
        if kind == "texts":
            fields[name] = values
        elif len(values) > 1:
            raise _invalid(f"the query parameter {name!r} is sent more than once")
        else:
            fields[name] = values[0] if kind == "text" else _from_json(name, values[0])
    return fields


@cache
def kinds(shape: type[BaseModel]) -> dict[str, str]:
    """What the query has for each field of a request: `text`, `texts` or `json`."""
    return {name: _kind(schema) for name, schema in shape.model_json_schema()["properties"].items()}


def _kind(schema: dict[str, Any]) -> str:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    if len(options) == 1 and options[0].get("type") == "string":
        return "text"
    if len(options) == 1 and options[0].get("type") == "array" and options[0]["items"].get("type") == "string":
        return "texts"
    return "json"


def merged(query: dict[str, Any], fields: Any) -> Any:
    """The fields of a body with those of the query. Raises `ServiceError` for a field that is in both."""
    if not query or not isinstance(fields, dict):
        return fields
    if both := sorted(query.keys() & fields.keys()):
        raise _invalid(f"{both[0]!r} is both in the query and in the body; send it once")
    return fields | query


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"the query parameter {name!r} is not JSON: {error}") from error


def _invalid(message: str) -> ServiceError:
    return ServiceError("invalid_request", message)
