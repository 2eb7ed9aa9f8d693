"""Accuracy by group (class and cue), of the worst group and on average, with bootstrap intervals.

Images are resampled within their groups, whose sizes are a choice and no accident. G groups, R resamples, n images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitrine.training.evaluation.bootstrap import Bootstrap
from vitrine.training.evaluation.results import Estimate, Part
from vitrine.training.planted.data import Row

Array = NDArray[np.float64]


class GroupAccuracy(Part):
    """Shares of images whose label is the first of the two classes' labels."""

    groups: dict[str, Estimate]  # "cat, red frame"
    worst: Estimate  # the smallest of these, in every resample anew
    average: Estimate  # mean over groups


def group_accuracy(rows: Sequence[Row], correct: NDArray[np.bool_], seed: int = 0) -> GroupAccuracy:
    """correct: [n], in the order of `rows`."""
    found = [(name, *_resampled(correct[member], seed + place)) for place, (name, member) in enumerate(_groups(rows))]
    values, samples = np.array([value for _, value, _ in found]), np.stack([part for _, _, part in found])
    return GroupAccuracy(
        groups={name: _estimate(value, part) for name, value, part in found},
        worst=_estimate(values.min(), samples.min(0)),
        average=_estimate(values.mean(), samples.mean(0)),
    )


def change(
    rows: Sequence[Row], before: NDArray[np.bool_], after: NDArray[np.bool_], *, worst: bool, seed: int = 0
) -> Estimate:
    """How much the accuracy of the worst group, or the average over groups, changes; on the same images."""
    values, samples = [], []  # before and after: [G], [G, R]
    for correct in (before, after):
        found = [_resampled(correct[member], seed + place) for place, (_, member) in enumerate(_groups(rows))]
        values.append(np.array([value for value, _ in found]))
        samples.append(np.stack([part for _, part in found]))
    of = np.min if worst else np.mean
    return _estimate(of(values[1]) - of(values[0]), of(samples[1], axis=0) - of(samples[0], axis=0))


def _groups(rows: Sequence[Row]) -> list[tuple[str, NDArray[np.bool_]]]:
    """The groups, and [n] which images are in each."""
    names = np.array([f"{row.label}, {row.group}" for row in rows])
    return [(name, names == name) for name in dict.fromkeys(names.tolist())]


def _resampled(correct: NDArray[np.bool_], seed: int) -> tuple[float, Array]:
    """Accuracy of a group, and in every resample [R]; the same resamples for the same seed and size."""
    return float(correct.mean()), Bootstrap(len(correct), seed=seed).means(correct.astype(np.float64))


def _estimate(value: float, samples: Array) -> Estimate:
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(value=float(value), low=float(low), high=float(high))
