"""Folders in which each file is one named thing."""

from __future__ import annotations

import os
from pathlib import Path

from vitrine.models.errors import VitrineError


def json_files(folder: Path, what: str, most: int, refused: type[VitrineError]) -> list[Path]:
    """The files NAME.json of a folder, by name.

    Raises `refused` if it cannot be listed, or has more than `most`. what: they are, in the plural, for these errors.
    """
    try:  # not by glob, which passes over a folder that may not be read
        files = [folder / name for name in sorted(os.listdir(folder)) if name.endswith(".json")]
    except OSError as error:
        raise refused(f"{folder} is not a directory of {what}: {error.strerror}") from error
    if len(files) > most:
        raise refused(f"{folder} has {len(files):,} {what}; at most {most:,} are accepted")
    return files
