"""From the bytes of a request to the pixels of the graph. What is not an image is refused before any work is done.

The pixels equal open_clip's evaluation transform, number by number, for RGB and grey images. Palettes, alpha, CMYK
and 16 bits become RGB *before* resizing (open_clip resizes first, which blends palette indices).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from vitrine.models.errors import DAMAGED_IMAGE_ERRORS
from vitrine.service.engine.image_structure import CountedFile, check_exif, check_opened
from vitrine.service.errors import ServiceError

if TYPE_CHECKING:  # pydantic: a decoder process starts in half the time without it
    from vitrine.models.bundle.manifest import Preprocessing

# First bytes of the supported formats. If such a file cannot be opened it is damaged; any other file is unsupported.
SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
}
# Most scans of a JPEG: each one covers the whole picture, so a small file could occupy a thread for minutes.
MAX_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")  # with a segment: not stuffing, padding or restart
_UPRIGHT = {  # EXIF orientation -> the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# Our own limits (settings) are checked against the header; Pillow's would raise while reading the header.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class ImageLimits:
    pixels: int
    side: int


class Framing(NamedTuple):
    """How an image is brought to the graph's size; a bundle's `Preprocessing` without its normalisation."""

    size: tuple[int, int]  # height, width
    resize_mode: str  # "shortest", then the middle is cut out; or "squash"
    interpolation: str


def framing(preprocessing: Preprocessing) -> Framing:
    return Framing(preprocessing.size, preprocessing.resize_mode, preprocessing.interpolation)


def decode(data: bytes, limits: ImageLimits) -> Image.Image:
    """The first frame of an image file as upright RGB.

    It has no time limit of its own: `decoders.Decoders` runs it in a process that can be ended.

    Raises `ServiceError`: unsupported_image (not JPEG, PNG, WebP, GIF or BMP), image_too_large (by its header, before
    decoding), image_too_costly (so many parts that it would take seconds), invalid_image (empty, damaged).
    """
    if not data:
        raise ServiceError("invalid_image", "the image is empty (0 bytes)")
    name = next((name for name, start in SIGNATURES.items() if start.match(data)), "")
    try:
        image = Image.open(CountedFile(data, name), formats=list(SIGNATURES))
    except DAMAGED_IMAGE_ERRORS as error:
        if name:
            raise ServiceError("invalid_image", f"the {name} image's header is damaged") from error
        formats = ", ".join(SIGNATURES)
        message = f"the {len(data):,} bytes are no image in a supported format ({formats})"
        raise ServiceError("unsupported_image", message) from error
    with image:
        _check_size(image.size, limits)
        check_opened(image)
        if name == "JPEG" and _jpeg_scans(data) > MAX_SCANS:
            raise ServiceError("invalid_image", f"the JPEG image has more than {MAX_SCANS} scans")
        try:
            return _to_rgb(image)
        except DAMAGED_IMAGE_ERRORS as error:
            raise ServiceError("invalid_image", f"the {image.format} image is damaged or incomplete") from error


def to_pixels(image: Image.Image, preprocessing: Preprocessing, limits: ImageLimits) -> NDArray[np.float32]:
    """RGB image to normalised pixels [3, H, W], as open_clip does.

    Raises `ServiceError` image_too_large for an image so elongated that resizing it would exceed the pixel limit.
    """
    return normalise(np.asarray(to_frame(image, framing(preprocessing), limits)), preprocessing)


def to_frame(image: Image.Image, how: Framing, limits: ImageLimits) -> Image.Image:
    """RGB image, resized and cut to the graph's height and width. Raises as `to_pixels` does."""
    height, width = how.size
    if how.resize_mode == "squash":
        target = (width, height)
    else:
        short, long = sorted(image.size)
        resized_long = int(height * long / short)
        if resized_long * height > limits.pixels:
            raise ServiceError(
                "image_too_large", f"an image of {image.width} x {image.height} is too elongated; crop it first"
            )
        target = (height, resized_long) if image.width <= image.height else (resized_long, height)
    if image.size != target:
        image = image.resize(target, FILTERS[how.interpolation])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalise(levels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Levels [H, W, 3] to normalised pixels [3, H, W]."""
    table = _normalised_levels(preprocessing.mean, preprocessing.std)
    return np.stack([table[channel][levels[:, :, channel]] for channel in range(3)])


@cache
def _normalised_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each level 0 to 255, by channel [3, 256]: a look-up is faster, with equal results."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return np.ascontiguousarray(((levels - np.array(mean, np.float32)) / np.array(std, np.float32)).T)


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ServiceError("invalid_image", f"the image has {width} x {height} pixels")
    if max(width, height) > limits.side or width * height > limits.pixels:
        raise ServiceError(
            "image_too_large",
            f"the image has {width:,} x {height:,} pixels; "
            f"allowed are {limits.side:,} a side and {limits.pixels:,} in all",
        )


def _jpeg_scans(data: bytes) -> int:
    """Number of scans in a JPEG's first picture, without those inside segments (a thumbnail) or after it (a film)."""
    scans, position = 0, 2
    while (marker := _JPEG_MARKER.search(data, position)) and marker[0] != b"\xff\xd9":  # end of image
        scans += marker[0] == b"\xff\xda"  # start of scan
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    if upright.mode.startswith("I"):  # 16 bits a channel: keep the upper 8
        levels = np.asarray(upright) >> 8
        upright = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; None (upright) if the EXIF block cannot be read, as the picture itself is intact."""
    check_exif(image)
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGED_IMAGE_ERRORS:
        return None
