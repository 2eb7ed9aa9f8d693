"""The circuit of a logit: which features made the features that made it. numpy only.

A graph over one image's trace: of a CLT (`models.account.sources`), or of residual SAEs (`models.account.residual`).
Its nodes are active features (layer, index, token), the embedding and the errors of every token
(`models.account.edges`), and the target, a logit or a difference of two. An edge is the direct effect of a node on
another's *pre-activation*, or on the logit, with what the account holds fast: the source account of a feature's encoder
row. So the edges into a node, decoder biases and constants add up to its pre-activation, exactly. Embeddings and errors
are leaves.

Influence as circuit-tracer defines it (attribution graphs, Ameisen et al. 2025): the |edges| into each node are divided
by their sum, A; a node's influence on the target is the sum over all paths, the row of the target in A + A^2 + ... A is
strictly lower-triangular, by layers, so that one substitution gives it.

A graph of all active features has 10^5 nodes and one backward pass for each. It is built from the target instead: the
features that have most influence by what is known so far are expanded next, an eighth of what is known at once, until
the budget is spent.
Whatever is not expanded is a leaf, too, and its influence is told as a share. The leaves' influences sum to 1. What is
listed of such a graph: `models.account.pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.edges import GrowingRows, Rows, Shape, Span
from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import Sources

BATCH = 16  # features expanded at once
ANEW = 8  # influences are computed anew when an 8th more is expanded, a batch at least: each time costs all edges


@dataclass(frozen=True)
class Limits:
    """When the expansion ends, whichever comes first."""

    nodes: int  # features expanded at most
    seconds: float
    left_out: float = 0.01  # share of the influence that ends at features which were not expanded


@dataclass(frozen=True)
class AttributionGraph:
    """What was expanded: the edges into the target, and into each of the `expanded` features.

    They are stored as shares, divided by the sum of their sizes, and that sum, `gross`; 0 where nothing flows in.
    """

    shape: Shape
    indices: NDArray[np.integer]  # [L, T, k] of the features
    activations: Array  # [L, T, k]
    target: Array  # [columns] shares of the target
    target_gross: float
    expanded: NDArray[np.integer]  # [n] columns
    gross: Array  # [n]
    rows: Mapping[int, Rows]  # of the expanded features, by their layer

    @cached_property
    def influence(self) -> Array:
        """[columns]: of every column on the target."""
        influence = np.abs(self.target)
        for layer in sorted(self.rows, reverse=True):
            span, numbers, shares = self.rows[layer]
            span.add(influence[self.expanded[numbers]] @ np.abs(shares), influence)
        return influence

    def edges(self, numbers: NDArray[np.integer], columns: NDArray[np.integer]) -> Array:
        """[numbers, columns]: the edges into expanded features, by their numbers, from some columns."""
        edges = np.zeros((len(numbers), len(columns)))
        place = np.full(len(self.expanded), -1)
        place[numbers] = np.arange(len(numbers))
        for span, of_rows, shares in self.rows.values():
            wanted, places = np.flatnonzero(place[of_rows] >= 0), span.places(columns)
            inside = np.flatnonzero(places >= 0)
            edges[np.ix_(place[of_rows[wanted]], inside)] = shares[np.ix_(wanted, places[inside])]
        return edges * self.gross[numbers, None]

    @cached_property
    def leaves(self) -> Leaves:
        """Where the influence ends."""
        shape, influence = self.shape, self.influence
        waiting = influence[: shape.features].copy()
        waiting[self.expanded] = 0
        ends = (influence[shape.features : shape.errors], influence[shape.errors :], waiting)
        embeddings, errors, left_out = (float(end.sum(dtype=np.float64)) for end in ends)
        constant = influence[self.expanded[self.gross == 0]].sum(dtype=np.float64)  # biases and constants made them
        return Leaves(embeddings, errors, left_out, float(constant))

    @property
    def completeness(self) -> float:
        """circuit-tracer's: of all nodes weighted by influence, the part of what flows into them that no error made."""
        weights = self.influence[self.expanded]
        not_error = 1 - np.abs(self.target[self.shape.errors :]).sum(), np.empty(len(weights), np.float32)
        for span, numbers, shares in self.rows.values():
            errors = span.errors.stop - span.errors.start
            not_error[1][numbers] = 1 - np.abs(shares[:, shares.shape[1] - errors :]).sum(1)
        return float((not_error[0] + (not_error[1] * weights).sum()) / (1 + weights.sum()))


@dataclass(frozen=True)
class Leaves:
    """Shares of the target's influence by where they end; they sum to 1."""

    embeddings: float
    errors: float
    left_out: float  # features that were not expanded
    constant: float  # features that only biases and constants made

    @property
    def replacement(self) -> float:
        """circuit-tracer's replacement score: embeddings / (embeddings + errors), over all paths."""
        ends = self.embeddings + self.errors
        return self.embeddings / ends if ends else 1.0


