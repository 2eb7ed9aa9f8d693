"""From the bytes of an image file to an upright RGB picture: the one way, for training, cards, bulk and the service.

How it differs from open_clip's own reading (`Image.open(file).convert("RGB")`), and why:

| input | open_clip | here |
|---|---|---|
| EXIF orientation | ignored | applied, as every viewer does |
| transparent parts | the colour hidden under them | white (`colour.BACKGROUND`) |
| grey of 16 bits | white wherever it is above 255 | the upper 8 bits |
| TIFF of 12 bits, or with 0 as white | dark; a negative | as a viewer shows it |
| 32 bits, floating point | cut off at 255 | refused: nothing says what is white |
| palettes | indices blended, where it resizes first | colours blended |
| damaged or huge texts, profiles, previews | an error | left out: they decide nothing about pixels |
| a JPEG without its end marker | an error | decoded if no pixel is missing |
| a JPEG over 40 million pixels | in full, or refused as a bomb | at a half, a quarter or an eighth of its sides |
| animations, several pages | the first | the first (a PNG's still picture) |
| colour profiles, gamma | ignored | ignored: what CLIPs were trained with |
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from PIL import ExifTags, Image

from vitrine.models.images import jpeg, png
from vitrine.models.images.colour import to_rgb
from vitrine.models.images.errors import DAMAGED_IMAGE_ERRORS, ImageError
from vitrine.models.images.formats import FORMATS, format_of, prepare
from vitrine.models.images.parts import CountedFile, check_exif, check_opened

_UPRIGHT = {  # EXIF orientation -> the transpose that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSPARENT = "image_transparent"
REDUCED = "image_reduced"
WITHOUT_END = "image_without_end"

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of odd metadata, once for each tag
# Our own limits are checked against the header; Pillow's would raise while reading the header.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class ImageLimits:
    """Largest images that are decoded. The pixels do not depend on them: within its limits each gives the same."""

    pixels: int = 40_000_000
    side: int = 16_384
    jpeg_pixels: int = 0  # of a JPEG, which is decoded at a reduced size, if that is more; 0: as the others


# Where nobody sends files from outside: Pillow's own limit against bombs.
TRUSTED = ImageLimits(pixels=178_956_970, side=65_535, jpeg_pixels=1_000_000_000)


class Note(NamedTuple):
    """What was done to an image that its sender may not expect."""

    code: str
    message: str


_MADE_WHITE = Note(TRANSPARENT, "The image has transparent parts; they were treated as white.")


class Picture(NamedTuple):
    """An upright RGB image, and what to know about it."""

    image: Image.Image
    notes: tuple[Note, ...] = ()


def decode(data: bytes, limits: ImageLimits) -> Picture:
    """The first frame of an image file.

    It has no time limit of its own: the service runs it in a process that can be ended.

    Raises `ImageError`: unsupported_image (none of `FORMATS`), image_too_large (by its header, before decoding),
    image_too_costly (so many parts that it would take seconds), invalid_image (empty, damaged).
    """
    if not data:
        raise ImageError("invalid_image", "the image is empty (0 bytes)")
    format = format_of(data)
    if format is None:
        raise ImageError("unsupported_image", f"this is not an image in a supported format ({FORMATS})")
    prepare(format)
    has_end = True
    if format == "JPEG":
        data, has_end = jpeg.essential(data)
    elif format == "PNG":
        data = png.essential(data)
    try:
        with _open(data, format) as image:
            size = image.size
            _check_size(size, format, limits)
            check_opened(image)
            scale = jpeg.reduction(size[0] * size[1]) if format == "JPEG" else 1
            if has_end:
                _load(image, scale)
                rgb, was_transparent = to_rgb(_upright(image))
            else:
                whole = jpeg.load_without_end(data, partial(_load_again, scale=scale))
                rgb, was_transparent = to_rgb(_upright(whole))
    except DAMAGED_IMAGE_ERRORS as error:
        raise ImageError("invalid_image", f"the {format} image is damaged or incomplete") from error
    notes = []
    if not has_end:
        notes.append(Note(WITHOUT_END, "The JPEG image has no end marker, but all of its pixels are present."))
    if scale > 1:
        half = {2: "half", 4: "a quarter", 8: "an eighth"}[scale]
        notes.append(
            Note(
                REDUCED,
                f"The JPEG image has {size[0] * size[1]:,} pixels; it was read at {half} of its width and height.",
            )
        )
    if was_transparent:
        notes.append(_MADE_WHITE)
    return Picture(rgb, tuple(notes))


def from_pillow(image: Image.Image) -> Picture:
    """The same of an image that somebody else has opened (a data set of torchvision's). Raises `ImageError`."""
    try:
        image.load()
        rgb, was_transparent = to_rgb(_upright(image))
    except DAMAGED_IMAGE_ERRORS as error:
        raise ImageError("invalid_image", f"the image is damaged or incomplete: {error}") from error
    return Picture(rgb, (_MADE_WHITE,) if was_transparent else ())


def _open(data: bytes, format: str) -> Image.Image:
    try:
        return Image.open(CountedFile(data, format), formats=[format])
    except DAMAGED_IMAGE_ERRORS as error:
        raise ImageError("invalid_image", f"the {format} image's header is damaged") from error


def _load(image: Image.Image, scale: int) -> None:
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()


def _load_again(data: bytes, scale: int) -> Image.Image:
    image = _open(data, "JPEG")
    _load(image, scale)
    return image


def _check_size(size: tuple[int, int], format: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError("invalid_image", f"the image has {width} x {height} pixels")
    pixels = limits.pixels
    if format == "JPEG" and limits.pixels >= jpeg.FULL_SIZE_PIXELS:
        pixels = max(pixels, limits.jpeg_pixels)
    if max(width, height) > limits.side or width * height > pixels:
        raise ImageError(
            "image_too_large",
            f"the image has {width:,} x {height:,} pixels; at most {limits.side:,} per side and {pixels:,} in total "
            f"are allowed; make it smaller first",
        )


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.format = image.format  # which tells what its numbers mean
    return turned


def _orientation(image: Image.Image) -> Any:
    """The EXIF orientation; None (upright) if the EXIF block cannot be read, as the picture itself is intact."""
    check_exif(image)
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGED_IMAGE_ERRORS:
        return None
