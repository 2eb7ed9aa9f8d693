"""Accuracy by group, of the worst group and of all images, with intervals. One set of resamples for all, so that
differences are paired by image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from vitrine.models.bootstrap import Array, Bootstrap, Estimate
from vitrine.service.offline.debias.examples import Examples


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

    def __init__(self, examples: Examples, seed: int = 0) -> None:
        self.examples = examples
        self.present = np.unique(examples.cells)
        self._members = (examples.cells[:, None] == self.present).astype(np.float64)  # [n, cells]
        self._bootstrap = Bootstrap(len(examples), seed=seed)
        drawn = self._bootstrap.means(self._members)
        self._drawn = np.where(drawn > 0, drawn, np.nan)  # a resample may have no image of a small group

    def accuracy(self, predicted: NDArray[np.integer]) -> Accuracy:
        """predicted: [n] places in the labels."""
        examples, right = self.examples, self._right(predicted)
        accuracies, samples = self._groups(right)
        groups = [
            Group(
                label=examples.label_names[cell // len(examples.group_names)],
                group=examples.group_names[cell % len(examples.group_names)],
                images=int(self._members[:, number].sum()),
                accuracy=self._interval(float(accuracies[number]), samples[:, number]),
            )
            for number, cell in enumerate(self.present.tolist())
        ]
        return Accuracy(
            images=len(examples),
            average=self._bootstrap.estimate(right),
            worst=self._interval(float(accuracies.min()), np.nanmin(samples, axis=1)),
            worst_group=examples.cell_name(int(self.present[accuracies.argmin()])),
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
        return (predicted == self.examples.labels).astype(np.float64)

    def _groups(self, right: Array) -> tuple[Array, Array]:
        """(accuracy of each cell, and under each resample [R, cells])."""
        members = self._members
        accuracies: Array = (right @ members) / members.sum(0)
        return accuracies, self._bootstrap.means(right[:, None] * members) / self._drawn

    def _interval(self, value: float, samples: Array) -> Estimate:
        return self._bootstrap.interval(value, samples[~np.isnan(samples)])
