"""Which formats are read, and how they are told: by their first bytes, never by a file's name."""

from __future__ import annotations

import re
from functools import cache

from PIL import AvifImagePlugin, Image

from vitrine.models.images.errors import ImageError

# First bytes, by Pillow's name of the format. A file that begins so and cannot be opened is damaged; any other is of
# no format that is read.
SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"),
    "PPM": re.compile(rb"P[1-6]\s"),  # and PBM, PGM
    "AVIF": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "HEIF": re.compile(rb"....ftyp(?:he[ivx][cmsx]|mif1|msf1)", re.DOTALL),
}
FORMATS = ", ".join(SIGNATURES)
_GENERAL = (b"mif1", b"msf1")  # brands of both AVIF and HEIF; the compatible ones tell which
_AVIF_BRANDS = re.compile(rb"(?:....)*?avi[fs]", re.DOTALL)

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # several images are decoded at once; none gets all processors


def format_of(data: bytes) -> str | None:
    """The format of an image file by its first bytes, as Pillow names it; None if it is none of `SIGNATURES`."""
    name = next((name for name, start in SIGNATURES.items() if start.match(data)), None)
    if name == "HEIF" and data[8:12] in _GENERAL:
        brands = data[16 : min(int.from_bytes(data[:4], "big"), 256)]
        return "AVIF" if _AVIF_BRANDS.match(brands) else "HEIF"
    return name


def prepare(format: str) -> None:
    """Make Pillow able to open a format. Raises `ImageError` unsupported_image if a package is missing for it."""
    if format == "HEIF":
        _prepare_heif()


@cache
def _prepare_heif() -> None:
    try:
        import pi_heif
    except ModuleNotFoundError as error:
        message = "HEIC images need the package pi-heif: pip install 'vitrine[heic]'; or send it as JPEG"
        raise ImageError("unsupported_image", message) from error
    pi_heif.options.DECODE_THREADS = 1
    pi_heif.register_heif_opener(thumbnails=False)
    assert "HEIF" in Image.OPEN
