"""WebDataset shards: tar files, several of them by one pattern, read by the places of their members.

Access by place instead of by stream: an image has the same number in every run, and processes share no open file.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path


def expand_braces(pattern: str) -> list[str]:
    """As a shell does: "{000..002}" (numbers, zeros in front kept) and "{a,b}", any number of them, not nested."""
    parts = []
    for place, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if place % 2 == 0:  # between braces
            parts.append([part])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = numbers.groups()
            step = 1 if int(first) <= int(last) else -1
            parts.append([f"{number:0{len(first)}}" for number in range(int(first), int(last) + step, step)])
        else:
            parts.append(part.split(","))
    return ["".join(choice) for choice in itertools.product(*parts)]


def members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a shard. Raises OSError, or tarfile.TarError where it is no tar file, compressed or cut short."""
    with tarfile.open(shard, "r:") as tar:  # not compressed, else there is no access by place
        for member in tar:
            if member.isreg():
                yield member
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all, at a kilobyte each
    with shard.open("rb") as end:  # tarfile takes a file that is cut short between two members for a whole one
        end.seek(-1024, os.SEEK_END)
        if any(end.read()):
            raise tarfile.ReadError("it is cut short")


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """A member's bytes (`TarInfo.offset_data`, `TarInfo.size`)."""
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
