"""A CSV of images with their label, and where there are columns of them, group and split: Waterbirds' metadata.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vitrine.models.files.names import printable
from vitrine.models.inputs.files import read_file, reason
from vitrine.service.offline.debias.errors import DebiasError

# Names that such columns have in published tables, the first that is there; --columns names others.
KNOWN = {
    "image": ("image", "img_filename", "filename", "file_name", "path"),
    "label": ("label", "y", "class"),
    "group": ("group", "place", "confounder"),
    "split": ("split", "partition"),
}
REQUIRED = ("image", "label")


class Row(NamedTuple):
    """One image of the table."""

    image: str  # path below the folder of images
    label: str
    group: str | None  # None: there is no such column
    split: str | None


def parse_columns(text: str | None) -> dict[str, str]:
    """What each column is called, from "image=img_filename,label=y". Raises `DebiasError`."""
    columns = {}
    for part in (text or "").split(",") if text else ():
        what, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not name or what not in KNOWN:
            raise DebiasError(
                f"cannot read --columns {printable(text or '')}; give KIND=NAME, where KIND is one of "
                f"{', '.join(KNOWN)}"
            )
        columns[what] = name
    return columns


def read_table(file: Path, columns: dict[str, str], labels: Sequence[str] | None) -> list[Row]:
    """The rows, in order.

    Args:
        columns: see `parse_columns`; of those not named the first that is `KNOWN`.
        labels: what numbers in the column of labels stand for, if it has numbers.

    Raises:
        DebiasError: it is no such table, or a label is none of `labels`.
    """
    header, records = _read(file)
    places = {what: _column(file, header, what, columns.get(what)) for what in KNOWN}
    rows = []
    for number, record in enumerate(records, start=2):
        if len(record) != len(header):
            raise DebiasError(f"{file}, line {number} has {len(record)} fields, but the first line has {len(header)}")
        fields = {what: None if place is None else record[place].strip() for what, place in places.items()}
        rows.append(Row(fields["image"] or "", fields["label"] or "", fields["group"], fields["split"]))
    if not rows:
        raise DebiasError(f"{file} has no images, only a first line")
    return [row._replace(label=name) for row, name in zip(rows, _named(file, rows, labels), strict=True)]


def _read(file: Path) -> tuple[list[str], list[list[str]]]:
    try:
        text = read_file(file).decode("utf-8-sig")
    except OSError as error:
        raise DebiasError(f"{file} cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise DebiasError(f"{file} is not CSV in UTF-8; save it in this format") from error
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        raise DebiasError(f"{file} is not CSV: {error}") from error
    if not lines:
        raise DebiasError(f"{file} is empty; its first line must name the columns")
    return [name.strip() for name in lines[0]], lines[1:]


def _column(file: Path, header: Sequence[str], what: str, name: str | None) -> int | None:
    """The place of a column; None if there is none and none is needed."""
    if name is not None:
        if name not in header:
            raise DebiasError(
                f"{file} has no column {printable(name)}; its columns are {', '.join(map(printable, header))}"
            )
        return header.index(name)
    for known in KNOWN[what]:
        if known in header:
            return header.index(known)
    if what in REQUIRED:
        raise DebiasError(
            f"{file} has no column with a known name for the {what}; its columns are "
            f"{', '.join(map(printable, header))}; name it with --columns {what}=NAME"
        )
    return None


def _named(file: Path, rows: Sequence[Row], labels: Sequence[str] | None) -> list[str]:
    """The label of each row; numbers, where all are numbers, are places in `labels`."""
    found = dict.fromkeys(row.label for row in rows)
    if all(name.isdigit() for name in found):
        if labels is None:
            raise DebiasError(
                f"{file} has numbers as labels; give their names in order, starting with 0: --labels landbird,…"
            )
        if beyond := [name for name in found if int(name) >= len(labels)]:
            raise DebiasError(f"{file} has a label {beyond[0]}, but --labels names only {len(labels)}, starting with 0")
        return [labels[int(row.label)] for row in rows]
    if labels is not None and (unknown := [name for name in found if name not in labels]):
        raise DebiasError(
            f"{file} has a label {printable(unknown[0])!r}, which is not among {', '.join(map(printable, labels[:10]))}"
        )
    return [row.label for row in rows]
