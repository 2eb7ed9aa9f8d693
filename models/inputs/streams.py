"""The bytes of a tar in one direction: of the file itself, where going forward costs nothing, or decompressed.

What a file is compressed with is told by its first bytes, not by its name.
"""

from __future__ import annotations

import os
import zlib
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

    def __init__(self, message: str, remedy: str = "Make or fetch it again") -> None:
        super().__init__(message)
        self.remedy = remedy


class Stream(Protocol):
    """Bytes in one direction."""

    compressed: bool
    position: int

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end. Raises `ShardError`."""

    def forward(self, position: int) -> int:
        """Go on to this position, or to the end if that comes first; returns the position. Raises `ShardError`."""

    def close(self) -> None: ...


def open_stream(shard: Path) -> Stream:
    """The bytes of a tar. Raises `ShardError`."""
    try:
        file = open_regular(shard)
        head = file.read(8)
        file.seek(0)
    except OSError as error:
        raise ShardError(reason(error)) from error
    for start, name in COMPRESSIONS.items():
        if head.startswith(start):
            return Decompressed(file, name)
    for start, (what, remedy) in REFUSED.items():
        if head.startswith(start):
            file.close()
            raise ShardError(f"it is {what}, which is not read", remedy)
    return Plain(file)


class Plain:
    """A file that is not compressed."""

    compressed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._descriptor, self.position = file, file.fileno(), 0
        self.size = os.fstat(self._descriptor).st_size

    def read(self, size: int) -> bytes:
        size = min(size, max(0, self.size - self.position))  # whatever a header says
        try:
            data = os.pread(self._descriptor, size, self.position)
            while 0 < len(data) < size:  # at the end, or in pieces, from a network
                more = os.pread(self._descriptor, size - len(data), self.position + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise ShardError(f"it cannot be read at byte {self.position:,}: {reason(error)}") from error
        self.position += len(data)
        return data

    def forward(self, position: int) -> int:
        self.position = min(position, self.size)
        return self.position

    def close(self) -> None:
        self._file.close()


class Decompressed:
    """A file compressed by gzip, bzip2 or xz, in any number of streams one after the other."""

    compressed = True

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name, self.position = file, name, 0
        self._decompressor = _decompressor(name)
        self._rest = b""  # compressed, not given to the decompressor yet
        self._ended = False

    def read(self, size: int) -> bytes:
        pieces = []
        while size > 0 and (piece := self._next(min(size, PIECE))):
            pieces.append(piece)
            size -= len(piece)
            self.position += len(piece)
        return b"".join(pieces)

    def forward(self, position: int) -> int:
        while self.position < position and (piece := self._next(min(position - self.position, PIECE))):
            self.position += len(piece)
        return self.position

    def close(self) -> None:
        self._file.close()

    def _next(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end."""
        piece = b""
        try:
            while not piece and not self._ended:
                if self._decompressor.eof and not self._next_stream():
                    self._ended = True
                    break
                if self._decompressor.needs_input and not self._rest:
                    self._rest = self._file.read(PIECE)
                    if not self._rest:
                        raise ShardError(f"it is cut short: its {self.name} stream has no end")
                piece = self._decompressor.decompress(self._rest, size)
                self._rest = b""
        except _errors(self.name) as error:
            raise ShardError(f"it is damaged: its {self.name} stream cannot be decompressed ({error})") from error
        return piece

    def _next_stream(self) -> bool:
        """Go on with what follows a stream: another one, or zeros that fill up a block of the medium and the end."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            if not (piece := self._file.read(PIECE)):
                return False
            rest = piece.lstrip(b"\0")
        self._rest, self._decompressor = rest, _decompressor(self.name)
        return True


class _Inflater:
    """zlib's decompressor for gzip, as those of bzip2 and xz are used."""

    def __init__(self) -> None:
        self._inner, self._held = zlib.decompressobj(wbits=31), b""

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._held

    def decompress(self, data: bytes, size: int) -> bytes:
        piece = self._inner.decompress(self._held + data, size)
        self._held = self._inner.unconsumed_tail
        return piece


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, size: int, /) -> bytes: ...


def _decompressor(name: str) -> _Decompressor:
    # Imported here: a Python may have been built without them.
    if name == "gzip":
        return _Inflater()
    if name == "bzip2":
        import bz2

        return bz2.BZ2Decompressor()
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)


def _errors(name: str) -> tuple[type[Exception], ...]:
    general = (OSError, EOFError, ValueError, MemoryError, zlib.error)
    if name != "xz":
        return general
    import lzma

    return (*general, lzma.LZMAError)
