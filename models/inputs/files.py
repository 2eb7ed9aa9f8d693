"""One regular file, read without ever waiting for it; names of files as valid text."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

from vitrine.models.files import reading
from vitrine.models.inputs.errors import Unreadable
from vitrine.models.inputs.names import HEAD

LARGEST = 512 * 2**20  # bytes of an image's file; what is larger is none


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, unbuffered. Raises `Unreadable` for anything else, OSError if it cannot be opened."""
    try:
        return reading.open_regular(path, buffering=0)
    except reading.NotRegular as error:
        raise Unreadable(errno.EINVAL, str(error)) from error


def read_file(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """The bytes of a regular file. Raises OSError, `Unreadable` if it is no regular file or has more than `largest`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise too_large(size, largest)
        pieces = [file.read(size + 1)]
        while pieces[-1]:  # it grew, or is one of those that say 0
            if sum(map(len, pieces)) > largest:
                raise too_large(sum(map(len, pieces)), largest)
            pieces.append(file.read(2**20))
    return b"".join(pieces)


def read_head(path: str | os.PathLike[str], size: int = HEAD) -> bytes:
    """The first bytes of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return file.read(size)


def too_large(size: int, largest: int = LARGEST) -> Unreadable:
    """The error of a file, member or row of so many bytes."""
    return Unreadable(errno.EFBIG, f"it has {size:,} bytes, but an image may have at most {largest:,}")


def reason(error: OSError) -> str:
    """What an OSError says, without its number and its path."""
    return error.strerror or str(error) or type(error).__name__


def common_names(paths: list[Path]) -> list[str]:
    """The names of files, with as much of their folders as tells them apart."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names) and len(set(paths)) == len(paths):
        root = Path(os.path.commonpath(paths))
        names = [path.relative_to(root).as_posix() for path in paths]
    return names
