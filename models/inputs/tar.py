"""The members of a tar, one after the other, of every dialect: old, ustar, GNU, pax.

Not by the library's tarfile: it takes a damaged header for the end, or with `ignore_zeros` goes past it without a word,
and reads as much into memory as a header says. (Its header parser alone, tried in its place, needed as much code around
it, since it drops what is wrong in extended headers, in each Python differently, and took 2.5 times as long.) Here
damage is an error that names the byte; several tars one after the other (`cat a.tar b.tar`) are read to the last; a
missing end is a warning, as the last member may be whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from vitrine.models.inputs.streams import ShardError, Stream

BLOCK = 512
LONGEST_HEADER = 2**20  # bytes of one member's extended header
_ZERO = bytes(BLOCK)
_GNU = b"ustar  "


class Type(Enum):
    """What a member is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    FOLDER = "folder"
    SPARSE = "sparse"  # stored in pieces
    OTHER = "other"


_TYPES = {
    b"0": Type.FILE,
    b"\0": Type.FILE,
    b"7": Type.FILE,
    b"1": Type.HARD_LINK,
    b"2": Type.SYMBOLIC_LINK,
    b"5": Type.FOLDER,
    b"S": Type.SPARSE,
}
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))


class Member(NamedTuple):
    """One member. Names are as `os.fsdecode` makes them of their bytes."""

    name: str
    type: Type
    header: int  # byte at which it begins
    offset: int  # byte at which its data begin
    size: int  # bytes of its data
    target: str  # of a link


class Tar:
    """The members of a tar, read once, from its stream's beginning."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.ended = True  # False once all members were yielded and no end block was there

    def __iter__(self) -> Iterator[Member]:
        """While a member is yielded the stream is at its data.

        Raises `ShardError` if the tar is damaged, cut short, or none.
        """
        stream, extended, last = self.stream, dict[str, bytes](), b""
        while block := stream.read(BLOCK):
            header, previous, last = stream.position - len(block), last, block
            if not block.strip(b"\0"):
                continue  # end blocks; another tar may follow
            if len(block) < BLOCK:
                raise ShardError(f"it is cut short: the header at byte {header:,} is incomplete")
            if not _is_header(block):
                if header == 0:
                    raise ShardError("it is not a tar file")
                raise ShardError(
                    f"it is damaged: at byte {header:,} there is neither a member's header nor the end"
                    + (", but something else after zeros" if previous == _ZERO else "")
                )
            kind = block[156:157]
            size = 0 if kind in _WITHOUT_DATA else _number(block[124:136], header)
            if kind in b"xXgLK":
                content = self._header(header, size)
                if kind in b"LK":
                    extended["path" if kind == b"L" else "linkpath"] = content.rstrip(b"\0")
                elif kind != b"g":  # what is for all members is no member's name or size
                    extended |= _records(content, header)
                continue
            if kind == b"S":
                self._skip_map(block, header)
            if kind not in _WITHOUT_DATA and "size" in extended:
                size = _decimal(extended["size"], header)
            member = _member(block, kind, header, stream.position, size, extended)
            extended = {}
            yield member
            self._finish(header, member.offset, size)
        if extended:
            raise ShardError("it is cut short after an extended header")
        if not stream.position:
            raise ShardError("it is empty")
        self.ended = not last.strip(b"\0")

    def no_end(self, title: str) -> str:
        """The warning about a tar that has no end blocks."""
        return f"{title} has no end blocks: its last member is complete, but more may have been cut off"

    def _header(self, header: int, size: int) -> bytes:
        """The content of an extended header."""
        if size > LONGEST_HEADER:
            raise ShardError(f"it is damaged: the extended header at byte {header:,} would have {size:,} bytes")
        offset = self.stream.position
        content = self.stream.read(size)
        self._finish(header, offset, size)
        return content

    def _skip_map(self, block: bytes, header: int) -> None:
        """Go on behind the map of a sparse member, which may go on in blocks of its own."""
        more = block[482]
        while more == 1:
            block = self.stream.read(BLOCK)
            if len(block) < BLOCK:
                raise ShardError(f"it is cut short in the member that begins at byte {header:,}")
            more = block[504]

    def _finish(self, header: int, offset: int, size: int) -> None:
        """Go on behind a member's data; what fills up their last block may be missing at the very end."""
        if self.stream.forward(offset + size) < offset + size:
            raise ShardError(f"it is cut short in the member that begins at byte {header:,}")
        self.stream.forward(offset + -(-size // BLOCK) * BLOCK)


def _member(block: bytes, kind: bytes, header: int, offset: int, size: int, extended: dict[str, bytes]) -> Member:
    name = _text(block[:100])
    if block[257:264] != _GNU and block[257:262] == b"ustar" and (prefix := _text(block[345:500])):
        name = prefix + b"/" + name
    name = extended.get("GNU.sparse.name") or extended.get("path") or name
    type_ = _TYPES.get(kind, Type.OTHER)
    if type_ is Type.FILE and kind == b"\0" and name.endswith(b"/"):  # folders before there was a type for them
        type_ = Type.FOLDER
    if any(key.startswith("GNU.sparse.") for key in extended):
        type_ = Type.SPARSE
    target = extended.get("linkpath") or _text(block[157:257])
    return Member(os.fsdecode(name), type_, header, offset, size, os.fsdecode(target))


def _is_header(block: bytes) -> bool:
    """Whether the sum that a header has of its own bytes is right; some programs sum bytes as signed ones."""
    try:
        expected = _octal(block[148:156])
    except ValueError:
        return False
    summed = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if summed == expected:
        return True
    high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in block[148:156])
    return summed - 256 * high == expected


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    """Raises ValueError."""
    digits = _text(field).strip(b" ")
    if digits.strip(b"01234567"):  # int() would take signs and underscores
        raise ValueError
    return int(digits or b"0", 8)


def _number(field: bytes, header: int) -> int:
    """A size: octal digits, or binary for what is too large for these. Raises `ShardError`."""
    try:
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    except ValueError:
        size = -1
    if size < 0:
        raise ShardError(f"it is damaged: the member that begins at byte {header:,} has no valid size")
    return size


def _decimal(value: bytes, header: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise ShardError(f"it is damaged: the member that begins at byte {header:,} has no valid size")
    return int(value)


def _records(content: bytes, header: int) -> dict[str, bytes]:
    """The keys and values of a pax header: "length key=value\\n", where the length is that of all of it."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        digits, space, _ = content[at : at + 12].partition(b" ")
        end = at + int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if not at < end <= len(content) or not equals or content[end - 1 : end] != b"\n":
            raise ShardError(f"it is damaged: the extended header at byte {header:,} is not a valid one")
        records[key.decode(errors="replace")] = value.rstrip(b"\0")
        at = end
    return records
