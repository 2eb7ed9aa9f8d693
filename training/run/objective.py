"""The training objective on CLIP's own activations: the unexplained share of variance, and a sparsity loss.

    reconstruction   mean over layers and tokens of w |y - y'|^2 / d on normalised outputs, with the weights
                       patches   min(1, (3 m / |y|)^2), m the layer's median length: 1, except for outlier tokens, which
                                 count by their relative error, as one that is 3 m long
                       [CLS]     `cls_weight` / v, v the variance of [CLS] in that layer: its own unexplained share.
                                 [CLS] varies far less than the patches, and in some layers next to nothing
    sparsity         jumprelu only: mean over layers and token types of (L0 / target - 1)^2 (arXiv 2407.14435, 5.3)

By default [CLS] weighs as the geometric mean of one patch and all patches of an image, sqrt(T - 1). Measured in
training/RESULTS.md.

Every term is a sum over this process's tokens divided by the number of tokens of the whole step, so that data-parallel
processes that average their gradients are equivalent to a single process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import TrainingSection

_TINY = 1e-12  # length of a target below which it counts as this long


class Losses(NamedTuple):
    """Losses of one step. Their sums over processes are those of the whole step; `total` is to be differentiated."""

    total: Tensor  # [] multiplied by the number of processes, because gradients are averaged
    unexplained: Tensor  # [L] error of the tokens that are no outliers, weighted equally
    kept: Tensor  # [L] share of these tokens
    active: Tensor  # [L] active features per token
    fired: Tensor  # [L, F] bool


class StepSize(NamedTuple):
    """Size of the whole step, over all processes."""

    images: int
    tokens: int  # per image
    processes: int = 1

    def weight(self, cls_weight: float) -> float:
        """Sum of the tokens' weights, outliers counted as any other."""
        return self.images * (self.tokens - 1 + cls_weight)


class Reconstruction(nn.Module):
    """The objective as a module, so that a distributed engine can wrap it: batch -> `Losses`."""

    def __init__(
        self, clt: CrossLayerTranscoder, normalisation: Normalisation, settings: TrainingSection, size: StepSize
    ) -> None:
        super().__init__()
        self.clt, self.normalisation, self.settings, self.size = clt, normalisation, settings, size
        self.cls_weight = settings.cls_weight or (size.tokens - 1) ** 0.5

    def forward(self, batch: Activations, pressure: float = 0.0) -> Losses:
        """pressure: factor of the sparsity loss, from 0 to 1."""
        settings, size = self.settings, self.size
        inputs, targets = self.normalisation.inputs(batch.mlp_in), self.normalisation.targets(batch.mlp_out)
        codes, outputs = self.clt(inputs, batch.is_cls)
        error = (outputs - targets).square().mean(-1)  # [L, N]
        total = self.weighted(error, batch)
        if self.clt.architecture.sparsifier == "jumprelu" and pressure:
            total = total + pressure * settings.sparsity_weight * self._excess(codes, batch.is_cls) / size.processes
        count = size.images * size.tokens
        return Losses(
            total * size.processes,
            *self.unexplained(error, batch),
            torch.stack([code.active.detach().sum() for code in codes]) / count,
            torch.stack([_fired(code, self.clt.features) for code in codes]),
        )

    def weighted(self, error: Tensor, batch: Activations) -> Tensor:
        """This process's part of the step's weighted mean of errors [L, N]."""
        n = self.normalisation
        cls = self.cls_weight * (n.out_scale / n.out_scale_cls).square()
        patches = (n.outlier_norm[:, None] / batch.mlp_out.norm(dim=-1).clamp_min(_TINY)).clamp_max(1).square()
        weights = torch.where(batch.is_cls, cls[:, None], patches)
        return (error * weights).sum(1).mean() / self.size.weight(self.cls_weight)

    def unexplained(self, error: Tensor, batch: Activations) -> tuple[Tensor, Tensor]:
        """This process's part of the step's mean error over tokens that are no outliers, and of their share: [L] each.

        The targets of these tokens have variance 1, so the ratio of the two is the unexplained share of variance.
        """
        kept = self.normalisation.kept(batch.mlp_out)
        count = self.size.images * self.size.tokens
        return error.detach().where(kept, 0).sum(1) / count, kept.sum(1) / count

    def _excess(self, codes: list[SortedCode], is_cls: Tensor) -> Tensor:
        """(L0 / target - 1)^2 over this process's tokens, mean over layers and token types."""
        architecture, terms = self.clt.architecture, []
        for chosen, targets in ((~is_cls, architecture.k), (is_cls, architecture.k_cls)):
            if chosen.any():
                terms += [(code.active[chosen].mean() / k - 1).square() for code, k in zip(codes, targets, strict=True)]
        return torch.stack(terms).mean()


def _fired(code: SortedCode, features: int) -> Tensor:
    fired = torch.zeros(features, dtype=torch.bool, device=code.indices.device)
    return fired.index_fill_(0, code.indices[code.values != 0], True)
