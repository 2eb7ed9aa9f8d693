"""The columns of an attribution graph, and rows of edges that hold only the columns that can reach them. numpy only.

A row is all edges into one node; its columns are, in this order,

    features     every active (layer, index, token)          columns [0, L T k), those with activation 0 unused
    embeddings   every token                                  columns [L T k, L T k + T)
    errors       every layer and token                        the last L T columns

What flows into a feature was written below it: of a CLT's feature by all layers below, of a residual SAE's by the one
layer below. So a row's *span* is a run of layers. Of B/16 with 11 SAEs and k 160 there are 350,000 columns, 32,000 of
them in a span: 1,000 features that were followed take 127 MB in float32, in place of 1.4 GB. Rows of one layer have one
span, and lie in one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array


@dataclass(frozen=True)
class Shape:
    """Of the columns: L layers, T tokens, k places."""

    layers: int
    tokens: int
    places: int

    @property
    def features(self) -> int:
        """Number of columns of features: those of the embeddings follow."""
        return self.layers * self.tokens * self.places

    @property
    def errors(self) -> int:
        """The first column of an error."""
        return self.features + self.tokens

    @property
    def columns(self) -> int:
        return self.errors + self.layers * self.tokens

    def layer_of(self, columns: NDArray[np.integer]) -> NDArray[np.integer]:
        """Layers of columns of features."""
        return columns // (self.tokens * self.places)

    def token_of(self, columns: NDArray[np.integer]) -> NDArray[np.integer]:
        """Tokens of columns of any kind."""
        of_feature = columns // self.places % self.tokens if self.places else columns
        return np.where(columns < self.features, of_feature, (columns - self.features) % self.tokens)

    def span(self, first: int, stop: int) -> Span:
        """The features and errors of layers [first, stop), and all embeddings."""
        of_layer = self.tokens * self.places
        return Span(
            self.columns,
            slice(first * of_layer, stop * of_layer),
            slice(self.features, self.errors),
            slice(self.errors + first * self.tokens, self.errors + stop * self.tokens),
        )


class Span(NamedTuple):
    """Some of the columns, in their order."""

    columns: int  # of all
    features: slice
    embeddings: slice
    errors: slice

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        return self.features, self.embeddings, self.errors

    def cut(self, values: NDArray[Any]) -> NDArray[Any]:
        """Those of [columns] in the span [width]."""
        return np.concatenate([values[part] for part in self.slices])

    def add(self, values: Array, total: Array) -> None:
        """Add values [width] to a total [columns], in place."""
        start = 0
        for part in self.slices:
            stop = start + part.stop - part.start
            total[part] += values[start:stop]
            start = stop

    def places(self, columns: NDArray[np.integer]) -> NDArray[np.integer]:
        """Where columns lie in the span; -1: nowhere."""
        places = np.full(len(columns), -1)
        start = 0
        for part in self.slices:
            inside = (columns >= part.start) & (columns < part.stop)
            places[inside] = columns[inside] - part.start + start
            start += part.stop - part.start
        return places


class Rows(NamedTuple):
    """Rows of the features of one layer."""

    span: Span
    numbers: NDArray[np.integer]  # [m] which of the graph's rows these are
    shares: Array  # [m, width] edges, divided by the sum of their sizes


class GrowingRows:
    """Rows of one layer, to which more are added. What it gave before stays as it was."""

    def __init__(self, span: Span) -> None:
        width = sum(part.stop - part.start for part in span.slices)
        self.rows = Rows(span, np.empty(0, np.int64), np.empty((0, width), np.float32))
        self._room = self.rows.shares

    def add(self, numbers: NDArray[np.integer], shares: Array) -> None:
        """numbers [m], shares [m, width]."""
        count = len(self.rows.numbers)
        if count + len(numbers) > len(self._room):
            larger = np.empty(
                (2 * (count + len(numbers)), shares.shape[1]), np.float32
            )  # pages that are not used are free
            larger[:count] = self.rows.shares
            self._room = larger
        self._room[count : count + len(numbers)] = shares
        all_numbers = np.concatenate([self.rows.numbers, numbers])
        self.rows = Rows(self.rows.span, all_numbers, self._room[: len(all_numbers)])
