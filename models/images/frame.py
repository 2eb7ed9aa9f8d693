"""From an RGB picture to what a CLIP takes: resized, cut and normalised, number by number as open_clip does."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.models.images.decode import ImageLimits
from vitrine.models.images.errors import ImageError

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Framing(NamedTuple):
    """How a picture is brought to the graph's size: `Preprocessing` without its normalisation."""

    size: tuple[int, int]  # height, width
    resize_mode: str  # "shortest", then the middle is cut out; or "squash"
    interpolation: str


class Preprocessing(Protocol):
    """What a bundle's manifest says of it."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def resize_mode(self) -> str: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def framing(preprocessing: Preprocessing) -> Framing:
    return Framing(preprocessing.size, preprocessing.resize_mode, preprocessing.interpolation)


def to_pixels(image: Image.Image, preprocessing: Preprocessing, limits: ImageLimits) -> NDArray[np.float32]:
    """RGB image to normalised pixels [3, H, W].

    Raises `ImageError` image_too_large for an image so elongated that resizing it would exceed the pixel limit.
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
            raise ImageError(
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
    pixels = np.empty((3, *levels.shape[:2]), np.float32)
    for channel in range(3):  # `clip`, as nothing can be out of range: otherwise numpy makes a copy first
        np.take(table[channel], levels[:, :, channel], out=pixels[channel], mode="clip")
    return pixels


@cache
def _normalised_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each level 0 to 255, by channel [3, 256]: a look-up is faster, with equal results."""
    levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return np.ascontiguousarray(((levels - np.array(mean, np.float32)) / np.array(std, np.float32)).T)
