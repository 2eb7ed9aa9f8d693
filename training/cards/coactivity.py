"""Features that fire together at [CLS]: Jaccard's index of the sets of images on which each fires."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

LEAST_TOGETHER = 5  # images; fewer say nothing
_BLOCK = 512  # features against all others at once


class Together(NamedTuple):
    """A feature (its place among all layers') and Jaccard's index."""

    feature: int
    jaccard: float


def coactive(
    indices: NDArray[np.integer], values: NDArray[np.floating], features: int, most: int
) -> list[list[Together]]:
    """For each of L * F features the `most` it fires with most often, best first.

    Args:
        indices, values: codes at [CLS] [C, L, k]; places with value 0 are not in use.
    """
    images, layers, _ = indices.shape
    image, layer, place = np.nonzero(values)
    columns = layer * features + indices[image, layer, place]
    fires = sparse.csc_array(
        (np.ones(len(columns), np.int32), (image, columns)), shape=(images, layers * features), dtype=np.int32
    )
    counts = np.asarray(fires.sum(axis=0)).ravel()
    found: list[list[Together]] = []
    for start in range(0, layers * features, _BLOCK):
        together = (fires[:, start : start + _BLOCK].T @ fires).tocsr()
        for row in range(together.shape[0]):
            here = slice(together.indptr[row], together.indptr[row + 1])
            found.append(_best(start + row, together.indices[here], together.data[here], counts, most))
    return found


def _best(
    feature: int, others: NDArray[np.integer], both: NDArray[np.integer], counts: NDArray[np.integer], most: int
) -> list[Together]:
    enough = (both >= LEAST_TOGETHER) & (others != feature)
    others, both = others[enough], both[enough]
    jaccard = both / (counts[feature] + counts[others] - both)
    order = np.lexsort((others, -jaccard))[:most]
    return [Together(int(others[at]), float(jaccard[at])) for at in order]
