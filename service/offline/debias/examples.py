"""Images with label and group, in two halves: what is proposed is found on one, and judged on the other alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrine.models.files.names import printable
from vitrine.models.groups import Grouped
from vitrine.models.inputs.classes import by_class, class_name
from vitrine.models.inputs.imagenet import class_label
from vitrine.models.inputs.opening import open_inputs
from vitrine.models.inputs.source import Files
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.table import Row

# Names of two splits that are taken for the halves, in this order of preference; else halves are drawn.
SPLITS = (("find", "held_out"), ("val", "test"), ("1", "2"))  # the last: Waterbirds' numbers
LEAST = 8  # images of a half, of each label


@dataclass(frozen=True, kw_only=True)
class Examples(Grouped):
    """n images in two halves."""

    images: tuple[str, ...]  # paths below the folder
    finding: NDArray[np.bool_]  # [n] of the half that proposes; the others decide

    def only(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> Examples:
        """Some of them."""
        images = tuple(np.array(self.images, object)[chosen].tolist())
        return replace(
            self, images=images, labels=self.labels[chosen], groups=self.groups[chosen], finding=self.finding[chosen]
        )

    def with_groups(self, groups: NDArray[np.int64], names: tuple[str, ...]) -> Examples:
        """The same in other groups. Raises `DebiasError` unless two groups can be compared in some class."""
        grouped = replace(self, groups=groups, group_names=names)
        grouped.check_groups()
        return grouped

    def check_groups(self) -> None:
        """Raise `DebiasError` unless there are two groups, and one of them is seen with more than one label."""
        for half, name in ((self.finding, "finding"), (~self.finding, "held-out")):
            present = np.unique(self.groups[half])
            if len(present) < 2:
                raise DebiasError(
                    f"all {half.sum():,} images of the {name} half belong to one group, {self._group(present)}; "
                    "images with the cue and without it are needed"
                )
            if not any(len(np.unique(self.labels[half & (self.groups == group)])) > 1 for group in present):
                raise DebiasError(
                    f"every group of the {name} half has only one label; the column of groups must hold only the cue "
                    "(Waterbirds' `place`), not label and cue together"
                )

    def _group(self, present: NDArray[np.int64]) -> str:
        return printable(self.group_names[present[0]]) if len(present) else "none"


def of_table(rows: Sequence[Row], labels: Sequence[str] | None, seed: int, splits: tuple[str, str] | None) -> Examples:
    """The images of a table.

    Args:
        labels: in this order; default: those of the table.
        splits: values of the column of splits that are the halves, finding first. Default: one of `SPLITS`, or else
            halves drawn at random, each with its part of every label and group.

    Raises:
        DebiasError: a half has too few images of a label, or the splits are not there.
    """
    label_names = tuple(labels or sorted({row.label for row in rows}))
    halves = _splits(rows, splits)
    if halves is not None:
        rows = [row for row in rows if row.split in halves]
    group_names = tuple(sorted({row.group for row in rows if row.group is not None})) or ("all",)
    examples = Examples(
        images=tuple(row.image for row in rows),
        labels=np.array([label_names.index(row.label) for row in rows], np.int64),
        groups=np.array([0 if row.group is None else group_names.index(row.group) for row in rows], np.int64),
        finding=np.array([halves is not None and row.split == halves[0] for row in rows], bool),
        label_names=label_names,
        group_names=group_names,
    )
    if halves is None:
        examples = replace(examples, finding=draw_half(examples.cells, seed))
    check_halves(examples)
    return examples


def of_folders(root: Path, labels: Sequence[str] | None, seed: int) -> Examples:
    """The images of a folder with one folder a label; no groups yet. Raises `DebiasError`, `InputError`."""
    source = open_inputs(str(root))
    names, source = by_class(source) if isinstance(source, Files) else ((), source)
    if not names or not isinstance(source, Files):
        raise DebiasError(
            f"{root} does not have one folder per label, and there is no table of the images; give --groups FILE"
        )
    rows = [Row(path, class_label(class_name(path)), None, None) for path in source.paths]
    if labels is not None and (unknown := sorted({row.label for row in rows} - set(labels))):
        raise DebiasError(
            f"{root} has a folder {printable(unknown[0])!r}, which is not one of the labels; rename it, or add it to "
            "--labels"
        )
    return of_table(rows, labels, seed, None)


def draw_half(cells: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """[n] which images propose: half of every cell, drawn at random."""
    generator = np.random.default_rng(seed)
    finding = np.zeros(len(cells), bool)
    for cell in np.unique(cells):
        members = generator.permutation(np.flatnonzero(cells == cell))
        finding[members[: (len(members) + 1) // 2]] = True
    return finding


def check_halves(examples: Examples) -> None:
    """Raise `DebiasError` if a half has too few images of a label, or there is one label alone."""
    if len(present := np.unique(examples.labels)) < 2:
        name = examples.label_names[present[0]] if len(present) else "none"
        raise DebiasError(f"all images have one label, {printable(name)}; images of at least two labels are needed")
    for half, name in ((examples.finding, "finding"), (~examples.finding, "held-out")):
        for label in present:
            if (count := int((half & (examples.labels == label)).sum())) < LEAST:
                raise DebiasError(
                    f"the {name} half has {count} images of {printable(examples.label_names[label])!r}; at least "
                    f"{LEAST} of every label are needed"
                )


def _splits(rows: Sequence[Row], asked: tuple[str, str] | None) -> tuple[str, str] | None:
    present = {row.split for row in rows}
    if asked is not None:
        if missing := [name for name in asked if name not in present]:
            there = ", ".join(sorted(name for name in present if name is not None)) or "no column of splits"
            raise DebiasError(f"--splits names {printable(missing[0])}, but the table has {there}")
        return asked
    return next((pair for pair in SPLITS if present.issuperset(pair)), None)
