"""Training a Cross-Layer Transcoder: from MLP inputs to MLP outputs, then, with a [cascade], in the MLPs' place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.checkpoint import CheckpointError, load_clt, section
from vitrine.training.data.activations import Activations
from vitrine.training.data.held_out import HeldOut
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.data.stream import stream
from vitrine.training.evaluation.evaluate import describe, evaluate_summary
from vitrine.training.recipes.recipe import CascadeSection, CltRecipe, Recipe, TrainingSection
from vitrine.training.run.cascade import Cascade
from vitrine.training.run.learner import Context, Learner
from vitrine.training.run.neurons import start_from_neurons
from vitrine.training.run.objective import Objective, Reconstruction, StepSize


class CltLearner(Learner):
    """Of `CltRecipe`."""

    activations = Activations
    dictionary: CrossLayerTranscoder
    normalisation: Normalisation  # from `initialise` or `restore` on

    def __init__(self, recipe: CltRecipe, clip: Clip) -> None:
        super().__init__(recipe.kind, clip)
        self.recipe = recipe
        self.dictionary = CrossLayerTranscoder(recipe.clt.architecture(clip.tower.layers, clip.tower.width))

    @property
    def later_phases(self) -> tuple[CascadeSection, ...]:
        """[cascade], if there is one."""
        return () if self.recipe.cascade is None else (self.recipe.cascade,)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The normalisation."""
        return asdict(self.normalisation)

    def initialise(self, pixels: Iterable[tuple[Tensor, Tensor]], device: torch.device, context: Context) -> None:
        """As `Learner`; from the MLPs' neurons if the recipe says so."""
        clt, settings = self.dictionary, self.recipe.training
        clt.initialise(torch.Generator().manual_seed(settings.seed))
        batches = stream(Activations, self.clip.tower, pixels, context)
        first = next(batches)
        self.normalisation = Normalisation.estimate(chain([first], batches))
        clt.to(device)
        if settings.start == "neurons":
            start_from_neurons(clt, self.clip.tower, self.normalisation, first)
        clt.calibrate(self.normalisation.inputs(first.mlp_in))

    def restore_statistics(self, checkpoint: Path, statistics: dict[str, Tensor], device: torch.device) -> None:
        """As `Learner`."""
        if statistics.keys() != {field.name for field in fields(Normalisation)}:
            raise CheckpointError(
                f"{checkpoint} was begun by a version of Vitrine that scaled activations differently; it can be "
                f"evaluated and exported, but not trained further: choose an empty --out"
            )
        self.normalisation = Normalisation(**statistics).to(device)

    def fresh(self) -> CrossLayerTranscoder:
        """As `Learner`."""
        return CrossLayerTranscoder(self.dictionary.architecture)

    def objective(
        self, phase: TrainingSection | CascadeSection, size: StepSize, labels: Callable[[], Tensor]
    ) -> Objective:
        """As `Learner`."""
        reconstruction = Reconstruction(self.dictionary, self.normalisation, self.recipe.training, size)
        if isinstance(phase, TrainingSection):
            return reconstruction
        return Cascade(self.clip.tower, reconstruction, phase, labels(), self.clip.logit_scale)

    def finished(self, state: dict[str, Tensor]) -> tuple[CrossLayerTranscoder, dict[str, Tensor]]:
        """The CLT on raw activations, and the mean [CLS] output of every MLP, which a bundle needs."""
        clt = self.fresh()
        clt.load_state_dict(section(state, self.kind))
        normalisation = Normalisation(**section(state, "normalisation"))
        return normalisation.fold_into(clt), {"out_mean_cls": normalisation.out_mean_cls}

    def measure(self, checkpoint: Path, images: HeldOut, recipe: Recipe, console: Console) -> tuple[Metrics, list[str]]:
        """As `Learner`."""
        clt, _, _ = load_clt(checkpoint)
        metrics = evaluate_summary(self.clip, clt, images, recipe.data.templates, console)
        return metrics, describe(metrics)
