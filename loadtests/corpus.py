"""Input of the load tests: valid and damaged image files, and the bytes of requests."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pillow_heif
import typer
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what most people send
ALL_FORMATS = (*FORMATS, "TIFF", "PPM", "AVIF", "HEIF")


def drawn_images(count: int, side: int = 96, formats: Sequence[str] = FORMATS) -> list[bytes]:
    """Image files in several formats, with structure in them."""
    generator, files = np.random.default_rng(0), []
    for number in range(count):
        levels = generator.integers(0, 100, (side, side + number % 40, 3))
        levels += np.linspace(0, 155, levels.shape[1]).astype(int)[None, :, None]
        buffer = io.BytesIO()
        image, format = Image.fromarray(levels.astype(np.uint8)), formats[number % len(formats)]
        if format == "HEIF":
            pillow_heif.from_pillow(image).save(buffer)
        else:
            image.save(buffer, format)
        files.append(buffer.getvalue())
    return files


def image_files(corpus: Path | None, formats: Sequence[str] = FORMATS) -> list[bytes]:
    """Every file of a folder; drawn images in these formats if there is no folder."""
    if corpus is None:
        return drawn_images(45, formats=formats)
    files = [path.read_bytes() for path in sorted(corpus.rglob("*")) if path.is_file()]
    if not files:
        raise typer.BadParameter(f"no files under {corpus}")
    return files


def mutated_files(files: list[bytes], seed: int) -> Iterator[bytes]:
    """Endless: a file with bytes changed, cut out, doubled, moved, or replaced with another file's."""
    chance = random.Random(seed)  # noqa: S311
    while True:
        data = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 1, 2, 4, 16, 64))):
            at, length = chance.randrange(len(data)), chance.choice((1, 2, 4, 64, 1024))
            match chance.randrange(6):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length]
                case 4:
                    other = chance.choice(files)
                    data[at : at + length] = other[at : at + length]
                case 5:
                    del data[at:]
            data = data or bytearray(b"\0")
        yield bytes(data)


def multipart(image: bytes, request: str) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a request; `request`: its JSON part."""
    parts = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n' + image,
        b'\r\n--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n' + request.encode(),
        b"\r\n--x--\r\n",
    )
    return b"".join(parts), {"content-type": "multipart/form-data; boundary=x"}


def http_request(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A complete POST request, for a bare connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: h", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body
