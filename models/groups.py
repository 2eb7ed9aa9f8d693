"""Accuracy by group (of one label), of the worst group and of all images, with intervals. One set of resamples for all,
so that differences are paired by image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from vitrine.models.bootstrap import Array, Bootstrap, Estimate


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """n images. Groups are of a cue: present or absent, or one of several."""

    labels: NDArray[np.int64]  # [n] places in `label_names`
    groups: NDArray[np.int64]  # [n] places in `group_names`
    label_names: tuple[str, ...]
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cells(self) -> NDArray[np.int64]:
        """[n] label and group as one number, label * groups + group."""
        return self.labels * len(self.group_names) + self.groups

    def cell_name(self, cell: int) -> str:
        label, group = divmod(cell, len(self.group_names))
        return f"{self.label_names[label]}, {self.group_names[group]}"


class Group(BaseModel):
    """One label in one group."""

    label: str
    group: str
    images: int
    accuracy: Estimate


class Accuracy(BaseModel):
    """Of n images. The worst group is that with the lowest accuracy, in every resample anew."""

    images: int
    average: Estimate
    worst: Estimate
    worst_group: str = Field(description="label and group")
    groups: list[Group]


class Change(BaseModel):
    """From one prediction of the same images to another."""

    average: Estimate
    worst: Estimate


def by_cell(right: NDArray[np.bool_], cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
    """(cells that have images, accuracy of each)."""
    present, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    return present, np.bincount(inverse, right) / counts


class Judge:
    """Compares predictions of the same images."""

    def __init__(self, images: Grouped, seed: int = 0) -> None:
        self.images = images
        self.present = np.unique(images.cells)
        self._members = (images.cells[:, None] == self.present).astype(np.float64)  # [n, cells]
        self._bootstrap = Bootstrap(len(images), seed=seed)
        drawn = self._bootstrap.means(self._members)
        self._drawn = np.where(drawn > 0, drawn, np.nan)  # a resample may have no image of a small group

    def accuracy(self, predicted: NDArray[np.integer]) -> Accuracy:
        """predicted: [n] places in the labels."""
        images, right = self.images, self._right(predicted)
        accuracies, samples = self._groups(right)
        groups = [
            Group(
                label=images.label_names[cell // len(images.group_names)],
                group=images.group_names[cell % len(images.group_names)],
                images=int(self._members[:, number].sum()),
                accuracy=self._interval(float(accuracies[number]), samples[:, number]),
            )
            for number, cell in enumerate(self.present.tolist())
        ]
        return Accuracy(
            images=len(images),
            average=self._bootstrap.estimate(right),
            worst=self._interval(float(accuracies.min()), np.nanmin(samples, axis=1)),
            worst_group=images.cell_name(int(self.present[accuracies.argmin()])),
            groups=groups,
        )

    def change(self, before: NDArray[np.integer], after: NDArray[np.integer]) -> Change:
        """Of average and worst group; the worst group before need not be the one after."""
        rights = self._right(before), self._right(after)
        (old, old_samples), (new, new_samples) = map(self._groups, rights)
        samples = np.nanmin(new_samples, axis=1) - np.nanmin(old_samples, axis=1)
        return Change(
            average=self._bootstrap.estimate(rights[1] - rights[0]),
            worst=self._interval(float(new.min() - old.min()), samples),
        )

    def _right(self, predicted: NDArray[np.integer]) -> Array:
        return (predicted == self.images.labels).astype(np.float64)

    def _groups(self, right: Array) -> tuple[Array, Array]:
        """(accuracy of each cell, and under each resample [R, cells])."""
        members = self._members
        accuracies: Array = (right @ members) / members.sum(0)
        return accuracies, self._bootstrap.means(right[:, None] * members) / self._drawn

    def _interval(self, value: float, samples: Array) -> Estimate:
        return self._bootstrap.interval(value, samples[~np.isnan(samples)])