class Wanted(NamedTuple):
    """Features to be expanded next, [n] each."""

    layers: NDArray[np.integer]
    tokens: NDArray[np.integer]
    indices: NDArray[np.integer]
    activations: Array


class Coded(Protocol):
    """What is read of a trace."""

    @property
    def indices(self) -> NDArray[np.integer] | None: ...  # [L, T, k] active features; None: no dictionary

    @property
    def values(self) -> Array | None: ...  # [L, T, k] their activations, 0 in unused places


class Expansion:
    """Builds the graph of one target from its source account, the most influential features first: `add` the accounts
    of what is `wanted`, until nothing is."""

    def __init__(self, trace: Coded, target: Sources, limits: Limits) -> None:
        assert trace.indices is not None  # without a dictionary there are no features to expand
        assert trace.values is not None
        self._limits, self._begun = limits, perf_counter()
        self.indices, self.values = trace.indices, trace.values
        self.shape = Shape(*self.values.shape)
        span, (shares,), (self._target_gross,) = self._shares([target], self.shape.layers)
        self._target = np.zeros(self.shape.columns, shares.dtype)
        span.add(shares, self._target)
        self._rows: dict[int, GrowingRows] = {}
        self._gross = np.empty(limits.nodes)
        self._expanded = np.empty(limits.nodes, np.int64)
        self._count = 0
        self._chosen: NDArray[np.integer] = self._expanded[:0]  # being expanded
        self._next: NDArray[np.integer] = self._expanded[:0]  # to be expanded after them
        self.graph = self._built()  # as far as it is built

    def _built(self) -> AttributionGraph:
        return AttributionGraph(
            self.shape,
            self.indices,
            self.values,
            self._target,
            float(self._target_gross),
            self._expanded[: self._count],
            self._gross[: self._count],
            {layer: rows.rows for layer, rows in self._rows.items()},
        )

    def wanted(self) -> Wanted | None:
        """What to expand next; None: the budget is spent, or little enough is left out."""
        left = self._limits.nodes - self._count
        if left <= 0 or perf_counter() - self._begun >= self._limits.seconds:
            return None
        if not len(self._next):
            self._next = self._most_influential(min(left, max(BATCH, self._count // ANEW)))
            if not len(self._next):
                return None
        chosen, self._next = self._next[:BATCH], self._next[BATCH:]
        self._chosen = chosen
        names = self.shape.layer_of(chosen), self.shape.token_of(chosen), self.indices.ravel()[chosen]
        return Wanted(*names, self.values.ravel()[chosen])

    def _most_influential(self, most: int) -> NDArray[np.integer]:
        """Columns of features that were not expanded, at most so many; none if little enough is left out."""
        graph = self.graph
        waiting = np.where(self.values.ravel() != 0, graph.influence[: self.shape.features], 0)
        waiting[graph.expanded] = 0
        if waiting.sum() <= self._limits.left_out:
            return self._expanded[:0]
        return np.argsort(-waiting, kind="stable")[: min(most, int((waiting > 0).sum()))]

    def add(self, accounts: list[Sources]) -> None:
        """accounts: of what was wanted, in that order."""
        layers, count = self.shape.layer_of(self._chosen), len(self._chosen)
        for layer in np.unique(layers).tolist():
            of_layer = np.flatnonzero(layers == layer)
            span, shares, gross = self._shares([accounts[place] for place in of_layer], layer)
            self._rows.setdefault(layer, GrowingRows(span)).add(self._count + of_layer, shares)
            self._gross[self._count + of_layer] = gross
        self._expanded[self._count : self._count + count] = self._chosen
        self._count += count
        self.graph = self._built()

    def _shares(self, accounts: list[Sources], layer: int) -> tuple[Span, Array, Array]:
        """Accounts of features of one layer as edges: (their span, the edges divided by the sum of their sizes
        [n, width], that sum [n])."""
        first = accounts[0].first
        count = max(min(len(accounts[0].errors), layer - first), 0)  # layers below
        edges = np.stack(
            [
                np.concatenate([account.features[:count].ravel(), account.embeddings, account.errors[:count].ravel()])
                for account in accounts
            ]
        )
        gross = np.abs(edges).sum(1, dtype=np.float64)
        shares = np.divide(edges, gross[:, None], out=np.zeros_like(edges), where=gross[:, None] != 0)
        return self.shape.span(first, first + count), shares, gross


def expand(
    trace: Coded, target: Sources, follow: Callable[[Wanted], list[Sources]], limits: Limits
) -> AttributionGraph:
    """The graph of one target. follow: gives the accounts of features' pre-activations."""
    expansion = Expansion(trace, target, limits)
    while (wanted := expansion.wanted()) is not None:
        expansion.add(follow(wanted))
    return expansion.graph
