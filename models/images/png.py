"""A PNG without the chunks that decide nothing about the picture: texts, profiles, times, an animation's later frames.

Such a chunk may be damaged, or unpack to megabytes; viewers then leave it out, Pillow refuses the file.
"""

from __future__ import annotations

import struct
import zlib

from vitrine.models.images.errors import too_costly
from vitrine.models.images.parts import MAX_EXIF_BYTES, MAX_PARTS

START = 8  # bytes before the first chunk
_HEADER = struct.Struct(">I4s")  # length of the body, name
_TEXTS = (b"tEXt", b"zTXt")
_RAW_EXIF = b"Raw profile type exif\0"  # the orientation, as ImageMagick writes it


def essential(data: bytes) -> bytes:
    """A PNG file with what decides about its pixels and its orientation alone. Raises `ImageError` image_too_costly."""
    view, kept = memoryview(data), [memoryview(data)[:START]]
    position, parts = START, 0
    while position + _HEADER.size <= len(data):
        length, name = _HEADER.unpack_from(data, position)
        end = position + _HEADER.size + length + 4
        parts += 1
        if parts > MAX_PARTS:
            raise too_costly(f"the PNG image has more than {MAX_PARTS:,} parts")
        whole = end <= len(data)
        if not name[0] & 0x20 or (whole and _decides(name, view[position:end])):  # a capital letter: critical
            kept.append(view[position:end])
        if name == b"IEND":
            break
        position = end
    return b"".join(kept)


def _decides(name: bytes, chunk: memoryview) -> bool:
    """Whether a chunk that need not be there says something about transparency or orientation, and is undamaged."""
    body = bytes(chunk[_HEADER.size : -4])
    if name not in (b"tRNS", b"eXIf") and not (name in _TEXTS and body.startswith(_RAW_EXIF)):
        return False
    if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    return name != b"zTXt" or _unpacks(body[len(_RAW_EXIF) + 1 :])


def _unpacks(packed: bytes) -> bool:
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, MAX_EXIF_BYTES - 1)
    except zlib.error:
        return False
    return unpacking.eof
