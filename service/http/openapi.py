"""The OpenAPI document's account of the bodies that FastAPI does not parse for us, and the page /docs that shows it.

The page's script and style are Swagger UI's, from a package and from here: nothing is fetched from anybody else.
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
    """Answers that are no success, for a route's `responses`."""
    return {status: {"model": ErrorResponse} for status in statuses}


def multipart_or_json(part: type[BaseModel], whole: type[BaseModel], least: int, most: int) -> dict[str, Any]:
    """A route's `openapi_extra`. part: of the part `request`; whole: of a JSON body; so many images it takes."""
    image: dict[str, Any] = {"type": "string", "format": "binary"}
    body = _inlined(whole.model_json_schema())
    if most > 1:
        image = {"type": "array", "items": image, "minItems": least, "maxItems": most}
        body["properties"]["images_base64"]["maxItems"] = most
    multipart = {
        "type": "object",
        "properties": {"image": image, "request": _inlined(part.model_json_schema())},
        "required": ["image"] if least else [],
        "additionalProperties": False,
    }
    types = {"image": "application/octet-stream", "request": "application/json"}
    encoding = {name: {"contentType": kind} for name, kind in types.items()}
    content = {"multipart/form-data": {"schema": multipart, "encoding": encoding}, "application/json": {"schema": body}}
    return {"requestBody": {"required": True, "content": content}}


def query_of(shape: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: the query parameters that it reads as `shape`."""
    schema = _inlined(shape.model_json_schema())
    required = schema.get("required", [])
    parameters = []
    for name, field in schema["properties"].items():
        description = field.pop("description", "")
        options = field.pop("anyOf", None)  # a parameter is left out, never null
        known = next((option for option in options if option.get("type") != "null"), {}) if options else field
        for key in ("default", "title"):
            field.pop(key, None)
        parameters.append(
            {"name": name, "in": "query", "required": name in required, "schema": known, "description": description}
        )
    return {"parameters": parameters}


def ask_for_keys(app: FastAPI, paths: Collection[str]) -> None:
    """Say in the document that requests to these paths need a key."""
    document = app.openapi()
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path in paths:
        for operation in document["paths"][path].values():
            operation["security"] = [{"key": []}]


def add_docs(app: FastAPI) -> None:
    """`/docs`; what it needs lies under it."""

    async def page(_: Request) -> Response:
        return Response(_PAGE, media_type="text/html", headers=PAGE_HEADERS)

    async def start(_: Request) -> Response:
        return Response(_START, media_type="text/javascript")

    app.get("/docs", include_in_schema=False)(page)
    app.get("/docs.js", include_in_schema=False)(start)
    app.mount("/docs", StaticFiles(directory=Path(fastapi_offline.__file__).parent / "static"), name="docs")


def _inlined(schema: dict[str, Any]) -> Any:
    """A JSON schema with its $defs put where they are referred to, as it stands inside another document."""
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return put(
                    definitions[node["$ref"].rpartition("/")[2]] | {k: v for k, v in node.items() if k != "$ref"}
                )
            return {key: put(value) for key, value in node.items()}
        return [put(value) for value in node] if isinstance(node, list) else node

    return put(schema)
