"""Where some features fire, and how strongly, in the groups of a half."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import Trace
from vitrine.service.engine.sources import SourceGraphs
from vitrine.service.offline.debias.pictures import Pictures

IMAGES = 32  # of each cell, the first ones: means of what fires are known well enough
SHARE = 0.5  # of the tokens' largest mean activation, from which on a token is one of those where a feature fires


@dataclass(frozen=True)
class Firing:
    """Of one feature, about the mean over cells (label, group), each counted alike: a group that is rare in the data
    has its part."""

    tokens: tuple[int, ...]  # where it fires most in the cell where it does so most
    between: float  # mean activation there: half-way between the groups with the cue and those without


def activations(trace: Trace, features: Sequence[tuple[int, int]]) -> Array:
    """[features, T] of one image; 0 where a feature is not active."""
    assert trace.indices is not None
    assert trace.values is not None
    return np.stack(
        [np.where(trace.indices[layer] == index, trace.values[layer], 0).sum(-1) for layer, index in features]
    )


def firing(
    graphs: SourceGraphs,
    pictures: Pictures,
    images: Iterable[str],
    cells: NDArray[np.int64],
    features: Sequence[tuple[int, int]],
) -> list[Firing]:
    """Of each of the features (layer, index), over images with their cells [n]; there is at least one."""
    present, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    sums: Array | None = None
    for image, cell in zip(images, inverse.tolist(), strict=True):
        here = activations(graphs.trace(pictures.pixels(image)), features)
        if sums is None:
            sums = np.zeros((len(present), *here.shape))
        sums[cell] += here
    assert sums is not None
    return of_means(sums / counts[:, None, None])


def of_means(means: Array) -> list[Firing]:
    """Of mean activations [cells, features, T]; abs_topk's features may have negative ones."""
    found = []
    for feature in range(means.shape[1]):
        strongest = np.abs(means[:, feature]).max(0)  # [T]
        tokens = np.flatnonzero(strongest >= SHARE * strongest.max()) if strongest.max() > 0 else np.zeros(1, int)
        found.append(Firing(tuple(tokens.tolist()), float(means[:, feature, tokens].mean())))
    return found


def some_of_each(cells: NDArray[np.int64], count: int = IMAGES) -> NDArray[np.int64]:
    """Which of n images, with their cells [n], are the first of theirs."""
    return np.sort(np.concatenate([np.flatnonzero(cells == cell)[:count] for cell in np.unique(cells)]))
