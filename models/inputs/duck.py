"""DuckDB for Parquet and JSON, where nothing but the file itself decides what is read.

By default DuckDB takes folders like `name=b32` for columns, which would overwrite those of the file, and signs like
`[2024]` for a glob; and it may download extensions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from vitrine.models.inputs.errors import Unreadable
from vitrine.models.inputs.files import open_regular

# Never download extensions, and leave the processors to the engine.
CONFIG: dict[str, Any] = {"threads": 1, "autoinstall_known_extensions": False, "autoload_known_extensions": False}
READ_PARQUET = "read_parquet(?, hive_partitioning = false)"
DESCRIPTORS = Path("/proc/self/fd")  # the files that this process has open, where the system shows them (Linux)


def connect() -> duckdb.DuckDBPyConnection:
    """A database in memory. Raises duckdb.Error."""
    return duckdb.connect(config=CONFIG)


def literal(path: str | os.PathLike[str]) -> str:
    """A path as DuckDB takes it for no glob."""
    return re.sub(r"([\[*?])", r"[\1]", os.fspath(path))


@contextmanager
def readable(path: Path) -> Iterator[str]:
    """The name by which DuckDB can read a regular file, whatever its name is. Raises OSError."""
    with open_regular(path) as file:
        if _is_text(str(path)):
            yield literal(path)
        elif DESCRIPTORS.is_dir():  # DuckDB takes text alone
            yield f"{DESCRIPTORS}/{file.fileno()}"
        else:
            raise Unreadable("its name is not UTF-8, and DuckDB cannot read such names here; rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
