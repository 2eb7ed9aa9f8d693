"""Text files with an entry a line: paths of images, or names (labels, classes, words)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vitrine.models.files.names import printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import read_file, reason


def read_list(file: Path) -> list[str]:
    """The paths, relative to the file, in order; blank lines are nothing. Names may be any bytes, as file names may.

    Raises `InputError` if it cannot be read, or is no text.
    """
    content = _read(file, "the list")
    if b"\0" in content:
        raise InputError(
            f"{printable(file)} is not a list, tar or Parquet file; give a text file (UTF-8) with one image path per "
            f"line"
        )
    return [os.fsdecode(line) for line in _lines(content)]


def read_names(file: Path, what: str) -> list[str]:
    """The names, in order, without the blanks around them; blank lines are nothing. UTF-8, and so commas are letters.

    Raises `InputError` if it cannot be read, or is no text in UTF-8; `what`: "labels", for the message.
    """
    names = []
    for line in _lines(_read(file, f"the file of {what}")):
        try:
            names.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise InputError(_not_text(file, what)) from error
    if any("\0" in name for name in names):
        raise InputError(_not_text(file, what))
    return names


def read_labels(file: Path) -> tuple[str, ...]:
    """The labels of a file with one a line. Raises `InputError`, also if there are none, or one is there twice."""
    return distinct(read_names(file, "labels"), printable(file))


def distinct(labels: Sequence[str], where: str) -> tuple[str, ...]:
    """The labels without the blanks around them. Raises `InputError` unless they are labels, no two of them equal."""
    seen: dict[str, None] = {}
    for label in (label.strip() for label in labels):
        if not label:
            raise InputError(f"{where}: a label has no letters")
        if label in seen:
            raise InputError(f"{where}: labels must differ from one another, but {label[:100]!r} is given twice")
        seen[label] = None
    if not seen:
        raise InputError(f"{where}: there are no labels; give one label per line")
    return tuple(seen)


def _read(file: Path, what: str) -> bytes:
    """The bytes without a byte order mark."""
    try:
        return read_file(file).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{what} {printable(file)} cannot be read: {reason(error)}") from error


def _lines(content: bytes) -> list[bytes]:
    """The lines that are not blank; Windows' line ends, too."""
    return [line for line in (line.removesuffix(b"\r") for line in content.split(b"\n")) if line.strip()]


def _not_text(file: Path, what: str) -> str:
    return f"the file of {what} {printable(file)} is not UTF-8 text; save it as UTF-8, one per line"
