"""The files of a bundle as they were when they were verified: each is known by its identity, not by its path alone.

Between verification and use, a path may come to name another file: a symbolic link that moves, a directory that is
renamed, a file that is replaced. So the identity is taken from the very descriptor whose bytes were hashed, and
whatever is opened later is compared with it.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitrine.models.errors import VitrineError
from vitrine.models.files.reading import open_regular

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_CHUNK = 2**22  # values checked at once


class BundleError(VitrineError, ValueError):
    """A directory is not a bundle that this version can serve; the message says which file and why."""


@dataclass(frozen=True)
class Identity:
    """What tells a file from another at the same path, and from itself after it was written to."""

    device: int
    inode: int
    size: int  # bytes
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def sha256_and_identity(file: Path) -> tuple[str, Identity]:
    """SHA-256 of a file's contents, in hexadecimal, and the identity of what was read. Raises `OSError`."""
    with open_regular(file) as stream:
        identity = Identity.of(os.fstat(stream.fileno()))
        digest = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # `BinaryIO` has no readinto
        return digest.hexdigest(), identity


def map_table(stream: BinaryIO, shape: tuple[int, ...]) -> NDArray[np.floating]:
    """The .npy file in `stream`, memory-mapped; the mapping outlives `stream`. (`np.load` maps by path alone.)

    Raises `ValueError` unless it holds finite floats of this shape.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the .npy format is not supported")
    found, by_column, dtype = _HEADERS[version](stream)
    if found != shape or not np.issubdtype(dtype, np.floating):
        raise ValueError(f"it is {dtype} {found}, but the manifest says {shape}")
    table = np.memmap(stream, dtype, "r", stream.tell(), shape, "F" if by_column else "C")
    if not is_finite(table):
        raise ValueError("it has values that are not finite")
    return table


def is_finite(table: NDArray[np.floating]) -> bool:
    """Whether no value is NaN or infinite; in pieces, so that a large table needs no mask of its own size."""
    values = table.reshape(-1, order="A")
    return all(_is_finite(values[start : start + _CHUNK]) for start in range(0, values.size, _CHUNK))


def _is_finite(values: NDArray[np.floating]) -> bool:
    if values.dtype == np.float16:  # by its bits: nine times as fast as np.isfinite
        return bool((values.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(values).all())
