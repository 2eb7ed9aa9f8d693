"""The additive account of a logit: what each part of the network contributed, with an exact sum. numpy only.

The [CLS] residual before ln_post is a sum of components, r = sum_m c_m, in this order (L layers, R = 2L + 3 rows):

    0            prior      class token and position: the same for every image
    1 .. L       attention  what each block's attention wrote to [CLS]
    L+1 .. 2L    clt        what the features of each source layer wrote, sum_{j >= i} z_i W^{i->j}
                 mlp        without a CLT, in their place: what each block's MLP wrote to [CLS]
    2L+1         bias       the CLT's decoder biases, and ln_post's bias beta
    2L+2         error      what the MLPs wrote but the CLT did not: true MLP outputs - CLT outputs; 0 without a CLT
    2L+3         edit       after interventions in the running network (`models.graph.rerun`): what they added besides

ln_post and the projection are affine once this image's standard deviation sigma is known (`Tower.fold`), and so is
the division by the norm |z| of the embedding. So each component has a row in embedding space,

    row_m = c_m M / (sigma |z|)     (+ beta / |z| for the bias),      sum_m row_m = z / |z|,

and for any label with unit text embedding t, s <t, row_m> is its contribution to the logit s <t, z/|z|>.
With a CLT the MLPs' rows come besides, [L, D]: they add up to clt, error and the decoder biases.
Removing a component is exact too (`without`): sigma and |z| are recomputed for the remaining residual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Details:
    """What the vision graph returns for one image on request: attention, and the prediction after each block."""

    lens: Array  # [L, D] unit: the embedding of the [CLS] residual after each block
    attention_weights: Array  # [L, H, T] of [CLS], over all tokens
    attention_values: Array  # [L, T, d] the values of each token, heads side by side, without the bias
    token_norms: Array  # [T] |residual| before the last block
    # [L, H, d] what each head writes, values' bias included; with the outputs' biases the attention rows' components.
    # None in bundles of older versions.
    head_components: Array | None = None

    @classmethod
    def from_batch(cls, outputs: Mapping[str, Array], image: int) -> Details:
        """One image of batched outputs, keyed by `models.bundle.layout.ON_REQUEST`."""
        names = (field.name for field in fields(cls))
        return cls(**{name: outputs[name][image] for name in names if name in outputs})


@dataclass(frozen=True)
class Decomposition:
    """What the vision graph returns for one image: independent of any label."""

    embedding: Array  # [D] unit
    rows: Array  # [R, D], summing to the embedding; after interventions [R + 1, D]
    sigma: float  # standard deviation of this residual in ln_post
    sigma_without: Array  # [R] the same with component m removed
    norm: float  # |z|, of the embedding before normalisation
    feature_indices: NDArray[np.integer]  # [L, k]; k is 0 without a CLT
    feature_values: Array  # [L, k] activations z, 0 where unused
    projection: Array | None  # [L] the paper's C_{i -> L-1} for [CLS], summing to 1, or all 0 where y is 0
    r2: float | None  # of what the MLPs add to the embedding, relative to its mean over the training images
    cosine: float | None  # of the same quantity, CLT against the true MLPs
    details: Details | None = None
    components: Array | None = None  # [R, d] in residual space; only where they are asked for
    mlp_rows: Array | None = None  # [L, D] the MLPs' rows, with a CLT; None in bundles of older versions

    @classmethod
    def from_batch(cls, outputs: Mapping[str, Array], image: int, with_details: bool = False) -> Decomposition:
        """One image of batched outputs, keyed by the vision graph's names (`models.bundle.layout.VISION_OUTPUTS`)."""

        def part(name: str) -> Array:
            return outputs[name][image]

        account: dict[str, Any] = {
            "embedding": part("embedding"),
            "rows": part("rows"),
            "sigma": float(part("sigma")),
            "sigma_without": part("sigma_without"),
            "norm": float(part("norm")),
            "details": Details.from_batch(outputs, image) if with_details else None,
            "components": part("components") if "components" in outputs else None,
        }
        if "feature_indices" not in outputs:  # no CLT
            layers = (len(account["rows"]) - 3) // 2
            none = np.zeros((layers, 0), np.int64), np.zeros((layers, 0), np.float32)
            return cls(
                **account, feature_indices=none[0], feature_values=none[1], projection=None, r2=None, cosine=None
            )
        return cls(
            **account,
            feature_indices=outputs["feature_indices"][image],
            feature_values=part("feature_values"),
            projection=part("projection"),
            r2=float(part("fidelity")[0]),
            cosine=float(part("fidelity")[1]),
            mlp_rows=part("mlp_rows") if "mlp_rows" in outputs else None,
        )

    @property
    def layers(self) -> int:
        return (len(self.rows) - 3) // 2

    @property
    def has_features(self) -> bool:
        """Whether there is a CLT."""
        return self.feature_indices.shape[1] > 0

    def clt_row(self, layer: int) -> int:
        """Index of the row of source layer `layer`; without a CLT of its MLP."""
        return 1 + self.layers + layer

    @property
    def bias_row(self) -> int:
        return 2 * self.layers + 1

    @property
    def error_row(self) -> int:
        return 2 * self.layers + 2

    def without(self, rows: NDArray[np.integer], beta: Array) -> Array:
        """Unit embeddings [len(rows), D] of the residual with each of `rows` removed, one at a time.

        beta [D] is ln_post's bias in embedding space. It is never removed.
        """
        constant = beta / self.norm  # part of the bias row but not of the residual: kept
        removed = self.rows[rows] - constant * (rows == self.bias_row)[:, None]
        remaining = self.embedding - constant - removed
        embeddings = remaining * (self.sigma / self.sigma_without[rows])[:, None] + constant
        return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Ledger:
    """The account of one logit (or of a difference of two), in logits."""

    logit: float
    prior: float
    attention: Array  # [L]
    by_layer: Array  # [L] the rows clt; without a CLT, mlp
    bias: float
    error: float
    remainder: float  # logit - sum of all rows: rounding only
    has_features: bool = True
    mlp: Array | None = None  # [L], whether or not they are among the rows; None in bundles of older versions
    edit: float = 0.0  # only after interventions

    @property
    def clt(self) -> Array:
        """[L]; [0] without a CLT."""
        return self.by_layer if self.has_features else self.by_layer[:0]

    @property
    def gross(self) -> float:
        """Sum of |row|: the denominator of shares."""
        single = abs(self.prior) + abs(self.bias) + abs(self.error) + abs(self.edit)
        return float(single + np.abs(self.attention).sum() + np.abs(self.by_layer).sum())


