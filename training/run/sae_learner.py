"""Training residual SAEs: the stream after every block but the last, from itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.training.checkpoint import load_residual_saes, section
from vitrine.training.data.activations import Residuals
from vitrine.training.data.held_out import HeldOut
from vitrine.training.data.stream import stream
from vitrine.training.evaluation.evaluate import describe
from vitrine.training.evaluation.residual_sae import evaluate_summary
from vitrine.training.recipes.recipe import CascadeSection, Recipe, ResidualSaeRecipe, TrainingSection
from vitrine.training.run.learner import Context, Learner
from vitrine.training.run.objective import StepSize
from vitrine.training.run.sae_objective import SaeReconstruction, token_variance


class SaeLearner(Learner):
    """Of `ResidualSaeRecipe`."""

    activations = Residuals
    dictionary: ResidualSaes
    variance: Tensor  # from `initialise` or `restore` on

    def __init__(self, recipe: ResidualSaeRecipe, clip: Clip) -> None:
        super().__init__(recipe.kind, clip)
        self.recipe = recipe
        self.dictionary = ResidualSaes(recipe.residual_sae.architecture(clip.tower.layers, clip.tower.width))

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The variance of standardised tokens."""
        return {"variance": self.variance}

    def initialise(self, pixels: Iterable[tuple[Tensor, Tensor]], device: torch.device, context: Context) -> None:
        """As `Learner`."""
        saes = self.dictionary
        saes.initialise(torch.Generator().manual_seed(self.recipe.training.seed))
        batches = stream(Residuals, self.clip.tower, pixels, context)
        first = next(batches)
        self.variance = token_variance(chain([first], batches))
        saes.to(device)
        saes.calibrate(standardise(first.stream).x)

    def restore_statistics(self, checkpoint: Path, statistics: dict[str, Tensor], device: torch.device) -> None:
        """As `Learner`."""
        self.variance = statistics["variance"].to(device)

    def fresh(self) -> ResidualSaes:
        """As `Learner`."""
        return ResidualSaes(self.dictionary.architecture)

    def objective(
        self, phase: TrainingSection | CascadeSection, size: StepSize, labels: Callable[[], Tensor]
    ) -> SaeReconstruction:
        """As `Learner`; there is but one phase."""
        recipe = self.recipe
        return SaeReconstruction(self.dictionary, self.variance, recipe.residual_sae, recipe.training, size)

    def finished(self, state: dict[str, Tensor]) -> tuple[ResidualSaes, dict[str, Tensor]]:
        """The SAEs as they are: they standardise what they read."""
        saes = self.fresh()
        saes.load_state_dict(section(state, self.kind))
        return saes, {}

    def measure(self, checkpoint: Path, images: HeldOut, recipe: Recipe, console: Console) -> tuple[Metrics, list[str]]:
        """As `Learner`."""
        saes, _ = load_residual_saes(checkpoint)
        metrics = evaluate_summary(self.clip, saes, images, recipe.data.templates, console)
        return metrics, describe(metrics, "the stream after every block")
