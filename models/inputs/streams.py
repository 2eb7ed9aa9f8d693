"""The bytes of a tar in one direction: of the file itself, where going forward costs nothing, or decompressed.

What a file is compressed with is told by its first bytes, not by its name.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from vitrine.models.inputs.files import open_regular, reason

PIECE = 2**20  # bytes that are decompressed at a time
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
# What is refused by name: first bytes -> (name, what to do).
REFUSED = {
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Decompress it: `zstd -d`"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "Decompress it: `lz4 -d`"),
    b"\x1f\x9d": ("compressed by compress", "Decompress it: `uncompress`"),
    b"PK\x03\x04": ("a zip archive", "Unpack it into a folder"),
    b"PK\x05\x06": ("a zip archive", "Unpack it into a folder"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it into a folder"),
    b"Rar!\x1a\x07": ("a rar archive", "Unpack it into a folder"),
}
XZ_MEMORY = 512 * 2**20  # bytes that a file may ask for; `xz -9` asks for 65 MiB


class ShardError(Exception):
    """A tar that is damaged, or none; the message says what is wrong and at which byte, without the tar's name.

    remedy: what to do.
    """

    def __init__(self, message: str, remedy: str = "Write or download it again") -> None:
        super().__init__(message)
        self.remedy = remedy


def open_stream(shard: Path) -> Stream:
    """The bytes of a tar. Raises `ShardError`."""
    try:
        file = open_regular(shard)
        head = file.read(8)
        file.seek(0)
    except OSError as error:
        raise ShardError(reason(error)) from error
    for start, (what, remedy) in REFUSED.items():
        if head.startswith(start):
            file.close()
            raise ShardError(f"it is {what}, which is not supported", remedy)
    return Stream(file, next((name for start, name in COMPRESSIONS.items() if head.startswith(start)), ""))


class Stream:
    """Bytes in one direction.

    compressed: whether they are decompressed; else their positions are those in the file.
    """

    def __init__(self, file: BinaryIO, compression: str) -> None:
        self._file, self._name, self.compressed, self.position = file, compression, bool(compression), 0
        self._size = os.fstat(file.fileno()).st_size
        self._reader: _Reader = file
        self._errors: tuple[type[Exception], ...] = (OSError, ValueError, MemoryError, zlib.error)
        if compression == "gzip":
            self._reader = gzip.GzipFile(fileobj=file)
        elif compression == "bzip2":  # imported here: a Python may have been built without them
            import bz2

            self._reader = _Streams(file, bz2.BZ2Decompressor)
        elif compression == "xz":
            import lzma

            self._reader = _Streams(file, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=XZ_MEMORY))
            self._errors += (lzma.LZMAError,)

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end. Raises `ShardError`."""
        pieces = []
        while size > 0 and (piece := self._piece(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def forward(self, position: int) -> int:
        """Go on to this position, or to the end if that comes first; returns the position. Raises `ShardError`."""
        if not self.compressed:
            self.position = self._file.seek(min(position, self._size))
        while self.position < position and self._piece(position - self.position):
            pass
        return self.position

    def close(self) -> None:
        self._file.close()

    def _piece(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end."""
        try:
            piece = self._reader.read(min(size, PIECE))
        except EOFError as error:
            raise ShardError(f"it is cut short: its {self._name} stream has no end") from error
        except self._errors as error:
            if self.compressed:
                raise ShardError(f"it is damaged: its {self._name} stream cannot be decompressed ({error})") from error
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise ShardError(f"it cannot be read at byte {self.position:,}: {why}") from error
        self.position += len(piece)
        return piece


class _Streams:
    """What was compressed by bzip2 or xz, in any number of streams one after the other, and zeros that fill up the end.

    Not by BZ2File and LZMAFile: these take a later stream that is damaged for the end, and xz may ask for any memory.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], _Decompressor]) -> None:
        self._file, self._new, self._inner = file, new, new()

    def read(self, size: int) -> bytes:
        piece = b""
        while not piece:
            data = b""
            if self._inner.eof:
                data = self._inner.unused_data.lstrip(b"\0")
                while not data:
                    if not (more := self._file.read(PIECE)):
                        return b""
                    data = more.lstrip(b"\0")
                self._inner = self._new()
            elif self._inner.needs_input and not (data := self._file.read(PIECE)):
                raise EOFError
            piece = self._inner.decompress(data, size)
        return piece


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, size: int, /) -> bytes: ...
