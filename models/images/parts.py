"""How many parts an image file may have: segments, chunks, blocks, strips, runs. Each limit is far above what cameras
and programs write, and keeps a file of 16 MiB within about a second.

Pillow reads the parts of a file in Python, one by one, and some take it long. So they are counted where Pillow reads
them, by the file that it reads from. A count of our own beforehand would have to take every file apart just as Pillow
does, junk included, or miss what is hidden from it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

from PIL import Image

from vitrine.models.images.errors import too_costly

# Reads of a file, by format: 2 to 4 for each segment, chunk, block or run, one for 64 KiB of pixels. Photos have some
# hundreds, as a film some thousands, bitmaps in runs two for each run.
MAX_READS: Mapping[str, int] = {
    "JPEG": 200_000,
    "PNG": 200_000,
    "GIF": 500_000,
    "BMP": 1_500_000,
    "TIFF": 200_000,
    "PPM": 50_000_000,  # each pixel is read for itself, unless its white is 255 or 65,535
}
FEW_READS = 1_000  # of the others, which are read as a whole
MAX_PARTS = 100_000  # segments of a JPEG, chunks of a PNG
MAX_EXIF_SEGMENTS = 16  # of a JPEG, 64 KiB each; the standard has one
MAX_EXIF_BYTES = 2**20  # read number by number for the orientation
MAX_TABLE_BYTES = 2**18  # of a JPEG's frame headers and quantization tables, taken apart byte by byte; real: 1 KiB
MAX_RUN_LENGTH_PIXELS = 8_000_000  # of a BMP in runs, which Pillow unpacks in Python

_TABLES = frozenset(bytes([marker]) for marker in (*range(0xC0, 0xD0), 0xDB))
_RAW_EXIF = "Raw profile type exif"  # a PNG's Exif as hexadecimal text, as ImageMagick writes it


class CountedFile(io.BytesIO):
    """An image file in memory that refuses to be read in too many parts: raises `ImageError` image_too_costly."""

    def __init__(self, data: bytes, format: str) -> None:
        super().__init__(data)
        self._format, self._marker = format, b""
        self._reads_left, self._tables_left = MAX_READS.get(format, FEW_READS), MAX_TABLE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        self._reads_left -= 1
        if self._reads_left < 0:
            raise too_costly(f"the {self._format} image has too many parts")
        if size == 1:
            self._marker = part  # of a JPEG's segment; its length and its body are the next reads
        elif self._format == "JPEG" and self._marker in _TABLES:
            self._tables_left -= len(part)
            if self._tables_left < 0:
                raise too_costly("the JPEG image has tables that are too large")
        return part


def check_opened(image: Image.Image) -> None:
    """Check what Pillow knows once it has read an image's header. Raises `ImageError` image_too_costly."""
    pixels = image.width * image.height
    if pixels > MAX_RUN_LENGTH_PIXELS and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ())):
        message = (
            f"the BMP image is run-length encoded and has {pixels:,} pixels; at most {MAX_RUN_LENGTH_PIXELS:,} "
            f"are allowed"
        )
        raise too_costly(message)


def check_exif(image: Image.Image) -> None:
    """Check the size of an image's Exif block before it is read. Raises `ImageError` image_too_costly."""
    size = len(image.info.get("exif") or b"") or len(image.info.get(_RAW_EXIF) or "") // 2
    if size > MAX_EXIF_BYTES:
        raise too_costly(f"the {image.format} image has {size:,} bytes of Exif; at most {MAX_EXIF_BYTES:,} are allowed")
