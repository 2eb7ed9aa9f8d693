"""Why an image file is refused. The service answers with the same codes and sentences."""

from __future__ import annotations

import struct
import zlib
from typing import Literal

from vitrine.models.errors import VitrineError

# Raised by Pillow's decoders on damaged files.
DAMAGED_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,  # libavif and libheif
)
ImageCode = Literal["invalid_image", "unsupported_image", "image_too_large", "image_too_costly"]


class ImageError(VitrineError):  # no ValueError: Pillow raises these for damage, and catches some
    """An image that cannot be read. `code` is the kind of reason; `message` says what is wrong and what to do."""

    def __init__(self, code: ImageCode, message: str) -> None:
        super().__init__(code, message)  # both, so that it can be pickled: images are decoded in other processes
        self.code, self.message = code, message

    def __str__(self) -> str:
        return self.message


def too_costly(message: str) -> ImageError:
    return ImageError("image_too_costly", f"{message}; save it again, without its metadata")
