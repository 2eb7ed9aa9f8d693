"""Inputs of a bulk run: a folder, a list of files, Parquet files or WebDataset shards, each as a numbered list.

The numbers make an exact resume possible: image n is the same in every run on the same inputs. Only names and locations
are kept in memory; an image's bytes are read when it is processed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import duckdb

from vitrine.models.errors import VitrineError
from vitrine.models.shards import expand_braces, members, read_at
from vitrine.service.errors import ServiceError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")  # in WebDataset shards, beside texts and classes
ROWS_PER_FETCH = 32  # rows of a Parquet file whose images are in memory together
# Never download extensions, and leave the processors to the engine.
DUCKDB = {"threads": 1, "autoinstall_known_extensions": False, "autoload_known_extensions": False}


class BulkError(VitrineError, ValueError):
    """Inputs, options or output cannot be used; the message says what is wrong and what to do."""


class Item(NamedTuple):
    """One image, not read yet."""

    id: int
    name: str
    read: Callable[[], bytes]  # raises OSError, or ServiceError missing_image


class Source(Protocol):
    """A numbered list of images. Can be pickled."""

    kind: str

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """SHA-256 that changes whenever an image would get another number."""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Images `start` to `stop`, in order."""


def open_source(inputs: str, column: str | None = None) -> Source:
    """The source that a command line names.

    Args:
        inputs: a folder; a text file with one path per line, relative to it; `x.parquet` or `x.tar`, where braces
            stand for several files (`x-{000..003}.tar`).
        column: column of Parquet files with image bytes, or with paths relative to the file. Default: `image`, or the
            only one that holds bytes.

    Raises:
        BulkError: the inputs do not exist, are empty or cannot be read.
    """
    # absolute, as Ray's processes have another working directory
    paths = [Path(name).absolute() for name in dict.fromkeys(expand_braces(inputs))]
    suffix = paths[0].suffix
    if suffix in (".tar", ".parquet"):
        if missing := [path for path in paths if not path.is_file()]:
            raise BulkError(f"{missing[0]} is no file; {inputs} stands for {len(paths):,} of them")
        source: Source = Shards(paths) if suffix == ".tar" else ParquetFiles(paths, column)
    elif (path := Path(inputs).absolute()).is_dir():
        source = Files("folder", path, _list_files(path))
    elif path.is_file():
        source = Files("list", path.parent, _read_list(path))
    else:
        raise BulkError(f"{inputs} is no folder and no file; give one of images, a list, .parquet or .tar")
    if column is not None and not isinstance(source, ParquetFiles):
        raise BulkError(f"--column is for Parquet files, and {inputs} is none")
    if not len(source):
        raise BulkError(f"{inputs} has no images")
    return source


class Files:
    """Files by path, from a folder or from a list."""

    def __init__(self, kind: str, root: Path, paths: list[str]) -> None:
        """paths: relative to `root`."""
        self.kind, self.root, self.paths = kind, root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """SHA-256 of the paths only: querying every file's size is slow on a file server."""
        return _digest(self.paths)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for number in range(start, min(stop, len(self))):
            path = self.paths[number]
            yield Item(number, _valid_text(path), (self.root / path).read_bytes)


class Shards:
    """The images in tar files, by an index of their members; members without an image's extension are ignored."""

    kind = "shards"

    def __init__(self, shards: list[Path]) -> None:
        self.shards = shards
        self.members: list[tuple[int, str, int, int]] = []  # shard, name, offset, size
        for number, shard in enumerate(shards):
            try:
                self.members += [
                    (number, member.name, member.offset_data, member.size)
                    for member in members(shard)
                    if member.name.lower().endswith(IMAGE_SUFFIXES)
                ]
            except (OSError, tarfile.TarError) as error:
                raise BulkError(f"{shard} is no readable tar file: {error}; make or fetch it again") from error

    def __len__(self) -> int:
        return len(self.members)

    def digest(self) -> str:
        names = (shard.name for shard in self.shards)
        return _digest(itertools.chain(names, (f"{member}" for member in self.members)))

    def items(self, start: int, stop: int) -> Iterator[Item]:
        for number in range(start, min(stop, len(self))):
            shard, name, offset, size = self.members[number]
            path = self.shards[shard]
            yield Item(number, f"{path.name}/{_valid_text(name)}", partial(read_at, path, offset, size))


