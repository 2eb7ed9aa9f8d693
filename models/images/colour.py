"""Every mode that an image file may have, as RGB of 8 bits a channel.

Numbers of 16 bits keep their upper 8, as a channel of colour does. What is transparent lies on white, as on paper: the
colour that a file holds under it was never meant to be seen. Numbers of 32 bits (elevation, temperature) have no white,
so they are no picture until somebody says what is white. Colour profiles are not applied, as no CLIP was trained so.
"""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageChops

from vitrine.models.images.errors import ImageError

BACKGROUND = (255, 255, 255)
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_READ = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB")


def to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """(a loaded image as RGB, whether any of it was transparent).

    Raises `ImageError` unsupported_image for numbers that are no colours.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM"):
        image, mask = _upper_bits(image)
    elif image.mode not in _READ:
        kind = {"I": "whole numbers of 32 bits", "F": "fractions"}.get(image.mode, f"{image.mode} colours")
        message = (
            f"the {image.format} image has {kind}, which are not supported; save it as RGB or grey, with 8 or "
            f"16 bits per channel"
        )
        raise ImageError("unsupported_image", message)
    elif image.has_transparency_data:
        image = _with_alpha(image)
        mask = image.getchannel("A")
    else:
        mask = None
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if mask is None or mask.getextrema()[0] == 255:
        return rgb, False
    rgb.paste(BACKGROUND, mask=ImageChops.invert(mask))
    return rgb, True


def _with_alpha(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # of 16 bits; the image has their upper 8
        image = image.copy()
        image.info["transparency"] = tuple(level >> 8 for level in key)
    return image.convert("RGBA")


def _upper_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """(grey of 16 bits as grey of 8, what is not transparent of it)."""
    levels = np.asarray(image).astype(np.int32)
    mask = None
    if isinstance(key := image.info.get("transparency"), int):
        mask = Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
    tags = getattr(image, "tag_v2", None)  # of a TIFF
    if tags is not None:
        bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
        levels <<= 16 - bits
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white
            levels = 0xFFFF - levels
    return Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8)), mask
