"""The source account of a logit: it is followed back through attention to what was written. numpy only.

The ledger stops at attention: "attention 5: +1.26" names no feature. But with this image's attention weights and the
denominators of its LayerNorms held fast, everything between what is *written* to the residual stream and the logit is
linear; and what is written are the embedding of every token and the MLP output of every layer at every token. With
u = M t s / (sigma |z|) the label's direction in the residual stream (`models.account.ledger`), the gradient at the
stream is

    G[L] = u at [CLS], 0 elsewhere                         after the last block
    G[l] = G[l+1] + LN1' sum_h A_h' (G[l+1] W_O^h W_V^h)    before block l, through its attention alone

(A_h the attention weights, ' transposed, LN1 with its denominators). An MLP output w of layer l at token p contributes
<w, G[l+1][p]>, and so the logit is, exactly,

    embeddings        <e_p, G[0][p]> of every token p
    + features        z sum_{j >= i} <W_f^{i->j}, G[j+1][p]> of every active feature f of every source layer i at p
    + biases          of the decoders
    + errors          of every layer and token: what its MLP wrote and the CLT did not
    + constants       what attention adds whatever it reads (its biases, LayerNorm's beta), and ln_post's beta.

Without a CLT the errors are the MLP outputs themselves. The graphs: `models.graph.trace`, `models.graph.sources`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array


@dataclass(frozen=True)
class Trace:
    """One image's forward pass: what was written, and what is held fast (`models.graph.trace`)."""

    embedding: Array  # [D] unit
    scale: float  # sigma |z|: by which a direction in embedding space is divided
    norm: float  # |z|
    weights: Array  # [L, H, T, T] attention weights
    before_attention: Array  # [L, T] LN1's denominators
    before_mlp: Array  # [L, T] LN2's
    embedded: Array  # [T, d] the stream before block 0
    written: Array  # [L, T, d] MLP outputs
    indices: NDArray[np.integer] | None = None  # [L, T, k] active features; None: no CLT
    values: Array | None = None  # [L, T, k] their activations, 0 in unused places


@dataclass(frozen=True)
class Sources:
    """The source account of one logit, or of a difference of two, in logits. All parts and `remainder` sum to it."""

    logit: float
    embeddings: Array  # [T]
    features: Array  # [L, T, k] of the trace's active features; [L, T, 0] without a CLT
    biases: Array  # [L] of the decoders of each target layer
    errors: Array  # [L, T] of each target layer; without a CLT, of the whole MLP
    constants: float
    indices: NDArray[np.integer]  # [L, T, k]

    @property
    def remainder(self) -> float:
        """The logit less the sum of all parts: rounding only."""
        parts = (self.embeddings, self.features, self.biases, self.errors)
        return self.logit - self.constants - sum(float(part.sum(dtype=np.float64)) for part in parts)

    @property
    def map(self) -> Array:
        """[T]: what was written at each token, features, errors and embedding."""
        return self.embeddings + self.features.sum((0, 2)) + self.errors.sum(0)

    def by_feature(self) -> tuple[NDArray[np.integer], NDArray[np.integer], Array]:
        """(layers, indices, contributions over all tokens) of the features that are active, the largest first."""
        layers, _, _places = self.features.shape
        count = int(self.indices.max(initial=0)) + 1
        keys = (np.arange(layers)[:, None, None] * count + self.indices).ravel()
        present, inverse = np.unique(keys, return_inverse=True)
        totals = np.bincount(inverse, weights=self.features.ravel(), minlength=len(present))
        order = np.argsort(-np.abs(totals), kind="stable")
        order = order[totals[order] != 0]
        return present[order] // count, present[order] % count, totals[order]

    def tokens_of(self, layer: int, index: int) -> Array:
        """[T]: one feature's contribution from each token."""
        return np.where(self.indices[layer] == index, self.features[layer], 0).sum(-1)
