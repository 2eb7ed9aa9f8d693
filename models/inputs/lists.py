"""A text file with one path a line, relative to it."""

from __future__ import annotations

import os
from pathlib import Path

from vitrine.models.files.names import printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import read_file, reason


def read_list(file: Path) -> list[str]:
    """The paths, in order; blank lines are nothing. Names may be any bytes, as file names may.

    Raises `InputError` if it cannot be read, or is no text.
    """
    try:
        content = read_file(file)
    except OSError as error:
        raise InputError(f"the list {printable(file)} cannot be read: {reason(error)}") from error
    if b"\0" in content:
        raise InputError(
            f"{printable(file)} is no list, tar or Parquet file: "
            "give a text file (UTF-8) with the path of an image a line"
        )
    lines = (line.removesuffix(b"\r") for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    return [os.fsdecode(line) for line in lines if line.strip()]
