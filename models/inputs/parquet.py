"""The rows of Parquet files: a column of bytes, of paths, or of both (`bytes` and `path`, as on Hugging Face).

A file is read by one query that is taken up row by row, so every row group is decoded once. DuckDB decodes 2,048 rows
at a time, or a row group if it is smaller; two such lots are in memory, and not the row group.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import duckdb

from vitrine.models.files.names import display, printable
from vitrine.models.inputs.duck import READ_PARQUET, connect, readable
from vitrine.models.inputs.errors import InputError, MissingImage, Unreadable
from vitrine.models.inputs.files import LARGEST, common_names, read_file, reason, too_large
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.source import Item, digest, failing

ROWS_PER_FETCH = 32  # rows that are Python objects together
_Content = tuple[bytes | None, str | None]  # bytes, path


class Table(NamedTuple):
    """One Parquet file."""

    path: Path
    title: str
    columns: tuple[str, str]  # of bytes and of paths, as SQL
    groups: list[int]  # row at which each row group begins, and the number of rows

    @property
    def rows(self) -> int:
        return self.groups[-1]


class ParquetFiles:
    """The rows of Parquet files, one after the other."""

    kind = "parquet"

    def __init__(self, paths: list[Path], column: str | None, skipped: Skipped, skip_broken: bool = False) -> None:
        """column: of bytes, or of paths relative to the file; default: `image`, or the only one that holds bytes.

        Raises `InputError` if there is no such column, and for a file that is damaged or missing unless these are to
        be skipped.
        """
        self.skipped, self.skip_broken = skipped, skip_broken
        self.tables: list[Table] = []
        for path, title in zip(paths, common_names(paths), strict=True):
            try:
                self.tables.append(_open(path, title, column))
            except (duckdb.Error, OSError) as error:
                if not skip_broken:
                    raise broken(path, error) from error
                skipped.add(Reason.BROKEN, title, _said(error))
        self.starts = [0, *itertools.accumulate(table.rows for table in self.tables)]

    def __len__(self) -> int:
        return self.starts[-1]

    def digest(self) -> str:
        """SHA-256 of names, sizes, row counts and columns."""
        return digest(f"{t.title} {t.path.stat().st_size} {t.rows} {t.columns}" for t in self.tables)

    def reader(self) -> ParquetReader:
        return ParquetReader(self)


class ParquetReader:
    """Reads a source's rows; the query stays open, and goes forward."""

    def __init__(self, source: ParquetFiles) -> None:
        self._source = source
        self._pass: _Pass | None = None
        self._failed: dict[int, tuple[int, str]] = {}  # table -> from which row on, and why

    def items(self, start: int, stop: int) -> Iterator[Item]:
        source = self._source
        for number in range(start, min(stop, len(source))):
            at = bisect_right(source.starts, number) - 1
            table, row = source.tables[at], number - source.starts[at]
            yield Item(number, f"{display(table.title)}#{row}", self._read(at, table, row))

    def close(self) -> None:
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    def _read(self, at: int, table: Table, row: int) -> Callable[[], bytes]:
        failed_row, why = self._failed.get(at, (table.rows, ""))
        if row >= failed_row:
            return failing(why)
        try:
            return partial(_content, table.path.parent, *self._row(table, row))
        except (duckdb.Error, OSError) as error:
            self.close()
            if not self._source.skip_broken:
                raise broken(table.path, error) from error
            why = f"its Parquet file cannot be read: {_said(error)}"
            self._failed[at] = (row, why)
            return failing(why)

    def _row(self, table: Table, row: int) -> _Content:
        current = self._pass
        if current is None or current.table is not table or not current.leads_to(row):
            self.close()
            current = self._pass = _Pass(table, row)
        while current.row < row:
            current.next()
        content = current.next()
        if current.row == table.rows:
            self.close()
        return content


