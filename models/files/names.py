"""Names of files, which are bytes: how they are shown, and whether everybody can take them."""

from __future__ import annotations

import os
from pathlib import Path

from vitrine.models.files.errors import FileError


def display(name: str | bytes | os.PathLike[str]) -> str:
    r"""A name as valid text, for tables, JSON, logs and terminals: bytes that are no UTF-8 become \xff."""
    return os.fsencode(name).decode(errors="backslashreplace")


def printable(name: str | bytes | os.PathLike[str], most: int = 240) -> str:
    """A name for a message: as `display`, without control characters, its middle left out if it is long."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in display(name))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def check_name(path: Path) -> None:
    """Raise `FileError` for a path that is no UTF-8.

    Python opens such files, but ONNX Runtime, DuckDB, JSON and Parquet cannot name them: refused before any work.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{display(path)} has a name that is not UTF-8; rename it, or choose another") from error
