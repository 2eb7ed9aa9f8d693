"""What all of Vitrine's own errors share, and what damaged images raise."""

import struct
import zlib

# What Pillow's decoders raise on damaged files.
DAMAGED_IMAGE = (
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
    """Something that the user can mend; the message says what is wrong and what to do. The command prints it bare."""
