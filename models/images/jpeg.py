"""JPEG files taken apart: which segments decide, how many scans there are, whether a file without an end is whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image

from vitrine.models.images.errors import ImageError, too_costly
from vitrine.models.images.parts import MAX_EXIF_SEGMENTS, MAX_PARTS

# Most scans: each one covers the whole picture, so a small file could occupy a processor for minutes.
MAX_SCANS = 100
# Larger pictures are decoded at a half, a quarter or an eighth of their size, which is as small as a CLIP needs.
FULL_SIZE_PIXELS = 40_000_000
END = b"\xff\xd9"
_SCAN, _COMMENT, _PROGRESSIVE = 0xDA, 0xFE, 0xC2
_APPLICATION = range(0xE0, 0xF0)
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")  # with a segment: not stuffing, padding or restart
_COEFFICIENTS = 64  # of a block
# What may stand between the last pixel and the end without being seen. Where pixels are missing it becomes pixels,
# and one of these that are different from the others: they begin with different bits.
_BETWEEN = (b"\x00" * 512, b"\x55" * 512, b"\xaa" * 512, b"\xf1" * 512)


class _Segment(NamedTuple):
    marker: int
    start: int
    body: int  # where its content begins
    end: int


def _segments(data: bytes) -> Iterator[_Segment]:
    """The segments of a file's first picture, without those inside others (a thumbnail) or after it (a film)."""
    position = 2
    while (found := _MARKER.search(data, position)) and found[0] != END:
        end = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield _Segment(found[0][1], found.start(), found.end() + 2, end)
        position = end


class Essential(NamedTuple):
    data: bytes
    has_end: bool


def essential(data: bytes) -> Essential:
    """A JPEG file without the segments that decide nothing: comments, profiles, XMP, previews, other programs' own.

    They may be damaged; viewers do not mind, but Pillow does. Raises `ImageError`: invalid_image for more than
    `MAX_SCANS` scans, image_too_costly for very many parts.
    """
    header, pixels, position, scans, exif = [data[:2]], len(data), 2, 0, 0
    for number, segment in enumerate(_segments(data)):
        position = segment.end
        if number > MAX_PARTS:
            raise too_costly(f"the JPEG image has more than {MAX_PARTS:,} parts")
        if segment.marker == _SCAN:
            pixels = min(pixels, segment.start)
            scans += 1
            if scans > MAX_SCANS:
                raise ImageError("invalid_image", f"the JPEG image has more than {MAX_SCANS} scans")
        elif not scans and _decides(data, segment):
            header.append(data[segment.start : segment.end])
            exif += data.startswith(b"Exif\0\0", segment.body)
            if exif > MAX_EXIF_SEGMENTS:
                raise too_costly("the JPEG image has too many Exif segments")
    return Essential(b"".join([*header, data[pixels:]]), data.find(END, position) >= 0)


def _decides(data: bytes, segment: _Segment) -> bool:
    """Whether a segment says something about colours or orientation, and is long enough for it."""
    if segment.marker not in _APPLICATION:
        return segment.marker != _COMMENT
    size = segment.end - segment.body
    match segment.marker - _APPLICATION.start:
        case 0:
            return data.startswith(b"JFIF\0", segment.body) and size >= 14
        case 1:
            return data.startswith(b"Exif\0\0", segment.body)
        case 14:
            return data.startswith(b"Adobe", segment.body) and size >= 12
    return False


def reduction(pixels: int) -> int:
    """By what a picture's sides are divided while it is decoded: 1, 2, 4 or 8."""
    return next((scale for scale in (1, 2, 4) if pixels <= FULL_SIZE_PIXELS * scale**2), 8)


def load_without_end(data: bytes, load: Callable[[bytes], Image.Image]) -> Image.Image:
    """The picture of a JPEG file that has no end marker, if no pixel is missing.

    What comes after the last pixel decides nothing. So the picture is decoded with different bytes there (`_BETWEEN`).

    load: decodes a file. Raises what it raises, and `ImageError` invalid_image.
    """
    content = data.rstrip(b"\0")  # a copy that broke off, in a file made as long as it should be
    if content.endswith(b"\xff"):
        content = content[:-1] if len(content) == len(data) else content + b"\0"  # half an end; or a pixel's byte
    image = load(content + END)
    pixels = image.tobytes()
    if _is_missing_scans(data) or any(load(content + other + END).tobytes() != pixels for other in _BETWEEN):
        raise ImageError("invalid_image", "the JPEG image is cut short: pixels are missing; fetch or save it again")
    return image


def _is_missing_scans(data: bytes) -> bool:
    """Whether a progressive JPEG's scans do not bring all of the picture: it was cut between two of them."""
    left: dict[tuple[int, int], int] = {}  # component, coefficient -> bits still to come
    for marker, _, body, end in _segments(data):
        content = data[body:end]
        if marker == _PROGRESSIVE:
            components = content[6::3]
            left = {(component, at): 16 for component in components for at in range(_COEFFICIENTS)}
        elif marker == _SCAN and left and content:
            count = content[0]
            first, last, bits = content[1 + 2 * count : 4 + 2 * count]
            for component in content[1 : 1 + 2 * count : 2]:
                left |= {(component, at): bits & 15 for at in range(first, last + 1)}
    return any(left.values())
