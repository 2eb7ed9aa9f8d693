"""The training loop: stream activations, reconstruct every MLP output of every token, write checkpoints, resume.

Loss: fraction of variance unexplained, averaged over layers (mean squared error of normalised outputs). A run is a
function of its recipe alone: the order of images depends on (seed, epoch), nothing else is random after the
initial weights, and a checkpoint holds the optimiser's whole state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from models.clip import Clip
from models.clt import CrossLayerTranscoder
from models.errors import VitrineError
from training.activations import Activations, Normalisation, stream
from training.checkpoint import (
    CheckpointError,
    CheckpointMeta,
    checkpoints,
    load_tensors,
    read_meta,
    save_checkpoint,
    write_meta,
)
from training.data import Folder, batches, image_folder, steps_per_epoch
from training.evaluate import evaluate, val_folder
from training.recipes import Recipe, TrainingSection


class TrainingDiverged(VitrineError):
    """The loss is no longer a number; the last checkpoint is still good."""


class StepMetrics(NamedTuple):
    loss: float  # the loss that was minimised, [CLS] weighted
    r2: float  # 1 - unexplained / variance, all tokens, mean over layers
    l0: float  # active features a token and layer


@dataclass
class Trainer:
    """A CLT under training on normalised activations, and its optimiser."""

    clt: CrossLayerTranscoder
    normalisation: Normalisation
    settings: TrainingSection
    steps: int
    step: int = 0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.clt.parameters(), lr=self.settings.learning_rate)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, then half a cosine to 0 over the last `decay_share` of the run."""
        settings = self.settings
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        start = self.steps * (1 - settings.decay_share)
        done = max(0.0, (step - start) / max(1.0, self.steps - start))
        return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))

    def train_step(self, batch: Activations) -> StepMetrics:
        """One optimiser step on every token of `batch`. Raises `TrainingDiverged` before any weight is spoilt."""
        inputs, targets = self.normalisation.inputs(batch.mlp_in), self.normalisation.targets(batch.mlp_out)
        code = self.clt.encode(inputs)
        error = (self.clt.decode(code) - targets).square().mean(-1)  # [L, N]
        weight = torch.where(batch.is_cls, self.settings.cls_weight, 1.0)
        loss = (error * weight).sum(1).mean() / weight.sum()
        if not torch.isfinite(loss):
            raise TrainingDiverged(f"loss is {loss.item()} at step {self.step}; lower the learning rate")

        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.clt.parameters(), self.settings.gradient_clip)
        self.optimiser.step()
        self.step += 1

        variance = (targets - targets.mean(1, keepdim=True)).square().mean((1, 2))
        r2 = 1 - (error.detach().mean(1) / variance).mean()
        return StepMetrics(loss.item(), r2.item(), (code.values > 0).sum(-1).float().mean().item())

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, as flat tensors."""
        tensors = {f"clt.{k}": v for k, v in self.clt.state_dict().items()}
        tensors |= {f"normalisation.{k}": v for k, v in asdict(self.normalisation).items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        return tensors

    @classmethod
    def restore(
        cls, tensors: dict[str, Tensor], clt: CrossLayerTranscoder, settings: TrainingSection, steps: int, step: int
    ) -> Trainer:
        """The trainer whose `state` was taken after `step`; `clt` gets its weights."""

        def section(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}

        clt.load_state_dict(section("clt"))
        trainer = cls(clt, Normalisation(**section("normalisation")), settings, steps, step)
        adam = trainer.optimiser.state_dict()
        for key, value in section("adam").items():
            index, name = key.split(".")
            adam["state"].setdefault(int(index), {})[name] = value
        trainer.optimiser.load_state_dict(adam)
        return trainer


def train(
    recipe: Recipe, clip: Clip, data_root: Path, out: Path, console: Console, max_steps: int | None = None
) -> Path:
    """Train `recipe`'s CLT on `clip`, or take up the run that `out` holds. Returns the last checkpoint.

    A run that reaches its end is measured on the val split. `max_steps` ends this call early, with a checkpoint; the
    schedule stays the whole run's.
    Raises `CheckpointError` if `out` holds another run.
    """
    settings = recipe.training
    folder = image_folder(data_root / recipe.data.train, clip.transform())
    val_folder(clip, data_root / recipe.data.val, recipe.data.labels)  # hours later would be too late to learn of it
    steps = steps_per_epoch(folder, settings.images_per_step) * settings.epochs
    meta = CheckpointMeta(
        step=0,
        steps=steps,
        recipe=recipe,
        clip_sha256=clip.sha256,
        layers=clip.tower.layers,
        width=clip.tower.width,
        train_images=len(folder),
    )
    clt = CrossLayerTranscoder(clip.tower.layers, clip.tower.width, recipe.clt.features, recipe.clt.k)
    checkpoint = next(reversed(checkpoints(out)), None)
    if checkpoint:
        trainer = _resume(checkpoint, meta, clt, settings)
        console.print(f"taking up {checkpoint} at step {trainer.step:,} of {steps:,}")
    else:
        clt.initialise(torch.Generator().manual_seed(settings.seed))
        trainer = Trainer(clt, _estimate_normalisation(clip, folder, settings, console), settings, steps)

    def save() -> Path:
        meta.step = trainer.step
        normalisation = trainer.normalisation
        extras = {"out_mean_cls": normalisation.out_mean_cls}
        return save_checkpoint(out, meta, normalisation.fold_into(trainer.clt), extras, trainer.state())

    stop = min(steps, trainer.step + max_steps) if max_steps else steps
    data = batches(
        folder,
        settings.images_per_step,
        settings.workers,
        seed=settings.seed,
        epochs=settings.epochs,
        skip=trainer.step,
    )
    with _progress(console) as progress, _log(out, trainer.step) as log:
        task = progress.add_task("train", total=steps, completed=trainer.step, shown="")
        for batch in islice(stream(clip.tower, data), stop - trainer.step):
            metrics = trainer.train_step(batch)
            log.write(json.dumps({"step": trainer.step, **metrics._asdict()}) + "\n")
            shown = f"loss {metrics.loss:.4f}  R² {metrics.r2:.4f}  L0 {metrics.l0:.1f}"
            progress.update(task, completed=trainer.step, shown=shown)
            if trainer.step % settings.checkpoint_every == 0 or trainer.step == stop:
                log.flush()
                checkpoint = save()
                if not console.is_terminal:
                    console.print(f"step {trainer.step:,}/{steps:,}  {shown}")
    assert checkpoint is not None  # at least one step was made, or a checkpoint taken up
    if trainer.step == steps:
        folded = trainer.normalisation.fold_into(trainer.clt)
        val = data_root / recipe.data.val
        meta.metrics, meta.val_images = evaluate(clip, folded, val, recipe.data.labels, recipe.data.templates, console)
        meta.step = steps
        write_meta(checkpoint, meta)
    return checkpoint


@contextmanager
def _log(out: Path, step: int) -> Iterator[TextIO]:
    """log.jsonl, one line a step, without those that were made after the checkpoint a run is taken up from."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True)[:step] if file.exists() else []
    with file.open("w") as log:
        log.writelines(lines)
        yield log


def _resume(checkpoint: Path, meta: CheckpointMeta, clt: CrossLayerTranscoder, settings: TrainingSection) -> Trainer:
    saved = read_meta(checkpoint)
    ours, theirs = meta.recipe, saved.recipe
    same = {
        "CLIP": saved.clip_sha256 == meta.clip_sha256,
        "[data]": (theirs.data, saved.steps) == (ours.data, meta.steps),
        "[clt]": theirs.clt == ours.clt,
        "[training]": theirs.training == ours.training,
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        raise CheckpointError(f"{checkpoint} was trained with another {', '.join(other)}; choose an empty --out")
    tensors = load_tensors(checkpoint / "state.safetensors")
    return Trainer.restore(tensors, clt, settings, meta.steps, saved.step)


def _estimate_normalisation(clip: Clip, folder: Folder, settings: TrainingSection, console: Console) -> Normalisation:
    size = min(settings.images_per_step, len(folder))
    data = batches(folder, size, settings.workers, seed=settings.seed + 1, epochs=1)
    wanted = max(1, min(settings.normalisation_images, len(folder)) // size)
    with console.status(f"estimating the activations' scale over {wanted * size:,} images"):
        return Normalisation.estimate(islice(stream(clip.tower, data), wanted))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
