"""Named label sets: files NAME.json in a folder, {"labels": [...], "templates": [...]}; templates are optional.

A bundle may contain some (label_sets/NAME.json, and NAME.npy with their embeddings, computed at export), and the
operator of the service may add a folder of others. `default` is the bundle's own set and is not allowed as a file name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vitrine.models.errors import VitrineError

DEFAULT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class LabelSetError(VitrineError, ValueError):
    """A label set cannot be used; the message names the file and the problem."""


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(labels)) < len(labels):
        duplicate = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"labels must differ from one another, and {duplicate!r} is there twice")
    return labels


class NamedLabels(BaseModel):
    """The contents of a label set file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: Annotated[
        tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...],
        Field(min_length=1),
        AfterValidator(_distinct),
    ]
    templates: Annotated[tuple[Annotated[str, StringConstraints(pattern=r"\{\}")], ...], Field(min_length=1)] | None = (
        None
    )


def read_label_sets(folder: Path) -> dict[str, NamedLabels]:
    """Every NAME.json in a folder, by name. Raises `LabelSetError`."""
    if not folder.is_dir():
        raise LabelSetError(f"{folder} is no directory of label sets")
    return {file.stem: read_label_set(file) for file in sorted(folder.glob("*.json"))}


def read_label_set(file: Path) -> NamedLabels:
    """Read one file. Raises `LabelSetError`."""
    if file.stem == DEFAULT or not _NAME.fullmatch(file.stem):
        raise LabelSetError(
            f"{file}: a label set's name has small letters, digits, '.', '_' and '-', at most 64 of them, and is not "
            f"{DEFAULT!r}, which is the bundle's own"
        )
    try:
        return NamedLabels.model_validate_json(file.read_bytes())
    except OSError as error:
        raise LabelSetError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        raise LabelSetError(f"{file}: {location + ': ' if location else ''}{first['msg']}") from error
