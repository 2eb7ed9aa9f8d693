"""The objective of residual SAEs (arXiv 2509.17401), on tokens standardised each by itself.

    reconstruction   mean over layers and tokens of |x - x^|^2 / d, [CLS] a token like any other
    dead features    `dead_weight` times the mean over layers and tokens of |(x - x^) - e^|^2 / d, e^ what the
                     `dead_features` dead features with the largest pre-activations write (AuxK, arXiv 2406.04093);
                     x - x^ is held fast here, so that this loss moves dead features alone. One whose
                     pre-activations are all negative is beyond its reach: biases are raised, too
    sparsity         jumprelu only, as a CLT's (`training.run.objective`)

Every term is a sum over this process's tokens divided by the number of tokens of the whole step, so that data-parallel
processes that average their gradients are equivalent to a single process. Decoder rows have length 1 after every step.

L blocks, N tokens, F features of the largest SAE, d width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.training.data.activations import Residuals
from vitrine.training.recipes.recipe import ResidualSaeSection, TrainingSection
from vitrine.training.run.objective import Losses, Objective, StepSize, excess, fired, revive


class SaeReconstruction(Objective):
    """`Residuals` -> `Losses`."""

    dictionary: ResidualSaes

    def __init__(
        self,
        saes: ResidualSaes,
        variance: Tensor,
        section: ResidualSaeSection,
        settings: TrainingSection,
        size: StepSize,
    ) -> None:
        """variance [L - 1]: `token_variance`."""
        super().__init__(saes, settings, size)
        self.variance, self.section = variance, section

    def forward(self, batch: Residuals, pressure: float = 0.0, dead: Tensor | None = None) -> Losses:
        """As `Objective`; the loss of dead features counts where there are any."""
        saes, size, section = self.dictionary, self.size, self.section
        count = size.images * size.tokens
        x = standardise(batch.stream).x
        codes, outputs = saes(x, batch.is_cls)
        missed = x - outputs
        error = missed.square().mean(-1)  # [L - 1, N]
        total = error.sum(1).mean()
        if dead is not None and section.dead_weight:
            total = total + section.dead_weight * self._dead_error(x, missed.detach(), dead)
        total = total / count
        if saes.architecture.sparsifier == "jumprelu" and pressure:
            weight = pressure * self.settings.sparsity_weight
            total = total + weight * excess(saes.architecture, codes, batch.is_cls) / size.processes
        return Losses(
            total * size.processes,
            error.detach().sum(1) / count,
            self.variance * (len(batch.is_cls) / count),
            torch.stack([code.active.detach().sum() for code in codes]) / count,
            torch.stack([fired(code, saes.features) for code in codes]),
        )

    def before_step(self, dead: Tensor, rate: float, done: float) -> None:
        """As a CLT's (`training.run.objective.revive`)."""
        revive(self.dictionary, self.settings, dead, rate, done)

    def after_step(self) -> None:
        """Decoder rows of length 1."""
        self.dictionary.renormalise()

    def _dead_error(self, x: Tensor, missed: Tensor, dead: Tensor) -> Tensor:
        """Sum over tokens, mean over layers, of the squared error of what dead features make of `missed`; a layer
        without dead features counts as 0."""
        total = x.new_zeros(())
        for layer, features in enumerate(dead):
            if features.any():
                chosen = features.nonzero()[:, 0]
                activations = self._of_dead(layer, x[layer], chosen)
                written = self.dictionary.decoders[layer].of_features(activations, chosen)
                total = total + (written - missed[layer]).square().mean(-1).sum()
        return total / len(dead)

    def _of_dead(self, layer: int, x: Tensor, features: Tensor) -> Tensor:
        """Activations of the dead features [N, M]: the `dead_features` largest of each token, the others 0."""
        encoder = self.dictionary.encoders[layer]
        preactivations = encoder.of_features(x, features)
        signed, places = encoder.sparsifier.signed, self.section.dead_features
        activations = preactivations if signed else preactivations.relu()
        if len(features) <= places:
            return activations
        largest = (activations.abs() if signed else activations).topk(places, dim=-1).indices
        return torch.zeros_like(activations).scatter(1, largest, activations.gather(1, largest))


def token_variance(batches: Iterable[Residuals]) -> Tensor:
    """The variance per dimension of standardised tokens about their mean, over all tokens of all batches: [L - 1]."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = standardise(batch.stream.double()).x
        count += x.shape[1]
        total, squares = total.to(x) + x.sum(1), squares.to(x) + x.square().sum((1, 2))
    return ((squares / count - (total / count).square().sum(-1)) / total.shape[-1]).float()
