"""The page at `/`: a photo in, the prediction and its account on the screen.

It uses this service only, and its content security policy allows nothing else. Its files are in `service.page_files`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from vitrine.service.errors import ServiceError
from vitrine.service.page_files import FOLDER

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    etag: str


def add_page(app: FastAPI) -> None:
    """`/`, and its files under `/web/`.

    The files are read once, here: they and their ETags stay the same while the process lives, and no path leads to any
    other file.
    """
    files = {path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*") if path.suffix in TYPES}
    index = files.pop("index.html")
    del files["saved.html"], files["circuit.html"]

    async def page(request: Request) -> Response:
        return _response(request, index)

    async def file(request: Request, path: str) -> Response:
        asset = files.get(path)
        if asset is None:
            raise ServiceError("not_found", f"there is nothing at {request.url.path}")
        return _response(request, asset)

    app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(page)
    app.api_route("/web/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)(file)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _response(request: Request, file: _File) -> Response:
    """The file, or 304 if the browser's copy is current."""
    headers = HEADERS | {"ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
