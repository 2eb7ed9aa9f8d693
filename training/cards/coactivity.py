"""Features that fire together at [CLS]: Jaccard index of the sets of images on which each fires."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

MIN_TOGETHER = 5  # images; fewer are not meaningful
_BLOCK = 512  # features compared with all others at once


class CoactiveFeature(NamedTuple):
    """A feature (index over all layers' features) and its Jaccard index."""

    feature: int
    jaccard: float


def coactive(
    indices: NDArray[np.integer], values: NDArray[np.floating], features: int, most: int
) -> list[list[CoactiveFeature]]:
    """For each of L * F features, the `most` features with the largest Jaccard index, best first.

    Args:
        indices, values: codes at [CLS] [C, L, k]; places with value 0 are unused.
    """
    images, layers, _ = indices.shape
    image, layer, place = np.nonzero(values)
    columns = layer * features + indices[image, layer, place]
    fires = sparse.csc_array(
        (np.ones(len(columns), np.int32), (image, columns)), shape=(images, layers * features), dtype=np.int32
    )
    counts = np.asarray(fires.sum(axis=0)).ravel()
    result: list[list[CoactiveFeature]] = []
    for start in range(0, layers * features, _BLOCK):
        together = (fires[:, start : start + _BLOCK].T @ fires).tocsr()
        for row in range(together.shape[0]):
            entries = slice(together.indptr[row], together.indptr[row + 1])
            result.append(_best(start + row, together.indices[entries], together.data[entries], counts, most))
    return result


def _best(
    feature: int, others: NDArray[np.integer], both: NDArray[np.integer], counts: NDArray[np.integer], most: int
) -> list[CoactiveFeature]:
    eligible = (both >= MIN_TOGETHER) & (others != feature)
    others, both = others[eligible], both[eligible]
    jaccard = both / (counts[feature] + counts[others] - both)
    order = np.lexsort((others, -jaccard))[:most]
    return [CoactiveFeature(int(others[at]), float(jaccard[at])) for at in order]
