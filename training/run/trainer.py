"""One phase of training: an objective, its optimiser, and its steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from vitrine.models.errors import VitrineError
from vitrine.training.checkpoint import section
from vitrine.training.recipes.recipe import CascadeSection, TrainingSection
from vitrine.training.run.objective import Losses, Objective
from vitrine.training.run.parallel import gathered, like
from vitrine.training.run.progress import StepMetrics
from vitrine.training.run.schedules import learning_rate, ramp, widening


class TrainingDiverged(VitrineError):
    """The loss is not finite; the last checkpoint is still valid."""


class Trainer:
    """One phase: an objective, its optimiser, and for how many tokens each feature has been silent."""

    def __init__(
        self, fabric: Fabric, objective: Objective, phase: TrainingSection | CascadeSection, steps: int
    ) -> None:
        self.fabric, self.phase, self.steps, self.step = fabric, phase, steps, 0
        self.dictionary, self.settings, self.size = objective.dictionary, objective.settings, objective.size
        self.before_step, self.after_step = objective.before_step, objective.after_step
        self.objective: Any = fabric.setup_module(objective)
        self.parameters = dict(self.dictionary.named_parameters())
        betas = (0.9, self.settings.beta2)
        self.adam = torch.optim.Adam(self.parameters.values(), lr=phase.learning_rate, betas=betas, fused=True)
        self.optimiser: Any = fabric.setup_optimizers(self.adam)
        shape = self.dictionary.layers, self.dictionary.features
        self.silent = torch.zeros(shape, dtype=torch.long, device=fabric.device)
        sizes = [encoder.sparsifier.features for encoder in self.dictionary.encoders]
        self.exists = torch.arange(shape[1], device=fabric.device) < torch.tensor(sizes, device=fabric.device)[:, None]

    @property
    def dead(self) -> Tensor:
        """[L, F] features that have not fired for `revive_after` tokens; where F differs by layer, those that exist."""
        return self.exists & (self.silent >= self.settings.revive_after)

    def train_step(self, batch: Any) -> StepMetrics:
        """One optimiser step. Raises `TrainingDiverged` before any weight is changed."""
        rate, dead = self._prepare(), self.dead
        losses: Losses = self.objective(batch, self._pressure(), dead)
        metrics, fired = self._reduce(losses, rate, int(dead.sum()))
        if not math.isfinite(metrics.loss):
            raise TrainingDiverged(f"loss is {metrics.loss} at step {self.step}; lower the learning rate")
        self.optimiser.zero_grad(set_to_none=True)
        self.fabric.backward(losses.total)
        norm = self.fabric.clip_gradients(
            self.objective, self.optimiser, max_norm=self.settings.gradient_clip, error_if_nonfinite=False
        )
        if norm is None or not torch.isfinite(gathered(norm)):
            raise TrainingDiverged(f"the gradient is {norm} at step {self.step}; lower the learning rate")
        if metrics.dead:
            self.before_step(dead, rate, self.step / self.steps)
        self.optimiser.step()
        self.after_step()
        self.silent = (self.silent + self.size.images * self.size.tokens).masked_fill(fired, 0)
        self.step += 1
        return metrics

    def _prepare(self) -> float:
        """Set this step's learning rate and code width."""
        phase, settings = self.phase, self.settings
        decay = phase.decay_share if isinstance(phase, TrainingSection) else 1.0
        rate = learning_rate(self.step, self.steps, phase.learning_rate, phase.warmup_steps, decay)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if isinstance(phase, TrainingSection) and settings.k_start > 1:
            self.dictionary.widen(widening(self.step, self.steps, settings.k_start, settings.k_anneal_share))
        return rate

    def _pressure(self) -> float:
        """Factor of the sparsity loss at this step."""
        if not isinstance(self.phase, TrainingSection):
            return 1.0
        return ramp(self.step, self.steps, self.settings.sparsity_ramp_share)

    def _reduce(self, losses: Losses, rate: float, dead: int) -> tuple[StepMetrics, Tensor]:
        """Metrics of the step and which features fired in it, over all processes."""
        loss_part = losses.total.detach()[None] / self.size.processes
        of_cls = losses.unexplained_cls, losses.variance_cls
        unexplained_cls, variance_cls = (torch.zeros_like(losses.variance) if part is None else part for part in of_cls)
        parts: Any = torch.cat(
            [loss_part, losses.unexplained, losses.variance, losses.active, unexplained_cls, variance_cls]
        )
        fired: Any = losses.fired.long()
        if self.fabric.world_size > 1:
            parts = self.fabric.all_reduce(parts, reduce_op="sum")
            fired = self.fabric.all_reduce(fired, reduce_op="sum")
        loss, unexplained, variance, active, unexplained_cls, variance_cls = parts.split(
            [1, *[self.dictionary.layers] * 5]
        )
        r2, r2_cls = _r2(unexplained, variance), _r2(unexplained_cls, variance_cls)
        metrics = StepMetrics(
            loss=loss.item(),
            r2=r2.mean().item(),
            l0=active.mean().item(),
            dead=dead,
            rate=rate,
            r2_by_layer=r2.tolist(),
            l0_by_layer=active.tolist(),
            r2_cls=r2_cls.mean().item() if variance_cls.any() else None,
            replaced=isinstance(self.phase, CascadeSection),
        )
        return metrics, fired > 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, except weights and normalisation."""
        tensors = {"silent": self.silent.cpu()}
        for name, parameter in self.parameters.items():
            for key, value in self.adam.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = gathered(value)
        return tensors

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from a `state` saved after `step` steps of this phase."""
        self.step = step
        self.silent.copy_(tensors["silent"])
        for key, value in section(tensors, "adam").items():
            name, moment = key.rsplit(".", 1)
            parameter = self.parameters[name]
            self.adam.state[parameter][moment] = like(value, parameter)


def _r2(unexplained: Tensor, variance: Tensor) -> Tensor:
    return 1 - unexplained / variance.clamp_min(torch.finfo(variance.dtype).tiny)
