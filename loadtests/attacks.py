"""What hostile or broken clients send, one function per attack; `abuse.py attacks` runs them with valid requests.

Each returns how its requests were answered, by status; `unanswered` are those whose connection ended without an answer.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import struct
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from corpus import drawn_images, http_request, multipart

MIB = 2**20
BODY_LIMIT = 16 * MIB
JSON = "application/json"
PATIENCE = 60  # seconds until an attacker gives up on an answer

Outcomes = Counter[str]


@dataclass(frozen=True)
class Target:
    """The server under attack: its address, its process, and a photo that it answers. Can be pickled."""

    host: str
    port: int
    pid: int
    photo: bytes


Attack = Callable[[Target], Awaitable[Outcomes]]


async def ask(target: Target, chunks: Iterable[bytes], pause: float = 0) -> str:
    """Send the chunks on a connection of its own while waiting for the answer; its status."""
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
    except OSError:
        return "not connected"

    async def send() -> None:
        with suppress(ConnectionError):
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    try:
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        return line.decode("latin-1").split()[1] if line else "unanswered"
    except TimeoutError:
        return "gave up"
    except ConnectionError:
        return "unanswered"
    finally:
        sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending
        writer.close()


async def _many(requests: Iterable[Awaitable[str]]) -> Outcomes:
    return Counter(await asyncio.gather(*requests))


def _post(path: str, body: bytes, content_type: str = JSON) -> list[bytes]:
    return [http_request(path, body, {"Content-Type": content_type})]


def _image(target: Target, image: bytes, path: str = "/v1/classify") -> Awaitable[str]:
    return ask(target, [http_request(path, *multipart(image, "{}"))])


# Bodies


async def odd_charsets(target: Target) -> Outcomes:
    """Multipart bodies in codecs that take quadratic time, of 1 MB each."""
    part = b'--x\r\nContent-Disposition: form-data; name="a-"\r\n\r\n' + b"a" * MIB + b"\r\n--x--\r\n"
    kinds = [f"multipart/form-data; boundary=x; charset={name}" for name in ("punycode", "idna", "utf-7", "zlib")]
    return await _many(ask(target, _post("/v1/attribute", part, kind)) for kind in kinds * 4)


async def hard_json(target: Target) -> Outcomes:
    """JSON of 16 MB: millions of values, deep nesting, escapes, base64 with spaces, long numbers."""
    size = BODY_LIMIT - 100
    bodies = [
        b"[" + b"[]," * (size // 3) + b"1]",
        b"[" * size,
        b'{"image_base64":"' + b"\\u0041" * (size // 6) + b'"}',
        b'{"image_base64":"' + b"A " * (size // 2) + b'"}',
        b'{"top_k":' + b"1" * size + b"}",
        b'{"images_base64":[' + b'"",' * (size // 4) + b'""]}',
    ]
    paths = ("/v1/attribute", "/v1/attribute:batch")
    return await _many(ask(target, _post(path, body)) for body in bodies for path in paths)


async def hard_multipart(target: Target) -> Outcomes:
    """Multipart bodies of 16 MB made of what boundaries are made of, or of a hundred thousand parts."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
    size = BODY_LIMIT - 200
    bodies = [head + b"\r\n--" * (size // 4) + b"\r\n--x--\r\n", (head + b"\r\n") * (size // (len(head) + 2))]
    kind = "multipart/form-data; boundary=x"
    return await _many(ask(target, _post("/v1/attribute:batch", body, kind)) for body in bodies * 4)


async def held_uploads(target: Target) -> Outcomes:
    """80 uploads of 15 MB, base64 in JSON, whose last byte never comes, for ten seconds."""
    whole = http_request("/v1/attribute", b'{"image_base64": "' + b"A" * 15 * MIB + b'"}', {"Content-Type": JSON})[:-1]

    async def hold() -> str:
        with suppress(TimeoutError):
            return await asyncio.wait_for(ask(target, (whole[at : at + MIB] for at in range(0, len(whole), MIB))), 10)
        return "held"

    return await _many(hold() for _ in range(80))


async def unread_refusals(target: Target) -> Outcomes:
    """Bodies of 100 MB, announced and not, from clients that go on sending after the refusal."""
    head = b"POST /v1/attribute HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: image/jpeg\r\n"
    announced = [head + b"Content-Length: %d\r\n\r\n" % (100 * MIB), *[bytes(MIB)] * 100]
    chunked = [head + b"Transfer-Encoding: chunked\r\n\r\n", *[b"100000\r\n" + bytes(MIB) + b"\r\n"] * 100]
    return await _many(ask(target, chunks) for chunks in (announced, chunked) * 4)


# Connections and heads


async def huge_headers(target: Target) -> Outcomes:
    """A header of 100 MB, ten thousand headers, a path of 10 MB."""
    start = b"GET /livez HTTP/1.1\r\nHost: h\r\n"
    heads = [
        [start + b"A: ", *[b"a" * MIB] * 100],
        [start, *[b"".join(b"A%d: b\r\n" % number for number in range(10_000))], b"\r\n"],
        [b"GET /", *[b"a" * MIB] * 10, b" HTTP/1.1\r\n\r\n"],
        [b"GET /?", *[b"&a=b" * 50_000], b" HTTP/1.1\r\nHost: h\r\n\r\n"],
    ]
    return await _many(ask(target, head) for head in heads * 2)


async def slow_heads(target: Target) -> Outcomes:
    """200 connections that send a header a second, for ever, until they are closed."""

    def drip() -> Iterable[bytes]:
        yield b"GET /livez HTTP/1.1\r\n"
        for number in range(PATIENCE):
            yield b"A%d: b\r\n" % number

    return await _many(ask(target, drip(), pause=1) for _ in range(200))


async def idle_connections(target: Target) -> Outcomes:
    """1,500 connections on which nothing is sent, for five seconds."""

    async def idle() -> str:
        with suppress(TimeoutError):
            return await asyncio.wait_for(ask(target, []), 5)
        return "idle"

    return await _many(idle() for _ in range(1500))


async def junk(target: Target) -> Outcomes:
    """No HTTP, TLS, websockets, numbers of 4,400 digits, odd methods."""
    digits = b"1" * 4400
    requests = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"\0" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET /v1/features/0/" + digits + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v1/features?offset=" + digits + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: h\r\nContent-Length: " + digits + b"\r\n\r\n",
        b"PROPFIND /v1/classify HTTP/1.1\r\nHost: h\r\n\r\n",
    ]
    return await _many(ask(target, [request]) for request in requests * 5)


async def unread_answers(target: Target) -> Outcomes:
    """20 clients that ask for the largest answers and do not read them, for ten seconds."""
    labels = [f"label {number}" for number in range(32)]
    request = {"labels": labels, "explain": {"targets": labels, "heatmap": True, "lens": True, "features": 1000}}
    payload = http_request("/v1/attribute", *multipart(target.photo, json.dumps(request)))

    async def ask_only() -> str:
        try:
            _, writer = await asyncio.open_connection(target.host, target.port)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            for _ in range(8):
                writer.write(payload)
            await asyncio.sleep(10)
            writer.close()
        except OSError:
            return "unanswered"
        return "not read"

    return await _many(ask_only() for _ in range(20))


# Images


def _exif_segments(size: int) -> bytes:
    """A JPEG with as many Exif segments as fit."""
    segment = b"\xff\xe1\x00\x10Exif\0\0" + bytes(8)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    return jpeg[:2] + segment * ((size - len(jpeg)) // len(segment)) + jpeg[2:]


def _png(width: int, height: int, chunks: bytes, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _png_chunks(size: int) -> bytes:
    content = b"a\0b"
    text = struct.pack(">I", len(content)) + b"tEXt" + content + struct.pack(">I", zlib.crc32(b"tEXt" + content))
    return _png(32, 32, text * (size // len(text)), zlib.compress(bytes(97 * 32)))


def _png_bomb() -> bytes:
    """40 million pixels in 120 kB."""
    return _png(8000, 5000, b"", zlib.compress(bytes((8000 * 3 + 1) * 5000), 9))


def _gif_blocks(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (32, 32)).save(buffer, "GIF")
    gif = buffer.getvalue()
    at = 13 + 3 * 2 ** ((gif[10] & 7) + 1) if gif[10] & 128 else 13
    return gif[:at] + b"!\xfe\x01a\x00" * (size // 5) + gif[at:]


async def image_segments(target: Target) -> Outcomes:
    """JPEG, PNG and GIF files of a hundred thousand segments, chunks or blocks: 2 and 15 MB."""
    files = [make(size * MIB) for size in (2, 15) for make in (_exif_segments, _png_chunks, _gif_blocks)]
    return await _many(_image(target, file) for file in files * 2)


async def image_bombs(target: Target) -> Outcomes:
    """Small files of very many pixels, or of more than are allowed."""
    bomb = _png_bomb()
    wide = _png(60_000, 60_000, b"", zlib.compress(bytes(1000)))
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2000, 2500, 3), np.uint8)).save(
        noise, "JPEG", quality=95
    )
    return await _many(_image(target, file) for file in [bomb, wide, noise.getvalue()] * 4)


# What is asked for


async def large_answers(target: Target) -> Outcomes:
    """Batches of 64 images with 32 targets and every detail, and the largest that are answered."""
    labels = [f"label {number}" for number in range(32)]
    everything = {"heatmap": True, "lens": True, "features": 1000}

    def batch(images: int, targets: int) -> list[bytes]:
        request = json.dumps({"labels": labels, "explain": {"targets": labels[:targets], **everything}})
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + target.photo + b"\r\n"
        end = b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n' + request.encode() + b"\r\n--x--\r\n"
        return _post("/v1/attribute:batch", part * images + end, "multipart/form-data; boundary=x")

    return await _many(ask(target, batch(*size)) for size in [(64, 32), (64, 8), (16, 32), (64, 1)])


async def many_prompts(target: Target) -> Outcomes:
    """16,384 new prompts in one request, twice, and templates that fill in to 32 kB."""
    new = os.urandom(4).hex()
    labels = [f"{new} thing {number}" for number in range(128)]
    templates = [f"picture {number} of {{}}" for number in range(128)]
    plain = json.dumps({"labels": labels, "templates": templates})
    long = json.dumps({"labels": [("many words " * 23) + str(n) for n in range(64)], "templates": ["{}" * 127]})
    return await _many(
        ask(target, [http_request("/v1/classify", *multipart(target.photo, text))]) for text in (plain, long, plain)
    )


async def reloads(target: Target) -> Outcomes:
    """40 signals to reload, within two seconds."""
    for _ in range(40):
        os.kill(target.pid, signal.SIGHUP)
        await asyncio.sleep(0.05)
    await asyncio.sleep(5)
    return Counter({"signals": 40})


async def overload(target: Target) -> Outcomes:
    """600 requests at once."""
    payload = [http_request("/v1/attribute", *multipart(drawn_images(1)[0], "{}"))]
    return await _many(ask(target, payload) for _ in range(600))


def run(name: str, target: Target) -> Outcomes:
    """One attack, in a process of its own, which gives way to the server's."""
    os.nice(10)
    (attack,) = (attack for attack in ATTACKS if attack.__name__ == name)

    async def started() -> Outcomes:
        return await attack(target)

    return asyncio.run(started())


ATTACKS: tuple[Attack, ...] = (
    odd_charsets,
    hard_json,
    hard_multipart,
    held_uploads,
    unread_refusals,
    huge_headers,
    slow_heads,
    idle_connections,
    junk,
    unread_answers,
    image_segments,
    image_bombs,
    large_answers,
    many_prompts,
    reloads,
    overload,
)
