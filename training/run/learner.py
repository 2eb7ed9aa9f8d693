"""What a run trains, as far as it depends on the kind of dictionary: its weights, what it learns from, its objective.

`training.run.run` does the rest: images, steps, phases, checkpoints, resuming. There is a learner for each kind of
recipe: `training.run.clt_learner` and `training.run.sae_learner`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vitrine.models.bundle.manifest import Metrics
from vitrine.models.clip.loading import Clip
from vitrine.training.checkpoint import section
from vitrine.training.data.activations import Activations, Residuals
from vitrine.training.data.held_out import HeldOut
from vitrine.training.recipes.recipe import CascadeSection, Recipe, TrainingSection
from vitrine.training.run.objective import Objective, StepSize
from vitrine.training.run.parallel import gathered

Context = Callable[[], AbstractContextManager[object]]


class Learner(ABC):
    """Of one kind of recipe."""

    activations: type[Activations] | type[Residuals]  # what it learns from
    dictionary: Any  # a torch module; Any: of the learner's own kind

    def __init__(self, kind: str, clip: Clip) -> None:
        self.kind, self.clip = kind, clip

    @property
    def later_phases(self) -> tuple[CascadeSection, ...]:
        """Phases after the reconstruction."""
        return ()

    @property
    @abstractmethod
    def statistics(self) -> dict[str, Tensor]:
        """What was measured of the activations before the first step."""

    @abstractmethod
    def initialise(self, pixels: Iterable[tuple[Tensor, Tensor]], device: torch.device, context: Context) -> None:
        """The first weights, and the statistics, from batches of images; the dictionary is moved to the device."""

    @abstractmethod
    def restore_statistics(self, checkpoint: Path, statistics: dict[str, Tensor], device: torch.device) -> None:
        """Take up the `statistics` of a checkpoint. Raises `CheckpointError` if they are not this version's."""

    @abstractmethod
    def fresh(self) -> Any:
        """An empty dictionary of the same architecture."""

    @abstractmethod
    def objective(
        self, phase: TrainingSection | CascadeSection, size: StepSize, labels: Callable[[], Tensor]
    ) -> Objective:
        """The objective of a phase; labels: gives the label embeddings [labels, D] to those that need them."""

    @abstractmethod
    def finished(self, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
        """From a `state`: the dictionary as evaluation reads it, and other tensors to be saved with it."""

    @abstractmethod
    def measure(self, checkpoint: Path, images: HeldOut, recipe: Recipe, console: Console) -> tuple[Metrics, list[str]]:
        """Metrics of a checkpoint on held-out images, and the lines that say them."""

    def weights(self) -> dict[str, Tensor]:
        """All weights, on the CPU; in a sharded run every process must take part."""
        return {name: gathered(tensor) for name, tensor in self.dictionary.state_dict().items()}

    def unwrap(self) -> None:
        """Rebuild the dictionary without the previous phase's changes: sharded weights, hooks, widened codes."""
        weights = self.weights()
        self.dictionary = self.fresh()
        self.dictionary.load_state_dict(weights)

    def state(self) -> dict[str, Tensor]:
        """Weights and statistics."""
        weights = {f"{self.kind}.{name}": tensor for name, tensor in self.weights().items()}
        return weights | {f"normalisation.{name}": gathered(tensor) for name, tensor in self.statistics.items()}

    def restore(self, checkpoint: Path, state: dict[str, Tensor], device: torch.device) -> None:
        """Continue from a `state`. Raises `CheckpointError` if another version began the run."""
        self.dictionary.load_state_dict(section(state, self.kind))
        self.restore_statistics(checkpoint, section(state, "normalisation"), device)
