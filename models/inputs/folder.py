"""The images in a folder, at any depth: links are followed, loops are not, litter and other files are counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitrine.models.files.names import printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import read_head, reason
from vitrine.models.inputs.names import Kind, is_litter, kind, starts_like_an_image
from vitrine.models.inputs.skipped import Reason, Skipped

MOST_VISITS = 64  # of one folder, by links: links that cross one another would multiply without end


class Found(NamedTuple):
    """Paths below a folder, sorted, with "/" between their parts."""

    images: list[str]
    tars: list[str]
    tables: list[str]  # Parquet


def walk(root: Path, skipped: Skipped) -> Found:
    """What is in a folder. Raises `InputError` if it cannot be read."""
    found = Found([], [], [])
    lists = {Kind.IMAGE: found.images, Kind.TAR: found.tars, Kind.PARQUET: found.tables}
    for path, entry in files(root, skipped):
        what = kind(entry.name)
        if what is Kind.LITTER:
            skipped.add(Reason.LITTER, path)
        elif _is_special(entry):
            skipped.add(Reason.SPECIAL, path)
        elif what is Kind.BARE:
            if _may_be_an_image(entry.path):
                found.images.append(path)
            else:
                skipped.add(Reason.NO_IMAGE, path)
        elif what is Kind.OTHER:
            skipped.add(Reason.OTHER, path)
        else:
            lists[what].append(path)
    for paths in found:
        paths.sort()
    return found


def files(root: Path, skipped: Skipped) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path below `root`, entry) of all that is no folder, at any depth; litter's folders are left out.

    Raises `InputError` if `root` cannot be read.
    """
    try:
        entries = _scan(str(root))
        top = _identity(str(root))
    except OSError as error:
        raise InputError(f"the folder {printable(root)} cannot be read: {reason(error)}") from error
    visits: dict[tuple[int, int], int] = {}
    waiting: list[tuple[str, list[os.DirEntry[str]], tuple[tuple[int, int], ...]]] = [("", entries, (top,))]
    while waiting:
        prefix, entries, ancestors = waiting.pop()
        for entry in entries:
            path = prefix + entry.name
            if not _is_folder(entry):
                yield path, entry
                continue
            if is_litter(entry.name):
                skipped.add(Reason.LITTER, path)
                continue
            try:
                identity = _identity(entry.path)
                visits[identity] = visits.get(identity, 0) + 1
                if identity in ancestors or visits[identity] > MOST_VISITS:
                    skipped.add(Reason.LOOP, path)
                else:
                    waiting.append((f"{path}/", _scan(entry.path), (*ancestors, identity)))
            except OSError as error:
                skipped.add(Reason.FOLDER, path, reason(error))


def _scan(folder: str) -> list[os.DirEntry[str]]:
    """The entries of a folder in a fixed order, so that it is the same files that are named in each run."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether an entry that is no folder exists and is no regular file. A broken link is to be an error, and named."""
    try:
        return not entry.is_file() and (not entry.is_symlink() or os.path.exists(entry.path))
    except OSError:
        return False


def _may_be_an_image(path: str) -> bool:
    """By its first bytes; if they cannot be read, it is left to the one who reads it all to say why."""
    try:
        return starts_like_an_image(read_head(path))
    except OSError:
        return True
