"""WebDataset shards: tar files, selected by one pattern, whose members are read by offset.

Random access instead of streaming: an image has the same number in every run, and processes share no open file.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: "{000..002}" (leading zeros kept) and "{a,b}"; any number, not nested."""
    parts = []
    for index, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if index % 2 == 0:  # outside braces
            parts.append([part])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = numbers.groups()
            step = 1 if int(first) <= int(last) else -1
            parts.append([f"{number:0{len(first)}}" for number in range(int(first), int(last) + step, step)])
        else:
            parts.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


def members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a shard. Raises OSError, or tarfile.TarError if it is not a tar file, compressed or truncated."""
    with tarfile.open(shard, "r:") as tar:  # uncompressed only: compression rules out random access
        for member in tar:
            if member.isreg():
                yield member
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all, at a kilobyte each
    with shard.open("rb") as end:  # tarfile does not notice a file truncated between two members
        end.seek(-1024, os.SEEK_END)
        if any(end.read()):
            raise tarfile.ReadError("it is cut short")


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """The bytes of a member (`TarInfo.offset_data`, `TarInfo.size`)."""
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
