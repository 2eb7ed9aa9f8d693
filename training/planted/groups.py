"""Accuracy by group (class and cue), of the worst group and on average, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitrine.training.evaluation.bootstrap import Bootstrap
from vitrine.training.evaluation.results import Estimate, Part
from vitrine.training.planted.data import Row


class GroupAccuracy(Part):
    """Shares of images whose label is the first of the two classes' labels."""

    groups: dict[str, Estimate]  # "cat, red frame"
    worst: Estimate  # the smallest of these, in every resample anew
    average: Estimate  # mean over groups, which are of one size


def group_accuracy(rows: Sequence[Row], correct: NDArray[np.bool_], seed: int = 0) -> GroupAccuracy:
    """correct: [n], in the order of `rows`."""
    names = [f"{row.label}, {row.group}" for row in rows]
    groups = list(dict.fromkeys(names))
    member = np.array([[name == group for group in groups] for name in names], np.float64)  # [n, groups]
    bootstrap = Bootstrap(len(rows), seed=seed)
    samples = bootstrap.means(member * correct[:, None]) / bootstrap.means(member)
    values = (member * correct[:, None]).sum(0) / member.sum(0)
    return GroupAccuracy(
        groups={
            group: bootstrap.interval(float(value), samples[:, place])
            for place, (group, value) in enumerate(zip(groups, values, strict=True))
        },
        worst=bootstrap.interval(float(values.min()), samples.min(1)),
        average=bootstrap.interval(float(values.mean()), samples.mean(1)),
    )