class _Pass:
    """The rows of a file from some row on."""

    def __init__(self, table: Table, first: int) -> None:
        self.table, self.row = table, first
        self._fetched: deque[_Content] = deque()
        with ExitStack() as stack:
            name = stack.enter_context(readable(table.path))
            database = stack.enter_context(connect())
            # With it DuckDB would read a whole row group before its first row.
            database.execute("SET disable_parquet_prefetching = true")
            # Without it 10 MB of rows would be decoded ahead, and be lost where damage follows them.
            database.execute("SET streaming_buffer_size = '1KB'")
            content, path = table.columns
            rows = READ_PARQUET.replace(")", ", file_row_number = true)")
            query = f"SELECT {content}, {path} FROM {rows} WHERE file_row_number >= ?"  # noqa: S608
            self._result = database.execute(query, [name, first])
            self._open = stack.pop_all()

    def leads_to(self, row: int) -> bool:
        """Whether a row lies ahead, with no whole row group before it that a query of its own would not decode."""
        if row == self.row:
            return True
        groups = self.table.groups
        return row > self.row and bisect_right(groups, row) == bisect_right(groups, self.row)

    def next(self) -> _Content:
        """Raises duckdb.Error, or `Unreadable` if the file was changed."""
        if not self._fetched:
            self._fetched.extend(self._result.fetchmany(ROWS_PER_FETCH))
            if not self._fetched:
                raise Unreadable("it has fewer rows than when it was listed")
        self.row += 1
        return self._fetched.popleft()

    def close(self) -> None:
        self._open.close()


def broken(file: Path, error: Exception) -> InputError:
    """The one sentence about a Parquet file that cannot be read."""
    return InputError(
        f"{printable(file)} is not a readable Parquet file: {_said(error)}. Write or download it again, or skip it "
        f"with --skip-broken-shards"
    )


def _said(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else str(error).partition("\n")[0].rstrip(".")


def _open(path: Path, title: str, column: str | None) -> Table:
    """Raises duckdb.Error, OSError, `InputError`."""
    with readable(path) as name, connect() as database:
        described = database.execute(f"DESCRIBE SELECT * FROM {READ_PARQUET}", [name]).fetchall()  # noqa: S608
        groups = database.execute(
            "SELECT any_value(row_group_num_rows) FROM parquet_metadata(?) GROUP BY row_group_id ORDER BY row_group_id",
            [name],
        ).fetchall()
        [(total,)] = database.execute("SELECT num_rows FROM parquet_file_metadata(?)", [name]).fetchall()
    rows = [count for (count,) in groups]
    if min(rows, default=0) < 0 or sum(rows) != total:
        raise Unreadable(f"its metadata are damaged: it has {total:,} rows, but its row groups have {sum(rows):,}")
    types = {column_name: kind for column_name, kind, *_ in described}
    return Table(path, title, _bytes_and_path(path, types, column), [0, *itertools.accumulate(rows)])


def _bytes_and_path(file: Path, types: Mapping[str, str], column: str | None) -> tuple[str, str]:
    """SQL expressions for (bytes, path) in a Parquet file. Raises `InputError`."""
    available = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    if column is None:
        byte_columns = [name for name, kind in types.items() if "BLOB" in kind]
        column = "image" if "image" in types else byte_columns[0] if len(byte_columns) == 1 else None
    if column is None or column not in types:
        what = "it is not clear which column has the images." if column is None else f"there is no column {column!r}."
        raise InputError(f"{printable(file)}: {what} Choose one with --column; the columns are {available}")
    quoted, kind = '"' + column.replace('"', '""') + '"', types[column]
    if kind == "BLOB":
        return quoted, "NULL"
    if kind == "VARCHAR":
        return "NULL", quoted
    if kind.startswith("STRUCT(") and "bytes BLOB" in kind.replace('"', ""):
        return f"{quoted}.bytes", f"{quoted}.path" if "path VARCHAR" in kind.replace('"', "") else "NULL"
    raise InputError(
        f"{printable(file)}: column {column!r} is {kind}, neither bytes nor paths; the columns are {available}"
    )


def _content(folder: Path, content: bytes | None, path: str | None) -> bytes:
    if content is not None:
        if len(content) > LARGEST:
            raise too_large(len(content))
        return content
    if path is None:
        raise MissingImage("the row has neither bytes nor a path")
    if "\0" in path:
        raise Unreadable("the row's path is not valid")
    return read_file(folder / path)
