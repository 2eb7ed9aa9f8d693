"""Where in the image an attention row comes from: split by patch and by head, adding up. numpy only.

A head of block l gives [CLS] sum_p a[h, p] v[p, h], a the attention weights and v the value channels of token p that
belong to head h, and the block's output matrix takes it to the residual stream, where `models.account.ledger` folds it
on to the label. All of this is linear once the weights a are known, so for a direction t in embedding space

    c[l, h, p] = s / (sigma |z|) * a[l, h, p] <v[l, p, h], A[l, h] t>          A: `Tower.attention_fold`

is what head h brought from token p, in logits, and with a constant for each block (the values' and output's biases)

    attention row l  =  sum over patches and heads  +  the class token's own part  +  constant l  +  rounding.

The weights a are taken as they are: a map says what was read where, not why it was looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array, Decomposition, Details

OUTLIER = 2.0  # times the median norm of the patches


@dataclass(frozen=True)
class HeatMap:
    """An account's attention rows, in logits. L layers, H heads, P patches row by row."""

    patches: Array  # [L, P] what came from each patch, over all heads
    heads: Array  # [L, H] what each head brought from the patches, over all of them
    class_token: Array  # [L] what [CLS] took from itself
    constant: Array  # [L] the biases' part: the same for every image, but for its scale
    outliers: NDArray[np.bool_]  # [P] patches whose residual is unusually long, see `outliers`


def heat_map(
    parts: Decomposition, details: Details, attention_fold: Array, direction: Array, logit_scale: float
) -> HeatMap:
    """The attention rows of s <direction, z/|z|>, split. attention_fold [L, d + 1, D], see `Tower.attention_fold`."""
    layers, heads, tokens = details.attention_weights.shape
    per_unit = attention_fold @ direction.astype(np.float32) * (logit_scale / (parts.sigma * parts.norm))  # [L, d + 1]
    values = details.attention_values.reshape(layers, tokens, heads, -1)
    offered = np.einsum("ltjc,ljc->ljt", values, per_unit[:, :-1].reshape(layers, heads, -1))
    taken = details.attention_weights * offered  # [L, H, T]
    return HeatMap(
        patches=taken[:, :, 1:].sum(1),
        heads=taken[:, :, 1:].sum(2),
        class_token=taken[:, :, 0].sum(1),
        constant=per_unit[:, -1],
        outliers=outliers(details.token_norms[1:]),
    )


def outliers(norms: Array) -> NDArray[np.bool_]:
    """Patches [P] whose residual before the last block is more than twice as long as the median patch's.

    Large ViTs write global information into a few patches without content of their own (arXiv 2309.16588): what a map
    shows there is not about that place in the image.
    """
    return norms > OUTLIER * np.median(norms)