class ParquetFiles:
    """The rows of Parquet files: a column of bytes, of paths, or of both (`bytes` and `path`, as on Hugging Face)."""

    kind = "parquet"

    def __init__(self, files: list[Path], column: str | None) -> None:
        self.files = files
        self.columns: list[tuple[str, str]] = []  # of each file, as SQL: bytes, path
        self.rows: list[int] = []
        for file in files:
            try:
                with duckdb.connect(config=DUCKDB) as database:  # type: ignore[arg-type]
                    table = database.read_parquet(str(file))
                    types = dict(zip(table.columns, table.types, strict=True))
                    self.rows.append(len(table))
            except duckdb.Error as error:
                raise BulkError(f"{file} is no readable Parquet file: {error}; make or fetch it again") from error
            self.columns.append(_bytes_and_path(file, types, column))

    def __len__(self) -> int:
        return sum(self.rows)

    def digest(self) -> str:
        """SHA-256 of names, sizes, row counts and columns."""
        return _digest(
            f"{file.name} {file.stat().st_size} {rows} {columns}"
            for file, rows, columns in zip(self.files, self.rows, self.columns, strict=True)
        )

    def items(self, start: int, stop: int) -> Iterator[Item]:
        before = 0
        for file, rows, columns in zip(self.files, self.rows, self.columns, strict=True):
            first, last = max(start - before, 0), min(stop - before, rows)
            if first < last:
                for row, content, path in _rows(file, columns, first, last):
                    yield Item(before + row, f"{file.name}#{row}", partial(_content, file.parent, content, path))
            before += rows


def _list_files(folder: Path) -> list[str]:
    """All files at any depth, sorted, without hidden ones."""
    paths = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(directory).relative_to(folder)
        paths += [(relative / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(paths)


def _read_list(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BulkError(f"{file} is no list: a text file (UTF-8) with the path of an image a line") from error


def _bytes_and_path(file: Path, types: Mapping[str, object], column: str | None) -> tuple[str, str]:
    """SQL expressions for (bytes, path) in a Parquet file. Raises `BulkError`."""
    available = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    if column is None:
        byte_columns = [name for name, kind in types.items() if "BLOB" in str(kind)]
        column = "image" if "image" in types else byte_columns[0] if len(byte_columns) == 1 else None
    if column is None or column not in types:
        what = "which column has the images?" if column is None else f"there is no column {column!r}."
        raise BulkError(f"{file}: {what} Name one with --column; there are {available}")
    quoted, kind = '"' + column.replace('"', '""') + '"', str(types[column])
    if kind == "BLOB":
        return quoted, "NULL"
    if kind == "VARCHAR":
        return "NULL", quoted
    if kind.startswith("STRUCT(") and "bytes BLOB" in kind.replace('"', ""):
        return f"{quoted}.bytes", f"{quoted}.path" if "path VARCHAR" in kind.replace('"', "") else "NULL"
    raise BulkError(f"{file}: column {column!r} is {kind}, neither bytes nor paths; there are {available}")


def _rows(
    file: Path, columns: tuple[str, str], first: int, last: int
) -> Iterator[tuple[int, bytes | None, str | None]]:
    """(row, bytes, path) of rows `first` to `last`, fetched a few at a time."""
    content, path = columns
    query = (
        f"SELECT file_row_number, {content}, {path} FROM read_parquet(?, file_row_number = true) "  # noqa: S608
        "WHERE file_row_number >= ? AND file_row_number < ?"
    )
    try:
        with duckdb.connect(config=DUCKDB) as database:  # type: ignore[arg-type]
            result = database.execute(query, [str(file), first, last])
            while rows := result.fetchmany(ROWS_PER_FETCH):
                yield from rows
    except duckdb.Error as error:
        raise BulkError(f"{file} cannot be read: {error}; make or fetch it again") from error


def _content(folder: Path, content: bytes | None, path: str | None) -> bytes:
    if content is not None:
        return content
    if path is None:
        raise ServiceError("missing_image", "the row has neither bytes nor a path")
    return (folder / path).read_bytes()


def _valid_text(name: str) -> str:
    """The name as valid text for a table: file names may be any bytes, texts are UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()
