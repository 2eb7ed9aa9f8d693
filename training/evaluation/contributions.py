"""How much each source layer contributes to a target layer's output: the contribution score of arXiv 2604.13304.

With c_{i->j} = z_i W^{i->j}, which source layer i writes to target layer j at one token, and
y_j = sum_{i <= j} c_{i->j} (no bias),

    C_{i->j} = mean over tokens of <c_{i->j}, y_j> / |y_j|^2

so that sum_i C_{i->j} = 1 for every token, and for the mean. A large part of this *raw* score may be constant: what a
layer writes equally for every image acts as a bias. The *centred* score removes it: c and y are replaced by

    c_{i->j} - mean c_{i->j}          y_j - mean y_j = sum_i (c_{i->j} - mean c_{i->j})

with the means over the data set, per pair (i, j) and token type ([CLS], patches); it sums to 1 too. As c is linear in
z, mean c_{i->j} = (mean z_i) W^{i->j}: only mean codes have to be collected beforehand.

A token with y_j = 0 (no feature active) has no score and is left out. "all" tokens: the mean over all of them.

L layers, N tokens, S source layers of a target, d width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitrine.models.account.windows import Tokens
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.projection import projection_scores
from vitrine.models.dictionary.sparse_products import SortedCode

CLS, PATCHES = 0, 1  # indices of the token types in sums


def by_type(values: Tensor, is_cls: Tensor) -> Tensor:
    """Sums of values [..., N] over [CLS] and over patches: [2, ...], float64 on the CPU."""
    kinds = torch.stack([is_cls, ~is_cls]).double()
    return torch.einsum("...n,kn->k...", values.double(), kinds).cpu()


class ScoreMean:
    """Accumulates the mean of C_{i->j} over tokens."""

    def __init__(self, layers: int) -> None:
        self._sums = torch.zeros(2, layers, layers, dtype=torch.float64)  # type, target, source
        self._counts = torch.zeros(2, layers, dtype=torch.float64)

    def update(self, target: int, sources: Iterable[int], parts: Tensor, is_cls: Tensor) -> None:
        """parts [S, N, d]: what `sources` write to `target`."""
        scores = projection_scores(parts, 0)
        self._sums[:, target, list(sources)] += by_type(scores, is_cls)
        self._counts[:, target] += by_type((scores != 0).any(0), is_cls)

    def matrix(self, tokens: Tokens) -> Tensor:
        """C [target, source], float64; a row of zeros where no token had a score."""
        kinds = {"all": [CLS, PATCHES], "cls": [CLS], "patches": [PATCHES]}[tokens]
        return self._sums[kinds].sum(0) / self._counts[kinds].sum(0).clamp_min(1)[:, None]


def add_codes(sums: Tensor, codes: list[SortedCode], is_cls: Tensor) -> None:
    """Add every feature's activations over the tokens of a batch to `sums` [2, L, F]."""
    for layer, code in enumerate(codes):
        for kind, mask in enumerate((is_cls, ~is_cls)):
            values, indices = code.values[mask].double().flatten(), code.indices[mask].flatten()
            sums[kind, layer] += torch.bincount(indices, values, sums.shape[-1]).cpu()


@torch.no_grad()
def mean_contributions(clt: CrossLayerTranscoder, mean_codes: Tensor) -> list[Tensor]:
    """Mean c_{i->j} for mean codes [2, L, F]: per target [2, S, d], on the CLT's device."""
    means = []
    for decoder in clt.decoders:
        weights = zip(decoder.sources, decoder.weights, strict=True)
        means.append(torch.stack([mean_codes[:, source].to(weight) @ weight for source, weight in weights], dim=1))
    return means


def centre_(parts: Tensor, means: Tensor, is_cls: Tensor) -> Tensor:
    """c - mean c, with the mean of each token's type: parts [S, N, d], which are changed; means [2, S, d]."""
    return parts.sub_(torch.where(is_cls[:, None], means[CLS][:, None], means[PATCHES][:, None]))