def logits(embedding: Array, labels: Array, logit_scale: float) -> Array:
    """s <t, z/|z|> for unit label embeddings [N, D] -> [N]; embeddings [B, D] -> [B, N]."""
    return logit_scale * (embedding @ labels.T)


def probabilities(values: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = np.asarray(values, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def ledger(parts: Decomposition, direction: Array, logit_scale: float) -> Ledger:
    """The account of s <direction, z/|z|>. direction: a label's embedding, or t_A - t_B for "why A rather than B"."""
    layers, direction = parts.layers, direction.astype(np.float64)
    row = logit_scale * (parts.rows.astype(np.float64) @ direction)
    logit = logit_scale * float(parts.embedding.astype(np.float64) @ direction)
    by_layer = row[1 + layers : 1 + 2 * layers]
    mlp = None if parts.has_features else by_layer
    if parts.mlp_rows is not None:
        mlp = logit_scale * (parts.mlp_rows.astype(np.float64) @ direction)
    return Ledger(
        logit=logit,
        prior=float(row[0]),
        attention=row[1 : 1 + layers],
        by_layer=by_layer,
        bias=float(row[parts.bias_row]),
        error=float(row[parts.error_row]),
        remainder=logit - float(row.sum()),
        has_features=parts.has_features,
        mlp=mlp,
        edit=float(row[parts.error_row + 1 :].sum()),
    )


def feature_contributions(
    parts: Decomposition, directions: Array, fold: Array, direction: Array, logit_scale: float
) -> Array:
    """Contribution of every active feature [L, k] to s <direction, z/|z|>; those of a layer add up to its clt row.

    directions [L, F, d]: what one unit of a feature adds to the residual; fold [d, D]: M of `Tower.fold`.
    The label is folded back into residual space once, so that no D-dimensional table is needed.
    """
    in_residual = fold @ direction  # [d]
    written = directions[np.arange(parts.layers)[:, None], parts.feature_indices]  # [L, k, d]
    per_unit = written.astype(np.float32, copy=False) @ in_residual.astype(np.float32)
    return logit_scale / (parts.sigma * parts.norm) * parts.feature_values * per_unit


def drop_effects(
    parts: Decomposition,
    labels: Array,
    target: int,
    beta: Array,
    logit_scale: float,
    score: Callable[[Array], Array] = probabilities,
) -> Array:
    """Change of the target's probability [L] when a source layer's component is removed from the final residual.

    Direct effects only: ln_post, projection and norm are recomputed, later layers are not. score: from logits [..., N]
    to probabilities [..., N].
    """
    rows = parts.clt_row(0) + np.arange(parts.layers)
    before = score(logits(parts.embedding, labels, logit_scale))[target]
    after = score(logits(parts.without(rows, beta), labels, logit_scale))[:, target]
    return after - before
