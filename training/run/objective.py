"""What is minimised: `Objective`, and a CLT's on CLIP's own activations, the unexplained share of variance and a
sparsity loss.

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

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes, SaeArchitecture
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import CltTrainingSection, TrainingSection
from vitrine.training.run.parallel import like

_TINY = 1e-12  # length of a target below which it counts as this long


class Losses(NamedTuple):
    """Losses of one step. Their sums over processes are those of the whole step; `total` is to be differentiated."""

    total: Tensor  # [] multiplied by the number of processes, because gradients are averaged
    unexplained: Tensor  # [L] error of the tokens that R^2 counts, weighted equally
    variance: Tensor  # [L] of these tokens' targets, what `unexplained` would be of their mean
    active: Tensor  # [L] active features per token
    fired: Tensor  # [L, F] bool
    # The same two of [CLS], outliers included and about its own mean; None: not known (of SAEs, whose tokens are alike)
    unexplained_cls: Tensor | None = None
    variance_cls: Tensor | None = None


class StepSize(NamedTuple):
    """Size of the whole step, over all processes."""

    images: int
    tokens: int  # per image
    processes: int = 1

    def weight(self, cls_weight: float) -> float:
        """Sum of the tokens' weights, outliers counted as any other."""
        return self.images * (self.tokens - 1 + cls_weight)


class Objective(nn.Module, ABC):
    """A phase's objective as a module, so that a distributed engine can wrap it."""

    def __init__(
        self, dictionary: CrossLayerTranscoder | ResidualSaes, settings: TrainingSection, size: StepSize
    ) -> None:
        super().__init__()
        self.dictionary, self.settings, self.size = dictionary, settings, size

    @abstractmethod
    def forward(self, batch: Any, pressure: float = 0.0, dead: Tensor | None = None) -> Losses:
        """pressure: factor of the sparsity loss, from 0 to 1; dead [L, F] bool: features that have long been silent."""

    def before_step(self, dead: Tensor, rate: float, done: float) -> None:
        """Called before each step of the optimiser, at learning rate `rate`; done: share of the phase that is."""

    def after_step(self) -> None:
        """Called after each step of the optimiser."""


@torch.no_grad()
def revive(
    dictionary: CrossLayerTranscoder | ResidualSaes, settings: TrainingSection, dead: Tensor, rate: float, done: float
) -> None:
    """Raise the bias of each dead feature by `revive_rate` learning rates per step until it fires again.

    Only in the first `revive_share` of the reconstruction: a feature revived later has no time left to learn, and takes
    places in the code from trained features. Based on the pre-activation loss of "Circuit tracing" (Ameisen et al.
    2025), but only for the bias. It is not a gradient, because Adam's moments would keep it for thousands of steps,
    during which the bias of a revived feature could not fall; some then fired on every fifth token for the rest of the
    run. AuxK (arXiv 2406.04093), a loss that moves dead features towards the unexplained error, reaches none whose
    pre-activation is negative at every token, and that is what a dead feature's is (training/RESULTS.md).
    """
    if done >= settings.revive_share:
        return
    for encoder, silent in zip(dictionary.encoders, dead, strict=True):
        silent = silent[: len(encoder.bias)]  # F may differ by layer
        encoder.bias.add_(like(settings.revive_rate * rate * silent.to(encoder.bias.dtype), encoder.bias))


class Reconstruction(Objective):
    """A CLT's objective: `Activations` -> `Losses`."""

    dictionary: CrossLayerTranscoder
    settings: CltTrainingSection

    def __init__(
        self, clt: CrossLayerTranscoder, normalisation: Normalisation, settings: CltTrainingSection, size: StepSize
    ) -> None:
        super().__init__(clt, settings, size)
        self.normalisation = normalisation
        self.cls_weight = settings.cls_weight or (size.tokens - 1) ** 0.5

    def forward(self, batch: Activations, pressure: float = 0.0, dead: Tensor | None = None) -> Losses:
        """As `Objective`; dead features have no loss of their own: `before_step`."""
        settings, size = self.settings, self.size
        inputs, targets = self.normalisation.inputs(batch.mlp_in), self.normalisation.targets(batch.mlp_out)
        codes, outputs = self.dictionary(inputs, batch.is_cls)
        error = (outputs - targets).square().mean(-1)  # [L, N]
        total = self.weighted(error, batch)
        if self.dictionary.architecture.sparsifier == "jumprelu" and pressure:
            weight = pressure * settings.sparsity_weight
            total = total + weight * excess(self.dictionary.architecture, codes, batch.is_cls) / size.processes
        count = size.images * size.tokens
        return Losses(
            total * size.processes,
            *self.unexplained(error, batch),
            torch.stack([code.active.detach().sum() for code in codes]) / count,
            torch.stack([fired(code, self.dictionary.features) for code in codes]),
            *self.unexplained_cls(error, batch),
        )

    def before_step(self, dead: Tensor, rate: float, done: float) -> None:
        """As `Objective`."""
        revive(self.dictionary, self.settings, dead, rate, done)

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

    def unexplained_cls(self, error: Tensor, batch: Activations) -> tuple[Tensor, Tensor]:
        """The same of [CLS], beside its variance in this run's images: [L] each."""
        n, count = self.normalisation, self.size.images * self.size.tokens
        of_cls = (n.out_scale_cls / n.out_scale).square()
        return error.detach()[:, batch.is_cls].sum(1) / count, of_cls * (batch.is_cls.sum() / count)


def excess(architecture: Architecture | SaeArchitecture, codes: list[SortedCode], is_cls: Tensor) -> Tensor:
    """(L0 / target - 1)^2 over this process's tokens, mean over layers and token types."""
    terms = []
    for chosen, targets in ((~is_cls, architecture.k), (is_cls, architecture.k_cls)):
        if chosen.any():
            terms += [(code.active[chosen].mean() / k - 1).square() for code, k in zip(codes, targets, strict=True)]
    return torch.stack(terms).mean()


def fired(code: SortedCode, features: int) -> Tensor:
    """Which of so many features have an activation in a code: [features] bool."""
    found = torch.zeros(features, dtype=torch.bool, device=code.indices.device)
    return found.index_fill_(0, code.indices[code.values != 0], True)
