"""The circuit of a logit: which features made the features that made it. numpy only.

A graph over one image's trace (`models.account.sources`). Its nodes are

    features     every active (layer, index, token)          columns [0, L T k), those with activation 0 unused
    embeddings   every token                                  columns [L T k, L T k + T)
    errors       every layer and token                        the last L T columns
    the target   a logit, or a difference of two

and an edge is the direct effect of a node on another's *pre-activation*, or on the logit, with attention weights and
LayerNorm denominators held fast: the source account of a feature's encoder row. So the edges into a node, decoder
biases and constants add up to its pre-activation, exactly. Embeddings and errors are leaves.

Influence as circuit-tracer defines it (attribution graphs, Ameisen et al. 2025): the |edges| into each node are divided
by their sum, A; a node's influence on the target is the sum over all paths, the row of the target in A + A^2 + ... A is
strictly lower-triangular, by layers, so that one substitution gives it.

A graph of all active features has 10^5 nodes and one backward pass for each. It is built from the target instead: the
features that have most influence by what is known so far are expanded next, in batches, until the budget is spent.
Whatever is not expanded is a leaf, too, and its influence is told as a share. The leaves' influences sum to 1. What is
listed of such a graph: `models.account.pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import Sources, Trace

BATCH = 16  # features expanded at once: influences are computed anew after each batch


@dataclass(frozen=True)
class Limits:
    """When the expansion ends, whichever comes first."""

    nodes: int  # features expanded at most
    seconds: float
    left_out: float = 0.01  # share of the influence that ends at features which were not expanded


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


@dataclass(frozen=True)
class AttributionGraph:
    """What was expanded: the edges into the target, and into each of the `expanded` features, from every column.

    They are stored as `shares`, divided by the sum of their sizes, and that sum, `gross`; 0 where nothing flows in.
    """

    shape: Shape
    indices: NDArray[np.integer]  # [L, T, k] of the features
    activations: Array  # [L, T, k]
    target: Array  # [columns] shares of the target
    target_gross: float
    expanded: NDArray[np.integer]  # [n] columns
    shares: Array  # [n, columns] of the expanded features
    gross: Array  # [n]

    @cached_property
    def influence(self) -> Array:
        """[columns]: of every column on the target."""
        influence = np.abs(self.target)
        for rows in self._from_above():
            influence += influence[self.expanded[rows]] @ np.abs(self.shares[rows])
        return influence

    def _from_above(self) -> Iterator[NDArray[np.integer]]:
        """Rows of the expanded features, layer by layer, from the last to the first."""
        layers = self.shape.layer_of(self.expanded)
        for layer in range(self.shape.layers)[::-1]:
            yield np.flatnonzero(layers == layer)

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
        of_target, of_features = (
            1 - np.abs(shares[..., self.shape.errors :]).sum(-1) for shares in (self.target, self.shares)
        )
        weights = self.influence[self.expanded]
        return float((of_target + (of_features * weights).sum()) / (1 + weights.sum()))


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


class Expansion:
    """Builds the graph of one target from its source account, the most influential features first: `add` the accounts
    of what is `wanted`, until nothing is."""

    def __init__(self, trace: Trace, target: Sources, limits: Limits) -> None:
        assert trace.indices is not None  # without a CLT there are no features to expand
        assert trace.values is not None
        self._limits, self._begun = limits, perf_counter()
        self.indices, self.values = trace.indices, trace.values
        self.shape = Shape(*self.values.shape)
        (self._target,), (self._target_gross,) = _shares([target])
        # A page of it takes memory once it is written.
        self._shares = np.empty((limits.nodes, self.shape.columns), np.float32)
        self._gross = np.empty(limits.nodes)
        self._expanded = np.empty(limits.nodes, np.int64)
        self._count = 0
        self._chosen = self._expanded[:0]
        self.graph = self._built()  # as far as it is built

    def _built(self) -> AttributionGraph:
        done = slice(0, self._count)
        return AttributionGraph(
            self.shape,
            self.indices,
            self.values,
            self._target,
            float(self._target_gross),
            self._expanded[done],
            self._shares[done],
            self._gross[done],
        )

    def wanted(self) -> Wanted | None:
        """What to expand next; None: the budget is spent, or little enough is left out."""
        left = self._limits.nodes - self._count
        if left <= 0 or perf_counter() - self._begun >= self._limits.seconds:
            return None
        graph = self.graph
        waiting = np.where(self.values.ravel() != 0, graph.influence[: self.shape.features], 0)
        waiting[graph.expanded] = 0
        if waiting.sum() <= self._limits.left_out:
            return None
        count = min(BATCH, left, int((waiting > 0).sum()))
        self._chosen = chosen = np.argsort(-waiting, kind="stable")[:count]
        names = self.shape.layer_of(chosen), self.shape.token_of(chosen), self.indices.ravel()[chosen]
        return Wanted(*names, self.values.ravel()[chosen])

    def add(self, accounts: list[Sources]) -> None:
        """accounts: of what was wanted, in that order."""
        batch = slice(self._count, self._count + len(self._chosen))
        self._shares[batch], self._gross[batch] = _shares(accounts)
        self._expanded[batch] = self._chosen
        self._count += len(self._chosen)
        self.graph = self._built()


def expand(
    trace: Trace, target: Sources, follow: Callable[[Wanted], list[Sources]], limits: Limits
) -> AttributionGraph:
    """The graph of one target. follow: gives the accounts of features' pre-activations."""
    expansion = Expansion(trace, target, limits)
    while (wanted := expansion.wanted()) is not None:
        expansion.add(follow(wanted))
    return expansion.graph


def _shares(accounts: list[Sources]) -> tuple[Array, Array]:
    """Accounts as edges, by column: (divided by the sum of their sizes [n, columns], that sum [n])."""
    edges = np.stack(
        [np.concatenate([account.features.ravel(), account.embeddings, account.errors.ravel()]) for account in accounts]
    )
    gross = np.abs(edges).sum(1, dtype=np.float64)
    return np.divide(edges, gross[:, None], out=np.zeros_like(edges), where=gross[:, None] != 0), gross
