"""A circuit small enough to be read: the attribution graph (`models.account.circuit`), pruned. numpy only.

As circuit-tracer prunes it: the fewest nodes that have `node_share` of all nodes' influence; of the edges between them
the fewest that have `edge_share`; then, over and over, no feature without an edge out, or in. Nodes and edges are taken
from features that were followed back, embeddings and errors.

circuit-tracer takes features that were not followed out of the graph before it measures influence, so that the others
share theirs. Here they keep it, and where it goes is told: of each node, and of the target, how much of what flows into
it comes from them, and how much from nodes and edges that were pruned. So that the edges listed, these two and the
constants add up to its pre-activation, or to the logit. A real ViT has 10^5 active features, of which 10^4 flow into
each other a little: with `leaves` those that were not followed are nodes like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.circuit import AttributionGraph
from vitrine.models.account.ledger import Array

NODE_SHARE, EDGE_SHARE = 0.8, 0.98  # of the influence that pruning keeps; circuit-tracer's defaults


@dataclass(frozen=True)
class Inflow:
    """What flows into nodes beside the edges that are listed, by node; NaN of leaves, which have no sources.

    Shares are of the sum of all |edges| into a node: those of the listed edges, of `unfollowed` and of `pruned` sum
    to 1, or to 0 where nothing flows in.
    """

    edges: Array  # signed sum of all edges, listed or not
    unfollowed: Array  # signed sum of those from features that were not followed
    unfollowed_share: Array
    pruned: Array  # signed sum of all others
    pruned_share: Array


@dataclass(frozen=True)
class Circuit:
    """A pruned graph: nodes as columns, edges between them and into the target."""

    nodes: NDArray[np.integer]  # columns, the most influential first
    influence: Array  # [nodes]
    sources: NDArray[np.integer]  # [edges] places in `nodes`
    targets: NDArray[np.integer]  # [edges] places in `nodes`; -1: the target
    weights: Array  # [edges] signed, in logits or units of the pre-activation
    inflow: Inflow  # [nodes + 1], the target's last


def prune(
    graph: AttributionGraph, node_share: float = NODE_SHARE, edge_share: float = EDGE_SHARE, *, leaves: bool = False
) -> Circuit:
    """The circuit of a graph. leaves: whether features that were not followed may be nodes, without sources.

    Features that only biases and constants made are leaves, too. A feature all of whose listed edges were pruned stays
    if features that were not followed made it, and they are no nodes.
    """
    unfollowed = _unfollowed(graph)
    influence = graph.influence if leaves else np.where(unfollowed, 0, graph.influence)
    nodes = np.flatnonzero(fewest(influence, node_share))
    nodes = nodes[np.argsort(-influence[nodes], kind="stable")]
    # The graph of these nodes alone: a row for the target and for each that was expanded, a column for each.
    rows = np.flatnonzero(np.isin(graph.expanded, nodes))
    rows = rows[np.argsort(-graph.shape.layer_of(graph.expanded[rows]), kind="stable")]  # from the last layer down
    all_edges = _Rows(graph, rows, unfollowed)
    weights = np.concatenate([graph.target[None, nodes] * graph.target_gross, graph.edges(rows, nodes)])
    place_of = np.full(graph.shape.columns, -1, np.int64)
    place_of[nodes] = np.arange(len(nodes))
    places = place_of[graph.expanded[rows]]  # in `nodes`
    shares = _divided(np.abs(weights))
    flow = shares[0].copy()  # influence by the edges between these nodes
    for row, place in enumerate(places, 1):
        flow += flow[place] * shares[row]
    scores = shares * np.concatenate([[1.0], flow[places]])[:, None]
    edges = fewest(scores.ravel(), edge_share).reshape(scores.shape)
    kept = np.ones(len(nodes), bool)
    while True:
        fed = np.ones(len(nodes), bool)  # leaves need no edge in
        fed[places] = edges[1:].any(1) | (all_edges.gross[1:] == 0)
        if not leaves:
            fed[places] |= all_edges.from_unfollowed[1:] > 0
        remaining = kept & fed & edges.any(0)
        if (remaining == kept).all():
            break
        kept = remaining
        edges[:, ~kept] = False
        edges[1:][~kept[places]] = False
    inflow = all_edges.beside(np.where(edges, weights, 0), unfollowed[nodes])
    place_of = np.cumsum(kept) - 1
    into = np.concatenate([[-1], place_of[places]])
    row_of_edge, node_of_edge = np.nonzero(edges)
    remains = np.concatenate([[True], kept[places]])
    return Circuit(
        nodes=nodes[kept],
        influence=influence[nodes[kept]],
        sources=place_of[node_of_edge],
        targets=into[row_of_edge],
        weights=weights[row_of_edge, node_of_edge],
        inflow=Inflow(*(_at(part[remains], into[remains], int(kept.sum())) for part in inflow)),
    )


def _unfollowed(graph: AttributionGraph) -> NDArray[np.bool_]:
    """[columns]: features that were not expanded."""
    unfollowed = np.arange(graph.shape.columns) < graph.shape.features
    unfollowed[graph.expanded] = False
    return unfollowed


class _Rows:
    """Sums of all edges into the target (first) and into the expanded features `rows`, [1 + rows] each."""

    def __init__(self, graph: AttributionGraph, rows: NDArray[np.integer], unfollowed: NDArray[np.bool_]) -> None:
        self.gross = np.concatenate([[graph.target_gross], graph.gross[rows]])
        sums = np.empty((4, len(rows) + 1))
        place_of = np.full(len(graph.expanded), -1)
        place_of[rows] = np.arange(1, len(rows) + 1)
        sums[:, 0] = _sums(graph.target, unfollowed)
        for span, numbers, of_layer in graph.rows.values():
            hidden = span.cut(unfollowed)
            for place, shares in zip(place_of[numbers].tolist(), of_layer, strict=True):
                if place >= 0:
                    sums[:, place] = _sums(shares, hidden)
        self.signed, self.signed_unfollowed, self.sizes, self.from_unfollowed = sums * self.gross

    def beside(self, listed: Array, unfollowed: NDArray[np.bool_]) -> tuple[Array, ...]:
        """The fields of `Inflow`. listed [1 + rows, nodes]: the listed edges, others 0; unfollowed [nodes]."""
        of_unfollowed = self.signed_unfollowed - listed[:, unfollowed].sum(1)
        size = self.from_unfollowed - np.abs(listed[:, unfollowed]).sum(1)
        pruned = self.signed - self.signed_unfollowed - listed[:, ~unfollowed].sum(1)
        pruned_size = self.sizes - self.from_unfollowed - np.abs(listed[:, ~unfollowed]).sum(1)
        shares = (
            np.divide(part, self.gross, out=np.zeros_like(part), where=self.gross != 0).clip(0, 1)  # rounding
            for part in (size, pruned_size)
        )
        unfollowed_share, pruned_share = shares
        return self.signed, of_unfollowed, unfollowed_share, pruned, pruned_share


def _sums(shares: Array, unfollowed: NDArray[np.bool_]) -> list[float]:
    """Of one row: of all and of the features that were not followed, signed, and the same of sizes."""
    parts = (shares, shares[unfollowed])
    return [float(part.sum(dtype=np.float64)) for part in (*parts, *map(np.abs, parts))]


def _at(values: Array, places: NDArray[np.integer], count: int) -> Array:
    """[count + 1]: values at their places (-1: the last one), NaN elsewhere."""
    spread = np.full(count + 1, np.nan)
    spread[places] = values
    return spread


def _divided(sizes: Array) -> Array:
    """Rows [n, columns], each divided by its sum; rows of zeros stay so."""
    sums = sizes.sum(1, keepdims=True)
    return np.divide(sizes, sums, out=np.zeros_like(sizes), where=sums != 0)


def fewest(values: Array, share: float) -> NDArray[np.bool_]:
    """The fewest of non-negative values whose sum is at least `share` of all."""
    order = np.argsort(-values, kind="stable")
    cumulated = np.cumsum(values[order], dtype=np.float64)
    kept = np.zeros(len(values), bool)
    if len(values) and cumulated[-1] > 0:
        kept[order[: int(np.searchsorted(cumulated, share * cumulated[-1])) + 1]] = True
    return kept & (values > 0)
