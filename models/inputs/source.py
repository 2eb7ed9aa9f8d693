"""A numbered list of images, and its one reader in a process, which goes forward."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from vitrine.models.files.names import display
from vitrine.models.inputs.errors import Unreadable
from vitrine.models.inputs.files import read_file
from vitrine.models.inputs.skipped import Skipped


class Item(NamedTuple):
    """One image, not decoded yet; most are not read yet either."""

    id: int
    name: str  # valid text
    read: Callable[[], bytes]  # raises OSError, `MissingImage` if the inputs have none there


class Reader(Protocol):
    """Reads a source in one process, in one thread. Going forward is cheap, going back begins anew."""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Images `start` to `stop`, in order. Raises `InputError` if what is read proves to be damaged."""

    def close(self) -> None: ...


class Source(Protocol):
    """A numbered list of images. Can be pickled."""

    kind: str
    skipped: Skipped

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """SHA-256 that changes whenever an image would get another number."""

    def reader(self) -> Reader: ...


class Files:
    """Files by path: those of a folder, a list or a pattern."""

    def __init__(self, kind: str, root: Path, paths: list[str], skipped: Skipped) -> None:
        """paths: relative to `root`, or absolute."""
        self.kind, self.root, self.paths, self.skipped = kind, root, paths, skipped

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """SHA-256 of the paths only: querying every file's size is slow on a file server."""
        return digest(self.paths)

    def reader(self) -> Files:
        return self

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for number in range(start, min(stop, len(self))):
            path = self.paths[number]
            yield Item(number, display(path), partial(read_file, os.path.join(self.root, path)))

    def close(self) -> None:
        """Nothing is open between two images."""


def failing(message: str) -> Callable[[], bytes]:
    """What reads an image of which it is known that it cannot be read."""
    return partial(_fail, message)


def _fail(message: str) -> bytes:
    raise Unreadable(message)


def digest(names: Iterable[str]) -> str:
    """SHA-256 of a list of names."""
    summed = hashlib.sha256()
    for name in names:
        summed.update(os.fsencode(name) + b"\0")
    return summed.hexdigest()
