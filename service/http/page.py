"""The page at `/`: a photo in, the prediction and its account on the screen; and at `/circuit` its circuit, which the
page opens in a window of its own.

They use this service only, and their content security policy allows nothing else. Their files are in
`service.page_files`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from vitrine.service.errors import ServiceError
from vitrine.service.page_files import CIRCUIT_SCRIPTS, CIRCUIT_STYLES, FOLDER

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
_CIRCUIT = """<!DOCTYPE html>
<html lang="en-GB">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>Vitrine: a circuit</title>
  <link rel="icon" href="web/icon.svg" type="image/svg+xml">
{links}
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    etag: str


def add_page(app: FastAPI) -> None:
    """`/` and `/circuit`, and their files under `/web/`.

    The files are read once, here: they and their ETags stay the same while the process lives, and no path leads to any
    other file.
    """
    paths = [path for path in FOLDER.rglob("*") if path.suffix in TYPES]
    files = {path.relative_to(FOLDER).as_posix(): _file(path.read_bytes(), path.suffix) for path in paths}
    index, body = files.pop("index.html"), files.pop("circuit.html")
    del files["saved.html"]
    links = [f'  <link rel="stylesheet" href="web/{name}">' for name in CIRCUIT_STYLES]
    links += [f'  <script defer src="web/{name}"></script>' for name in CIRCUIT_SCRIPTS]
    circuit = _file(_CIRCUIT.format(links="\n".join(links), body=body.content.decode()).encode(), ".html")

    async def page(request: Request) -> Response:
        return _response(request, index)

    async def circuit_page(request: Request) -> Response:
        return _response(request, circuit)

    async def file(request: Request, path: str) -> Response:
        asset = files.get(path)
        if asset is None:
            raise ServiceError("not_found", f"there is no file at {request.url.path}")
        return _response(request, asset)

    app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(page)
    app.api_route("/circuit", methods=["GET", "HEAD"], include_in_schema=False)(circuit_page)
    app.api_route("/web/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)(file)


def _file(content: bytes, suffix: str) -> _File:
    # weak, since the answer may be compressed: the same for every coding, for HEAD and for 304
    return _File(content, TYPES[suffix], f'W/"{hashlib.sha256(content).hexdigest()[:32]}"')


def _response(request: Request, file: _File) -> Response:
    """The file, or 304 if the browser's copy is current."""
    headers = HEADERS | {"ETag": file.etag}
    if file.etag.removeprefix("W/") in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)
