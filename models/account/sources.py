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

About a baseline: biases and constants are large and cancel, and so do features that fire in every picture. With z' the
mean activation of each feature by token type, the features' z is z - z', and two rows by source layer make up for it:

    baseline    sum of z' over all features and tokens: the account of the average picture
    silent      minus that of the features which this picture does not have, token by token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array


@dataclass(frozen=True)
class HeldFast:
    """Of one image's forward pass: its embedding, and what every account holds fast."""

    embedding: Array  # [D] unit
    scale: float  # sigma |z|: by which a direction in embedding space is divided
    norm: float  # |z|
    weights: Array  # [L, H, T, T] attention weights
    before_attention: Array  # [L, T] LN1's denominators
    before_mlp: Array  # [L, T] LN2's

    @classmethod
    def from_batch(cls, outputs: Mapping[str, Any], image: int) -> Self:
        """One image of the outputs of trace.onnx (`models.bundle.layout.TRACE_OUTPUTS`)."""
        of_image = {name: values[image] for name, values in outputs.items()}
        scale, norm = float(of_image.pop("scale")), float(of_image.pop("norm"))
        return cls(scale=scale, norm=norm, weights=of_image.pop("attention_weights"), **of_image)

    def starts(self, directions: Array, fold: Array, logit_scale: float) -> Array:
        """[n, d]: the directions u of label embeddings, or differences of two, [n, D]; fold [d, D] (`Tower.fold`)."""
        return directions @ fold.T * (logit_scale / self.scale)

    def logits(self, directions: Array, beta: Array, logit_scale: float) -> tuple[Array, Array]:
        """(logits of directions [n, D], what ln_post's beta adds to them) [n] each; beta [D]: of `Tower.fold`."""
        return logit_scale * (directions @ self.embedding), directions @ beta * (logit_scale / self.norm)


@dataclass(frozen=True)
class Trace(HeldFast):
    """One image's forward pass: what was written, and what is held fast (`models.graph.trace`)."""

    embedded: Array  # [T, d] the stream before block 0
    written: Array  # [L, T, d] MLP outputs; of the last layer at [CLS], 0 at patches, where nothing reads them
    indices: NDArray[np.integer] | None = None  # [L, T, k] active features; None: no CLT
    values: Array | None = None  # [L, T, k] their activations, 0 in unused places and at the last layer's patches


def accounts(
    trace: Trace, outputs: Mapping[str, Any], directions: Array, beta: Array, logit_scale: float
) -> list[Sources]:
    """The account of each of n directions in embedding space [n, D], from what sources.onnx gave for their `starts`.

    beta [D]: of `Tower.fold`.
    """
    return accounts_of(trace, outputs, *trace.logits(directions, beta, logit_scale))


def feature_accounts(trace: Trace, outputs: Mapping[str, Any], activations: Array) -> list[Sources]:
    """The accounts of n active features' pre-activations, which are their `activations` [n], from what sources.onnx
    gave for starts at their encoders."""
    return accounts_of(trace, outputs, activations, np.zeros(len(activations)))


def accounts_of(trace: Trace, outputs: Mapping[str, Any], totals: Array, constants: Array) -> list[Sources]:
    """The accounts of n numbers, `totals` [n], from what sources.onnx gave for them. constants [n]: of each, beside
    those of the network up to its start."""
    layers, tokens = trace.written.shape[:2]
    none = np.zeros((len(totals), layers, tokens, 0), np.float32)
    features, indices = outputs.get("features", none), trace.indices
    biases = outputs.get("biases", np.zeros((len(totals), layers), np.float32))
    return [
        Sources(
            logit=float(total),
            embeddings=outputs["embeddings"][n],
            features=features[n],
            biases=biases[n],
            errors=outputs["errors"][n],
            constants=float(outputs["constants"][n] + constants[n]),
            indices=none[0].astype(np.int64) if indices is None else indices,
        )
        for n, total in enumerate(totals)
    ]


def about(sources: Sources, trace: Trace, gradients: Array, baseline: Baseline) -> Sources:
    """The same account with the features about the average picture's; gradients [L, 2, d] from sources.onnx."""
    assert trace.indices is not None
    assert trace.values is not None
    average = np.einsum("jitd,jtd->i", baseline.written, gradients)  # [L] of the source layers
    types = np.minimum(np.arange(trace.values.shape[1]), 1)[None, :, None]
    mean = baseline.activations[np.arange(len(average))[:, None, None], types, trace.indices]  # [L, T, k]
    share = np.divide(mean, trace.values, out=np.zeros_like(mean), where=trace.values != 0)
    common = sources.features * share
    return replace(sources, features=sources.features - common, baseline=average, silent=common.sum((1, 2)) - average)


class Baseline(NamedTuple):
    """The features of the average picture, by token type: [CLS], patches."""

    activations: Array  # [L, 2, F] mean activation
    written: Array  # [L, L, 2, d] what they write, by target and source layer; 0 where a source does not write


@dataclass(frozen=True)
class Sources:
    """The source account of one logit, or of a difference of two, or of a feature's pre-activation, or of an attention
    score. All parts and `remainder` sum to it.

    L is the number of layers that may have a part, from `first` on: all, or of residual SAEs the one below, or none.
    """

    logit: float  # or the pre-activation, or the score
    embeddings: Array  # [T]
    features: Array  # [L, T, k] of the trace's active features; [L, T, 0] without a CLT
    biases: Array  # [L] of the decoders of each target layer
    errors: Array  # [L, T] of each target layer; without a CLT, of the whole MLP
    constants: float
    indices: NDArray[np.integer]  # [L, T, k]

    baseline: Array | None = None  # [L] of the average picture's features; None: nothing was subtracted from them
    silent: Array | None = None  # [L] of features that are active in the average picture and not in this one
    first: int = 0

    @property
    def remainder(self) -> float:
        """The logit less the sum of all parts: rounding only."""
        parts = (self.embeddings, self.features, self.biases, self.errors, self.baseline, self.silent)
        sums = (float(part.sum(dtype=np.float64)) for part in parts if part is not None)
        return self.logit - self.constants - sum(sums)

    @property
    def error_share(self) -> float:
        """The errors' part of the sum of all |rows|: features, errors and biases by layer, embeddings, constants."""
        rows = (self.features.sum((1, 2)), self.biases, self.baseline, self.silent)
        errors = float(np.abs(self.errors.sum(1)).sum())
        gross = errors + abs(float(self.embeddings.sum())) + abs(self.constants)
        gross += sum(float(np.abs(row).sum()) for row in rows if row is not None)
        return errors / gross if gross else 0.0

    @property
    def map(self) -> Array:
        """[T]: what was written at each token, features, errors and embedding."""
        return self.embeddings + self.features.sum((0, 2)) + self.errors.sum(0)

    def by_feature(self) -> tuple[NDArray[np.integer], NDArray[np.integer], Array]:
        """(layers, indices, contributions over all tokens) of the features that are active, the largest first."""
        layers, _, _places = self.features.shape
        count = int(self.indices.max(initial=0)) + 1
        keys = ((self.first + np.arange(layers))[:, None, None] * count + self.indices).ravel()
        totals = np.bincount(keys, weights=self.features.ravel()).astype(np.float64, copy=False)
        active = np.flatnonzero(totals)
        order: NDArray[np.integer] = active[np.argsort(-np.abs(totals[active]), kind="stable")]
        return order // count, order % count, totals[order]

    def tokens_of(self, layer: int, index: int) -> Array:
        """[T]: one feature's contribution from each token."""
        place = layer - self.first
        return np.where(self.indices[place] == index, self.features[place], 0).sum(-1)
