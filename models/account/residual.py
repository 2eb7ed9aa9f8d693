"""The source account by residual SAEs (arXiv 2509.17401): from one layer to the one below. numpy only.

There is an SAE after every block but the last. The account of a logit, or of a feature's pre-activation, goes back
through one block, its MLP's gates held fast too, to the stream that the SAE below says of which features it consists
(`models.graph.residual`):

    features + errors of the layer below, by token  +  its decoder's bias  +  constants = logit or pre-activation

and below block 0 it is embeddings and constants. Adjacent layers alone have edges, so that a circuit is followed down
layer by layer. It is the same graph as a CLT's (`models.account.circuit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.account.sources import HeldFast, Sources


@dataclass(frozen=True)
class ResidualTrace(HeldFast):
    """One image's forward pass, with the codes of the SAEs after blocks 0 ... L - 2 (`models.graph.gated_trace`)."""

    gates: Array  # [L, T, M] of the MLPs; of the last layer at [CLS], 0 at patches
    streams: Array  # [L, T, d] before each block: the embeddings first
    deviations: Array | None = None  # [L - 1, T] of each token, by which its SAE divides; None: no SAE
    indices: NDArray[np.integer] | None = None  # [L - 1, T, k] active features
    values: Array | None = None  # [L - 1, T, k] their activations, 0 in unused places

    def through(self, block: int) -> list[Array]:
        """What the graph that goes back through a block takes of the trace: what that block holds fast, the stream
        before it, and what the SAE below makes of that."""
        held = (self.weights, self.before_attention, self.before_mlp, self.gates, self.streams)
        parts = [part[block] for part in held]
        if block and self.deviations is not None and self.indices is not None and self.values is not None:
            parts += [self.deviations[block - 1], self.indices[block - 1], self.values[block - 1]]
        return parts


def logit_accounts(
    trace: ResidualTrace, outputs: Sequence[Array], directions: Array, beta: Array, logit_scale: float
) -> list[Sources]:
    """The account of each of n directions in embedding space [n, D], from what `LogitSourcesGraph` gave for their
    `starts`. beta [D]: of `Tower.fold`."""
    logits, constants = trace.logits(directions, beta, logit_scale)
    return _accounts(trace, len(trace.weights) - 2, outputs, logits, constants)


def whole_accounts(
    trace: ResidualTrace, outputs: Sequence[Array], directions: Array, beta: Array, logit_scale: float
) -> list[Sources]:
    """The same back through all blocks to the embeddings, from what `models.graph.gated.GatedSourcesGraph` gave: it
    needs no SAE."""
    contributions, constants = outputs
    logits, of_beta = trace.logits(directions, beta, logit_scale)
    return _accounts(trace, -1, (contributions[:, 0], constants.sum(1)), logits, of_beta)


def feature_accounts(trace: ResidualTrace, layer: int, outputs: Sequence[Array], activations: Array) -> list[Sources]:
    """The accounts of n active features of the SAE after block `layer`, whose pre-activations are their `activations`
    [n], from what its `FeatureSourcesGraph` gave for them."""
    return _accounts(trace, layer - 1, outputs, activations, np.zeros(len(activations)))


def _accounts(
    trace: ResidualTrace, below: int, outputs: Sequence[Array], totals: Array, constants: Array
) -> list[Sources]:
    """below: the layer whose SAE says of what the stream consists; -1: embeddings."""
    count, tokens = len(totals), trace.weights.shape[-1]
    indices: NDArray[np.integer] = np.zeros((0, tokens, 0), np.int64)  # below the first SAE nothing has a code
    embeddings, biases = np.zeros((count, tokens), np.float32), np.zeros((count, 0), np.float32)
    features, errors = (np.zeros((count, *shape), np.float32) for shape in (indices.shape, (0, tokens)))
    if below < 0:
        embeddings, of_network = outputs
    else:
        assert trace.indices is not None
        of_features, of_errors, of_biases, of_network = outputs
        features, errors, biases = of_features[:, None], of_errors[:, None], of_biases[:, None]
        indices = trace.indices[below : below + 1]
    return [
        Sources(
            logit=float(total),
            embeddings=embeddings[n],
            features=features[n],
            biases=biases[n],
            errors=errors[n],
            constants=float(of_network[n] + constants[n]),
            indices=indices,
            first=max(below, 0),
        )
        for n, total in enumerate(totals)
    ]
