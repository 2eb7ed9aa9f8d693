"""From what the data call their classes to labels: a recipe's `data.classes`, else ImageNet's names of WordNet ids."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitrine.models.files.names import printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.imagenet import class_label, unknown_ids
from vitrine.models.inputs.lists import read_labels
from vitrine.training.data.images import DataError, Images
from vitrine.training.recipes.recipe import DataSection

NAMED = 5  # classes that a message names


def class_names(classes: Sequence[str], given: Mapping[str, str] | None) -> tuple[str, ...]:
    """The label of each class: that in `given` (`data.classes`), else ImageNet's if it is a WordNet id, else itself.

    Two classes may have one label: their images are then of one class.
    """
    return tuple((given or {}).get(name, class_label(name)) for name in classes)


def recipe_labels(section: DataSection, data_root: Path) -> tuple[str, ...] | None:
    """The labels that a recipe names, itself or in a file; None if it names none. Raises `DataError`."""
    if section.labels_file is None:
        return section.labels
    try:
        return read_labels(data_root / section.labels_file)
    except InputError as error:
        raise DataError(f"data.labels_file: {error}") from error


def labels_for(data: Images, labels: Sequence[str] | None) -> tuple[str, ...]:
    """The labels of a zero-shot classification of `data`: those given, else its own classes; () if it has none either.

    Raises `DataError` for a class that is no label.
    """
    if labels is None:
        if unknown := unknown_ids(data.classes):
            raise DataError(
                f"{data.title}: {_some(unknown)}: WordNet ids that are not among ImageNet's 1,000 classes; give each "
                f'a label in data.classes, such as {{ "{unknown[0]}" = "..." }}'
            )
        return tuple(dict.fromkeys(data.classes))
    if unknown := sorted(set(data.classes) - set(labels)):
        raise DataError(
            f"{data.title}: classes that are not among the labels: {_some(unknown)}. Add them to the labels, or give "
            f"each class a label in data.classes, such as "
            f'{{ "{printable(unknown[0], 40)}" = "{printable(labels[0], 40)}" }}; if these folders are not classes, '
            f'use {{ kind = "folder", path = ..., classes = false }}'
        )
    return tuple(labels)


def check_classes(section: DataSection, labels: Sequence[str], *sources: Images) -> None:
    """Raises `DataError` if `data.classes` names a class that none of the sources has, or a label that is none.

    labels: of the zero-shot classification; they count only if the recipe names them, not if val's classes do.
    """
    has_labels = section.labels is not None or section.labels_file is not None
    found = {name for data in sources for name in data.listing.classes}
    for name, label in (section.classes or {}).items():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the classes are the names of the folders"
            where = " or ".join(dict.fromkeys(data.title for data in sources))
            raise DataError(f"data.classes: {printable(name)!r} is not a class of {where}; {hint}")
        if has_labels and label not in labels:
            near = difflib.get_close_matches(label, labels, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"data.classes: {printable(label)!r}, given for {printable(name)!r}, is not a label of the recipe{hint}"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(name, 80) for name in names[:NAMED]) + more
