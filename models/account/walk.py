"""A circuit walked back from the logit, layer by layer, as the residual replacement model prunes it (arXiv 2509.17401).
numpy only.

A node of a layer has a relevance, its part of the logit. In each layer, from the last to the first, relevances are
clamped at 0 and divided by their sum, and the fewest nodes are kept whose shares exceed tau. Below, the relevance of a
node is the sum of its edges into the nodes that were kept above (*hierarchical*), or what it has of its own whatever
was kept. An edge is in logits: the part of the upper node's relevance that comes from the lower one. What else made the
upper node, biases, constants and the baseline, is in no node.

What the nodes and edges are is a matter of who is asked:

    a graph of one image     active (index, token) and errors by token; an edge into a node as in
                             `models.account.circuit`, times relevance by activation; errors are leaves (`walk_trace`)
    relevances of images     features over all tokens and one error, the mean over images, of a class for example
                             (`training.evaluation.residual_circuit`)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.circuit import BATCH, Coded, Wanted
from vitrine.models.account.ledger import Array
from vitrine.models.account.pruning import fewest
from vitrine.models.account.sources import Sources

# (layer, nodes kept there [n], their relevances [n]) -> edges into these from each node of the layer below [n, S], and
# the relevances there [S] if they are not the sums of the edges.
Into = Callable[[int, NDArray[np.integer], Array], tuple[Array, Array | None]]


@dataclass(frozen=True)
class WalkedLayer:
    """What was kept of one layer."""

    layer: int
    nodes: NDArray[np.integer]  # [n] of the layer's nodes, the most relevant first
    relevance: Array  # [n] in logits, all positive
    share: float  # their share of what is positive in the layer
    edges: Array  # [m, n] into each node kept in the layer above, of the last layer into the logit [1, n]


def walk(layer: int, edges: Array, into: Into, tau: float, most: int | None = None) -> list[WalkedLayer]:
    """Walk back from the logit, the last layer first.

    Args:
        layer: the last that has nodes.
        edges: into the logit from each of its nodes [1, S].
        tau: kept nodes have more than this share of a layer's positive relevance.
        most: at most so many nodes are kept in a layer; None: any number.
    """
    layers: list[WalkedLayer] = []
    relevance: Array | None = None
    while True:
        relevance = edges.sum(0) if relevance is None else relevance
        positive = relevance.clip(0)
        nodes = np.flatnonzero(fewest(positive, tau))
        nodes = nodes[np.argsort(-positive[nodes], kind="stable")][:most]
        share = float(positive[nodes].sum() / positive.sum()) if len(nodes) else 0.0
        layers.append(WalkedLayer(layer, nodes, relevance[nodes], share, edges[:, nodes]))
        if layer == 0 or not len(nodes):
            return layers
        edges, relevance = into(layer, nodes, layers[-1].relevance)
        layer -= 1


def walk_trace(
    trace: Coded, target: Sources, follow: Callable[[Wanted], list[Sources]], tau: float, most: int | None = None
) -> list[WalkedLayer]:
    """The circuit of one image, by residual SAEs. A layer's nodes are T k places of its code, then T errors.

    Args:
        target: the logit's account, one layer below it (`models.account.residual`).
        follow: gives the accounts of features' pre-activations.
    """
    if trace.indices is None or trace.values is None:  # a tower of one layer
        return []
    indices, values = trace.indices, trace.values
    _, tokens, places = values.shape

    def into(layer: int, nodes: NDArray[np.integer], relevance: Array) -> tuple[Array, None]:
        edges = np.zeros((len(nodes), tokens * (places + 1)))
        features = np.flatnonzero(nodes < tokens * places)
        for some in np.split(features, np.arange(BATCH, len(features), BATCH)):
            at = nodes[some]
            activations = values[layer].ravel()[at]
            layers = np.full(len(at), layer)
            accounts = follow(Wanted(layers, at // places, indices[layer].ravel()[at], activations))
            for place, account, activation in zip(some, accounts, activations, strict=True):
                edges[place] = _nodes(account) * (relevance[place] / activation)
        return edges, None

    return walk(len(values) - 1, _nodes(target)[None], into, tau, most)


def _nodes(account: Sources) -> Array:
    """The parts of one layer's nodes [T k + T]."""
    (features,), (errors,) = account.features, account.errors
    return np.concatenate([features.ravel(), errors])
