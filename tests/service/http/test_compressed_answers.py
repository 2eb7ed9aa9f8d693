"""Answers of 1 kB and more are sent with gzip to those who take it, and say the same."""

import asyncio
import gzip
import json
import random

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrine.service.http.compression import SMALLEST_BYTES, CompressionMiddleware, accepts_gzip


def ask(server, method, path, accepted, **options):
    """(the answer, its body as it came)."""
    headers = {"accept-encoding": accepted} | options.pop("headers", {})
    with server.http.stream(method, path, headers=headers, **options) as response:
        return response, b"".join(response.iter_raw())


def test_answers_over_a_kilobyte_are_compressed(server, picture):
    files, url = [("image", ("a", picture(seed=seed))) for seed in range(12)], "/v1/attribute:batch"
    for path, sent in (("/v1/attribute", files[:1]), (url, files), ("/v1/model", None)):
        method = "POST" if sent else "GET"
        plain, text = ask(server, method, path, "identity", files=sent)
        response, body = ask(server, method, path, "br, gzip;q=0.5", files=sent)
        assert response.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        assert response.headers["vary"] == plain.headers["vary"] == "Accept-Encoding"
        assert len(body) < 0.6 * len(text)
        said = json.loads(gzip.decompress(body))
        assert said.keys() == json.loads(text).keys()
        if path == url:
            assert len(said["results"]) == 12


def test_small_answers_are_not(server, picture):
    for accepted in ("gzip", "*"):
        response, body = ask(server, "POST", "/v1/classify", accepted, files={"image": ("a", picture())})
        assert "content-encoding" not in response.headers
        assert len(json.loads(body)["predictions"]) == 3
        assert int(response.headers["content-length"]) == len(body) < 1_024


def test_the_page_keeps_its_copy(server):
    response, body = ask(server, "GET", "/", "gzip")
    assert response.headers["content-encoding"] == "gzip"
    assert int(response.headers["content-length"]) == len(body)
    etag = response.headers["etag"]
    assert etag.startswith("W/")
    response, body = ask(server, "GET", "/", "gzip", headers={"if-none-match": etag})
    assert (response.status_code, body) == (304, b"")
    response, body = ask(server, "HEAD", "/", "gzip")
    assert (response.status_code, body) == (200, b"")


def test_refusals_and_pictures(server, refused):
    response, body = ask(server, "POST", "/v1/attribute", "gzip", json={"image_base64": "AAAA", "x" * 90: ["y"] * 90})
    assert response.status_code == 400
    assert "content-encoding" not in response.headers
    assert json.loads(body)["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        ("gzip", True),
        ("deflate, GZIP ;q=0.1", True),
        ("*", True),
        ("x-gzip", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("*;q=0", False),
        ("gzipped", False),
        ("br, zstd", False),
    ],
)
def test_who_takes_gzip(header, taken):
    assert accepts_gzip(header) is taken


@settings(deadline=None)  # the first is slow where another test runs beside it
@given(st.lists(st.sampled_from([0, 1, 700, 40_000]), min_size=1, max_size=4), st.booleans())
def test_pieces_come_out_as_they_went_in(sizes, declared):
    total = sum(sizes)
    pieces = [random.Random(size).randbytes(size) for size in sizes]

    async def app(scope, receive, send):
        length = [(b"content-length", str(total).encode())] if declared else []
        headers = [(b"content-type", b"application/json"), *length]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": pieces[-1]})

    async def run():
        transport = httpx.ASGITransport(CompressionMiddleware(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
            return await client.get("/", headers={"accept-encoding": "gzip"})

    response = asyncio.run(run())
    assert response.content == b"".join(pieces)
    is_large = (total if declared else sizes[0]) >= SMALLEST_BYTES
    assert (response.headers.get("content-encoding") == "gzip") is is_large
