"""The base class of Vitrine's errors, and the exceptions raised for damaged images."""

import struct
import zlib

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
)


class VitrineError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; the CLI prints only that."""
