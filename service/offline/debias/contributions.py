"""What every feature gave to one label rather than to another, or along a direction of the final stream, image by
image, by source accounts.

Kept by image as the features that are active, since most are not: B/32 with 6,144 features a layer would take 300 kB
an image if all were kept. Features of all layers are numbered through: key = layer * F + index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import Sources
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.engine.sources import SourceGraphs
from vitrine.service.offline.debias.pictures import Pictures


@dataclass(frozen=True)
class Contributions:
    """Of n images, to one logit difference or along one direction each."""

    keys: list[NDArray[np.int64]]  # [active] of each image
    values: list[Array]  # [active] logits, or the stream's units
    features: int  # of a layer
    layers: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def count(self) -> int:
        """Keys there are."""
        return self.layers * self.features

    def only(self, chosen: NDArray[np.integer]) -> Contributions:
        """Of some images."""
        keys, values = ([part[number] for number in chosen.tolist()] for part in (self.keys, self.values))
        return Contributions(keys, values, self.features, self.layers)

    def moments(self, cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array, Array]:
        """(cells that have images, mean, variance [cells, keys]) over the images of each cell [n]."""
        present, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
        sums, squares = (np.zeros((len(present), self.count)) for _ in range(2))
        for cell, keys, values in zip(inverse.tolist(), self.keys, self.values, strict=True):
            sums[cell, keys] += values  # an image has a key once
            squares[cell, keys] += values.astype(np.float64) ** 2
        means = sums / counts[:, None]
        unbiased = counts / np.maximum(counts - 1, 1)
        return present, means, np.maximum(squares / counts[:, None] - means**2, 0) * unbiased[:, None]

    def dense(self, keys: NDArray[np.int64]) -> Array:
        """[n, len(keys)] of some features; 0 where one is not active."""
        places = np.full(self.count, -1)
        places[keys] = np.arange(len(keys))
        table = np.zeros((len(self), len(keys)))
        for row, active, values in zip(table, self.keys, self.values, strict=True):
            wanted = places[active] >= 0
            row[places[active[wanted]]] = values[wanted]
        return table


def contributions(
    graphs: SourceGraphs, pictures: Pictures, images: Iterable[str], directions: Sequence[Array]
) -> Contributions:
    """directions: [D] of each image, in embedding space: a label's embedding less another's."""
    each = zip(images, directions, strict=True)
    return _of((graphs.target(pictures.pixels(image), direction[None])[1] for image, direction in each), graphs.bundle)


def contributions_along(
    graphs: SourceGraphs, pictures: Pictures, images: Iterable[str], vector: Sequence[float]
) -> Contributions:
    """vector: [d] of the stream at [CLS] after the last block."""
    row = np.array(vector)
    traces = (graphs.trace(pictures.pixels(image)) for image in images)
    return _of((graphs.of_stream(trace, row) for trace in traces), graphs.bundle)


def _of(found: Iterable[Sources], bundle: Bundle) -> Contributions:
    features, keys, values = bundle.manifest.shape.features, [], []
    for sources in found:
        layers, indices, totals = sources.by_feature()
        keys.append((layers * features + indices).astype(np.int64))
        values.append(totals)
    return Contributions(keys, values, features, bundle.manifest.shape.layers)
