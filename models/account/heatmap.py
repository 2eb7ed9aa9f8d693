"""Where in the image an attention row comes from: an exact split by patch and by head. numpy only.

Head h of block l adds sum_p a[h, p] v[p, h] to [CLS], where a are the attention weights and v the value channels of
token p that belong to head h. The block's output matrix maps it to the residual stream, and `models.account.ledger`
folds it onto the label. All of this is linear once the weights a are known, so for a direction t in embedding space

    c[l, h, p] = s / (sigma |z|) * a[l, h, p] <v[l, p, h], A[l, h] t>          A: `Tower.attention_fold`

is the contribution of head h from token p, in logits. With one constant per block (the biases of values and output),

    attention row l  =  sum over patches and heads  +  the class token's part  +  constant l  +  rounding.

The weights a are treated as constants: a map shows what was read where, not why attention looked there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array, Decomposition, Details

OUTLIER = 2.0  # times the median norm of the patches


@dataclass(frozen=True)
class HeatMap:
    """The attention rows of an account, in logits. L layers, H heads, P patches row by row."""

    patches: Array  # [L, P] from each patch, summed over heads
    heads: Array  # [L, H] of each head, summed over patches
    class_token: Array  # [L] what [CLS] read from itself
    constant: Array  # [L] the biases' part: the same for every image up to scale
    outliers: NDArray[np.bool_]  # [P] patches whose residual is unusually long, see `outliers`


def heat_map(
    parts: Decomposition, details: Details, attention_fold: Array, direction: Array, logit_scale: float
) -> HeatMap:
    """Split the attention rows of s <direction, z/|z|>. attention_fold [L, d + 1, D], see `Tower.attention_fold`."""
    layers, heads, tokens = details.attention_weights.shape
    per_unit = attention_fold @ direction.astype(np.float32) * (logit_scale / (parts.sigma * parts.norm))  # [L, d + 1]
    values = details.attention_values.reshape(layers, tokens, heads, -1)
    value_logits = np.einsum("ltjc,ljc->ljt", values, per_unit[:, :-1].reshape(layers, heads, -1))
    contributions = details.attention_weights * value_logits  # [L, H, T]
    return HeatMap(
        patches=contributions[:, :, 1:].sum(1),
        heads=contributions[:, :, 1:].sum(2),
        class_token=contributions[:, :, 0].sum(1),
        constant=per_unit[:, -1],
        outliers=outliers(details.token_norms[1:]),
    )


def outliers(norms: Array) -> NDArray[np.bool_]:
    """Mask [P] of the patches whose residual before the last block is more than twice as long as the median patch's.

    Large ViTs store global information in a few patches that have no content of their own (arXiv 2309.16588): what a
    map shows there is not about that place in the image.
    """
    return norms > OUTLIER * np.median(norms)
