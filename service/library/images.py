"""What may be given as an image in Python, as the bytes of an image file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrine.models.errors import VitrineError
from vitrine.models.files.names import display
from vitrine.models.files.reading import NotRegular, open_regular
from vitrine.models.images.decode import Note, from_pillow

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
"""A path, the bytes of an image file, a Pillow image, or its pixels [H, W, 3], uint8, red first."""

_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)  # of the above
KINDS = "a path, the bytes of an image file, a PIL image or a numpy array [H, W, 3] of uint8"


class NoImageError(VitrineError, TypeError):
    """The argument cannot be read as an image without guessing; the message says what to give."""


class Given(NamedTuple):
    """An image file, and what was done to the picture before it became one."""

    content: bytes
    notes: tuple[Note, ...] = ()


def is_one(images: object) -> bool:
    """Whether this is one image, and not several. Raises `NoImageError` for what is neither."""
    if isinstance(images, _TYPES):
        return True
    if not isinstance(images, Iterable):
        raise NoImageError(f"{_kind(images)} is not an image; give {KINDS}, or a list of these")
    if hasattr(images, "__array__") and getattr(images, "ndim", 2) > 1:  # not a column of paths in a table
        _refuse_array_like(images)
    return False


def read(image: object) -> Given:
    """Raises `NoImageError`, `OSError` for a file that cannot be read, `ImageError` for a damaged picture of Pillow's.

    Bytes and files are decoded later, where the service decodes them.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return Given(bytes(image))
    if isinstance(image, str) and image.partition("://")[0].lower() in ("http", "https", "s3", "gs", "data"):
        raise NoImageError("the image is a URL, and URLs are not fetched; download it and give the bytes")
    if isinstance(image, str | os.PathLike):
        try:
            with open_regular(image) as file:
                return Given(file.read())
        except NotRegular as error:
            raise NoImageError(f"{display(image)}: {error}") from error
    if isinstance(image, Image.Image):
        picture = from_pillow(image)
        return Given(_file(np.asarray(picture.image)), picture.notes)
    if isinstance(image, np.ndarray):
        _check(image)
        return Given(_file(image))
    if hasattr(image, "__array__"):
        _refuse_array_like(image)
    raise NoImageError(f"{_kind(image)} is not an image; give {KINDS}")


def _file(levels: NDArray[np.uint8]) -> bytes:
    """Levels [H, W, 3] as a PPM, which is their bytes behind a short header: nothing is lost, and it takes no time."""
    height, width = levels.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + levels.tobytes()


def _check(array: NDArray[np.generic]) -> None:
    """Raise `NoImageError` unless there is one way to read the array."""
    shape = "×".join(map(str, array.shape))
    if array.dtype != np.uint8:
        hint = "multiply numbers from 0 to 1 by 255, round them and use .astype(numpy.uint8)"
        raise NoImageError(f"an array of {array.dtype} has no known range of values; give uint8, 0 to 255: {hint}")
    if array.ndim == 4:
        raise NoImageError(f"an array {shape} holds several images; give list(array)")
    if array.ndim == 2:
        raise NoImageError(f"an array {shape} has no colours; give PIL.Image.fromarray(array), which is read as grey")
    if array.ndim != 3:
        raise NoImageError(f"an array {shape} is not an image; give one [H, W, 3]")
    if array.shape[2] == 4:
        raise NoImageError(
            f"an array {shape} may be transparent; give PIL.Image.fromarray(array), which is put on white, or "
            "array[..., :3]"
        )
    if array.shape[2] != 3 and array.shape[0] == 3:
        raise NoImageError(f"an array {shape} has its colours first; give array.transpose(1, 2, 0)")
    if array.shape[2] != 3 or not array.size:
        raise NoImageError(f"an array {shape} is not an image; give one [H, W, 3]")


def _refuse_array_like(image: object) -> None:
    raise NoImageError(
        f"{_kind(image)} may have been scaled or normalised; give the original image, or a numpy array [H, W, 3] of "
        "uint8"
    )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
