"""OpenAPI for the request bodies that FastAPI does not parse for us, and the page /docs that shows the document.

The page's script and style are Swagger UI's, served from a package and from here: nothing is fetched from elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from vitrine.service.http.query import kinds
from vitrine.service.http.requests import RAW_TYPES
from vitrine.service.schemas.base import ErrorResponse

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Vitrine: the API</title><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs.js"></script></body>
</html>
"""
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});\n'


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses, for a route's `responses`."""
    return errors_of(ErrorResponse, *statuses)


def errors_of(shape: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same, in another protocol's shape."""
    return {status: {"model": shape} for status in statuses}


def json_body(shape: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: a body of JSON alone."""
    content = {"application/json": {"schema": _inlined(shape.model_json_schema())}}
    return {"requestBody": {"required": True, "content": content}}


def multipart_or_json(
    part: type[BaseModel], json_body: type[BaseModel], min_images: int, max_images: int
) -> dict[str, Any]:
    """A route's `openapi_extra`.

    Args:
        part: model of the part `request`.
        json_body: model of a JSON body.
        min_images: minimum number of images of the route.
        max_images: maximum number of images of the route.
    """
    image: dict[str, Any] = {"type": "string", "format": "binary"}
    body = _inlined(json_body.model_json_schema())
    if max_images > 1:
        image = {"type": "array", "items": image, "minItems": min_images, "maxItems": max_images}
        body["properties"]["images_base64"]["maxItems"] = max_images
    multipart = {
        "type": "object",
        "properties": {"image": image, "request": _inlined(part.model_json_schema())},
        "required": ["image"] if min_images else [],
        "additionalProperties": False,
    }
    types = {"image": "application/octet-stream", "request": "application/json"}
    encoding = {name: {"contentType": kind} for name, kind in types.items()}
    content = {"multipart/form-data": {"schema": multipart, "encoding": encoding}, "application/json": {"schema": body}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW_TYPES}
    return {"requestBody": {"required": True, "content": content}, "parameters": _fields_in_query(part)}


def _fields_in_query(shape: type[BaseModel]) -> list[dict[str, Any]]:
    """The fields of a request as query parameters (`http.query`): texts, repeated for a list of them, or JSON."""
    properties, parameters = _inlined(shape.model_json_schema())["properties"], []
    for name, kind in kinds(shape).items():
        schema = {key: value for key, value in properties[name].items() if key not in ("title", "description")}
        parameter = {"name": name, "in": "query", "description": properties[name].get("description", "")}
        if kind == "json":
            parameter["content"] = {"application/json": {"schema": schema}}
        else:
            options = schema.pop("anyOf", [schema])
            parameter["schema"] = next(option for option in options if option.get("type") != "null")
        parameters.append(parameter)
    return parameters


def query_parameters(shape: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: its query parameters, the fields of `shape`."""
    schema = _inlined(shape.model_json_schema())
    required = schema.get("required", [])
    parameters = []
    for name, field in schema["properties"].items():
        description = field.pop("description", "")
        options = field.pop("anyOf", None)  # a parameter is omitted, never null
        kind = next((option for option in options if option.get("type") != "null"), {}) if options else field
        for key in ("default", "title"):
            field.pop(key, None)
        parameters.append(
            {"name": name, "in": "query", "required": name in required, "schema": kind, "description": description}
        )
    return {"parameters": parameters}


def document_keys(app: FastAPI, paths: Collection[str]) -> None:
    """Document that requests to these paths need a key."""
    document = app.openapi()
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in paths:
        for operation in document["paths"][path].values():
            operation["security"] = [{"key": []}]


def add_docs(app: FastAPI) -> None:
    """`/docs`, with its files below that path."""

    async def page(_: Request) -> Response:
        return Response(_PAGE, media_type="text/html", headers=PAGE_HEADERS)

    async def start(_: Request) -> Response:
        return Response(_START, media_type="text/javascript")

    app.get("/docs", include_in_schema=False)(page)
    app.get("/docs.js", include_in_schema=False)(start)
    app.mount("/docs", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="docs")


def _inlined(schema: dict[str, Any]) -> Any:
    """A JSON schema with its $defs inlined, so that it can be part of another document."""
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(
                    definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
                )
            return {key: inline(value) for key, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    return inline(schema)
