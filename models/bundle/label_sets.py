"""Named label sets: files NAME.json in a folder, {"labels": [...], "templates": [...]}; templates are optional.

A bundle may contain some (label_sets/NAME.json, and NAME.npy with their embeddings, computed at export), and the
operator of the service may add a folder of others. `default` is the bundle's own set and is not allowed as a file name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vitrine.models.errors import VitrineError
from vitrine.models.files.listing import json_files
from vitrine.models.files.reading import open_regular

DEFAULT = "default"
MAX_SETS = 1_000  # in a folder: they are encoded before the service is ready
MAX_BYTES = 2**26  # of one file
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class LabelSetError(VitrineError, ValueError):
    """A label set cannot be used; the message names the file and the problem."""


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"labels must differ from one another, but {label[:100]!r} is given twice")
        seen.add(label)
    return labels


Labels = Annotated[
    tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...],
    Field(min_length=1),
    AfterValidator(_distinct),
]
Templates = Annotated[tuple[Annotated[str, StringConstraints(pattern=r"\{\}")], ...], Field(min_length=1)]


class NamedLabels(BaseModel):
    """The contents of a label set file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Labels
    templates: Templates | None = None


def read_label_sets(folder: Path) -> dict[str, NamedLabels]:
    """Every NAME.json in a folder, by name. Raises `LabelSetError`."""
    return {file.stem: read_label_set(file) for file in json_files(folder, "label sets", MAX_SETS, LabelSetError)}


def read_label_set(file: Path) -> NamedLabels:
    """Read one file. Raises `LabelSetError`."""
    try:
        with open_regular(file) as stream:
            return parse_label_set(file, stream)
    except OSError as error:
        raise LabelSetError(f"{file} cannot be read: {error}") from error


def parse_label_set(file: Path, stream: BinaryIO) -> NamedLabels:
    """The contents of an opened file. Raises `LabelSetError`; `OSError` if it cannot be read."""
    if file.stem == DEFAULT or not _NAME.fullmatch(file.stem):
        raise LabelSetError(
            f"{file}: the name of a label set must consist of at most 64 lower-case letters, digits, '.', '_' and "
            f"'-', and must not be {DEFAULT!r}, the name of the bundle's own labels"
        )
    raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise LabelSetError(f"{file} is larger than {MAX_BYTES:,} bytes")
    try:
        return NamedLabels.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        raise LabelSetError(f"{file}: {location + ': ' if location else ''}{first['msg']}") from error
