"""Directions of the final stream at [CLS] that tell the groups apart: what no few features do alone.

Of each group, with m[y, g] the mean stream of label y with the cue and without, each label counted alike:

    v       = mean over labels of m[y, with] - m[y, without]        the group's direction, of length 1 then
    between = <mean over the cells (label, group) of m[y, g], v>

An edit sets the stream's part along v to `between`, or a little beyond, in every image: the means of the groups are
then the same along every direction (mean projection; Haghighatkhah et al., EMNLP 2022), whether the cue's presence or
its absence counts. What writes along v is said by its source account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array

DIGITS = 6  # of a component: what float32 has


@dataclass(frozen=True)
class Direction:
    """Of one group."""

    vector: tuple[float, ...]  # [d] of length 1
    between: float
    group: int  # -1: of none
    length: float  # of the difference of means


def cell_mean(streams: Array, labels: NDArray[np.int64], groups: NDArray[np.int64]) -> Array:
    """[d] the mean of n streams [n, d] over cells (label, group), each counted alike."""
    cells = sorted(set(zip(labels.tolist(), groups.tolist(), strict=True)))
    mean: Array = np.mean(
        [streams[(labels == label) & (groups == group)].astype(np.float64).mean(0) for label, group in cells], 0
    )
    return mean


def directions(
    streams: Array, labels: NDArray[np.int64], groups: NDArray[np.int64], compared: Sequence[int]
) -> list[Direction]:
    """Of each of the groups `compared` with the others, from n images: streams [n, d], their labels and groups [n].

    A group that no label has beside others has none."""
    rows, middle = streams.astype(np.float64), cell_mean(streams, labels, groups)
    found = []
    for group in compared:
        differences = [
            rows[(labels == label) & (groups == group)].mean(0) - rows[(labels == label) & (groups != group)].mean(0)
            for label in np.unique(labels[groups == group]).tolist()
            if (groups[labels == label] != group).any()
        ]
        if differences and (difference := np.mean(differences, 0)).any():
            found.append(_along(difference, middle, group))
    return found


def drawn(directions: Sequence[Direction], middle: Array, generator: np.random.Generator) -> list[Direction]:
    """As many directions drawn at random, of the same lengths, which are set to what the mean stream [d] has along
    them."""
    rows = generator.standard_normal((len(directions), len(middle)))
    lengths = np.array([one.length for one in directions])
    rows *= (lengths / np.linalg.norm(rows, axis=1))[:, None]
    return [_along(row, middle, -1) for row in rows]


def _along(row: Array, middle: Array, group: int) -> Direction:
    length = float(np.linalg.norm(row))
    vector = np.round(row / length, DIGITS)
    return Direction(tuple(vector.tolist()), float(middle @ vector / np.linalg.norm(vector)), group, length)
