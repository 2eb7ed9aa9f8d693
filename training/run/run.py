"""A training run: stream activations, train phase by phase, write checkpoints, resume interrupted runs.

What is trained is a learner's business (`training.run.learner`). A run has one or two phases: reconstruction
(`training.run.objective`, `training.run.sae_objective`), then, if the recipe has a [cascade], fine-tuning under
replacement (`training.run.cascade`). It is determined by its recipe: the tokens of a step depend on the seed and
the step number, nothing else is random after the initial weights, and a checkpoint contains everything that the next
step depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.clip.tokens import UnsupportedTokenizer, convert_tokenizer
from vitrine.models.files.writing import prepare_folder
from vitrine.models.progress import track
from vitrine.models.stopping import Stopped, noted_signals
from vitrine.models.texts.labels import notices_of
from vitrine.training.checkpoint import (
    META,
    CheckpointError,
    CheckpointMeta,
    checkpoints,
    load_tensors,
    read_meta,
    save_checkpoint,
    write_meta,
)
from vitrine.training.data.cache import ActivationCache, open_cache
from vitrine.training.data.classes import check_classes
from vitrine.training.data.held_out import held_out
from vitrine.training.data.images import Plan, load
from vitrine.training.data.sources import open_images
from vitrine.training.data.stream import steps
from vitrine.training.evaluation.evaluate import cls_warning, label_embeddings
from vitrine.training.recipes.recipe import (
    CascadeSection,
    CltRecipe,
    RecipeError,
    ResidualSaeRecipe,
    TrainingSection,
)
from vitrine.training.recipes.settings import differences
from vitrine.training.run.clt_learner import CltLearner
from vitrine.training.run.learner import Learner
from vitrine.training.run.objective import StepSize
from vitrine.training.run.parallel import make_fabric, signal_of_any
from vitrine.training.run.progress import track_progress
from vitrine.training.run.sae_learner import SaeLearner
from vitrine.training.run.trainer import Trainer


def train(
    recipe: CltRecipe | ResidualSaeRecipe,
    clip: Clip,
    data_root: Path,
    out: Path,
    console: Console,
    fabric: Fabric | None = None,
    *,
    max_steps: int | None = None,
    wandb_project: str | None = None,
) -> Path:
    """Train `recipe`'s dictionary on `clip`, or resume the run in `out`. Returns the last checkpoint.

    A completed run is evaluated on the val split. `max_steps` ends this call early, with a checkpoint; the schedule
    remains that of the whole run. With several processes each of them calls this function.
    Raises `CheckpointError` if `out` contains another run, `TrainingDiverged` if the loss is not finite,
    `FileError` if `out` cannot be written: the last whole checkpoint stays. After SIGTERM or Ctrl-C, of any process,
    the step in hand is finished and saved, and `Stopped` raised.
    """
    fabric = fabric or make_fabric(precision=recipe.training.precision)
    if fabric.is_global_zero:
        prepare_folder(out)
    run = _Run(recipe, clip, data_root, out, console if fabric.is_global_zero else Console(quiet=True), fabric)
    stop = min(run.steps, run.done + max_steps) if max_steps else run.steps
    with (
        noted_signals() as noted,
        track_progress(
            out,
            run.done,
            run.steps,
            run.console,
            first=fabric.is_global_zero,
            wandb_project=wandb_project,
            name=recipe.name,
        ) as report,
    ):
        trainer, signalled = None, None
        for phase in run.phases:
            if run.done >= min(phase.end, stop) or signalled:
                continue
            trainer = run.enter(phase, trainer)
            for batch in islice(run.batches(phase), stop - run.done):
                metrics = trainer.train_step(batch)
                run.done += 1
                report.add(run.done, metrics, trainer.size.images * trainer.size.tokens)
                signalled = signal_of_any(fabric, noted.number)
                if run.done % recipe.training.checkpoint_every == 0 or run.done in (stop, phase.end) or signalled:
                    report.flush()
                    run.save(trainer)
                if signalled:
                    break
    signalled = signalled or signal_of_any(fabric, noted.number)  # it may have come while the last one was written
    fabric.barrier()  # the first process may still be writing it
    checkpoint = checkpoints(out)[-1]
    run.images.print_broken(run.console, checkpoint / META)
    if signalled:
        raise Stopped(
            signalled,
            f"{checkpoint} is written (step {run.done:,} of {run.steps:,}); run the same command again to continue "
            f"from there",
        )
    if run.done == run.steps and run.meta.metrics.r2 is None and fabric.is_global_zero:
        run.measure(checkpoint)
    fabric.barrier()
    return checkpoint


class _Phase(NamedTuple):
    settings: TrainingSection | CascadeSection
    start: int  # step of the run
    end: int


def _label_warnings(clip: Clip, labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """What there is to say of the labels that metrics and bundle will have."""
    try:
        reader = convert_tokenizer(clip.tokenizer).reader()
    except UnsupportedTokenizer as error:
        return [f"{error}. No bundle can be exported"]
    return [notice.message for notice in notices_of(reader, labels, templates)]


class _Run:
    """The state of a run: images, learner, phases, and the number of completed steps."""

    def __init__(
        self,
        recipe: CltRecipe | ResidualSaeRecipe,
        clip: Clip,
        data_root: Path,
        out: Path,
        console: Console,
        fabric: Fabric,
    ) -> None:
        self.recipe, self.clip, self.out, self.console, self.fabric = recipe, clip, out, console, fabric
        settings, tower = recipe.training, clip.tower
        data = recipe.data
        self.learner: Learner = CltLearner(recipe, clip) if isinstance(recipe, CltRecipe) else SaeLearner(recipe, clip)
        self.images = open_images(data.train, data_root, clip.transform(), data.max_broken, data.classes)
        self.images.print_summary(self.console)
        self.val = held_out(recipe.data, data_root, clip)  # opened before training, so that errors are raised at once
        self.val.data.print_summary(self.console)
        check_classes(data, self.val.labels, self.images, self.val.data)
        if any(phase.prediction_weight for phase in self.learner.later_phases) and not self.val.labels:
            raise RecipeError(
                "[cascade] needs labels to predict, but val has no classes: give `labels` or `labels_file` in [data], "
                "or set prediction_weight = 0"
            )
        for reason in self.val.left_out:
            self.console.print(f"left out: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        self.plan = Plan(
            len(self.images), settings.images_per_step, settings.mixed_images, settings.seed, settings.epochs
        )
        self.phases = [_Phase(settings, 0, self.plan.steps)]
        for later in self.learner.later_phases:
            self.phases.append(_Phase(later, self.phases[-1].end, self.phases[-1].end + later.steps))
        self.steps = self.phases[-1].end
        self.meta = CheckpointMeta(
            step=0,
            steps=self.steps,
            recipe=recipe,
            clip_sha256=clip.sha256,
            layers=tower.layers,
            width=tower.width,
            labels=self.val.labels,
            train_images=len(self.images),
        )
        clip.tower.to(fabric.device)
        self.done = 0
        self.tensors: dict[str, Tensor] = {}  # from the resumed checkpoint, for the first trainer
        if saved := checkpoints(out):
            self._resume(saved[-1])
        else:
            if fabric.is_global_zero:
                for message in _label_warnings(clip, self.val.labels, recipe.data.templates):
                    console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)
            self._initialise()

    def enter(self, phase: _Phase, previous: Trainer | None) -> Trainer:
        """The trainer of a phase, at the current step of that phase.

        Adam's moments are copied from the previous trainer: they hold the scale of every feature's gradient, which a
        rare feature would take many steps to estimate again.
        """
        fabric, templates = self.fabric, self.recipe.data.templates
        state, self.tensors = self.tensors if previous is None else previous.state(), {}
        self.learner.unwrap()
        size = StepSize(phase.settings.images_per_step, self.clip.tower.tokens, fabric.world_size)
        objective = self.learner.objective(
            phase.settings,
            size,
            lambda: label_embeddings(self.clip, self.val, templates, self.console).to(fabric.device),
        )
        trainer = Trainer(fabric, objective, phase.settings, phase.end - phase.start)
        if state:
            trainer.restore(state, self.done - phase.start)
        return trainer

    def batches(self, phase: _Phase) -> Iterator[Any]:
        """Inputs of the phase's objective, starting at the run's current step: this process's share of each step."""
        fabric, settings, skip = self.fabric, self.recipe.training, self.done - phase.start
        if isinstance(phase.settings, TrainingSection):
            kind: Any = self.learner.activations
            return steps(
                kind,
                self.clip.tower,
                self.images,
                self.plan,
                workers=settings.workers,
                skip=skip,
                rank=fabric.global_rank,
                world=fabric.world_size,
                cache=self._cache(),
                context=fabric.autocast,
            )
        size = phase.settings.images_per_step
        epochs = -(-phase.settings.steps // (len(self.images) // size))
        plan = Plan(len(self.images), size, size, settings.seed + 1, epochs)
        whole_images = plan.batches(skip, fabric.global_rank, fabric.world_size)
        return (pixels.to(fabric.device) for pixels, _ in load(self.images, whole_images, settings.workers))

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint: every process takes part, the first one writes."""
        state = self.learner.state()
        state |= trainer.state()
        if not self.fabric.is_global_zero:
            return
        self.meta = self.meta.model_copy(update={"step": self.done, "broken": dict(self.images.broken)})
        save_checkpoint(self.out, self.meta, *self.learner.finished(state), state)

    def measure(self, checkpoint: Path) -> None:
        """Add the metrics of the finished run to its checkpoint."""
        meta = read_meta(checkpoint)
        self.clip.tower.to("cpu")
        metrics, lines = self.learner.measure(checkpoint, self.val, self.recipe, self.console)
        write_meta(checkpoint, meta.model_copy(update={"metrics": metrics, "val_images": len(self.val)}))
        self.val.data.print_broken(self.console)
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)
        if message := cls_warning(metrics, self.recipe):
            self.console.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _initialise(self) -> None:
        settings, size = self.recipe.training, self.recipe.training.images_per_step
        batch_count = max(1, min(settings.normalisation_images, len(self.images)) // size)
        plan = Plan(len(self.images), size, size, settings.seed + 2, epochs=1)
        data = load(self.images, islice(plan.batches(), batch_count), settings.workers)
        counted = track(data, "activations' scale", batch_count * size, self.console, "images", size)
        with closing(counted):
            self.learner.initialise(counted, self.fabric.device, self.fabric.autocast)

    def _resume(self, checkpoint: Path) -> None:
        """Load weights, normalisation and step from a checkpoint, which must be of the same run."""
        saved, current, kind = read_meta(checkpoint), self.meta, self.recipe.kind
        compared = ["data", kind, "training"]
        if saved.step > self.phases[0].end:  # a [cascade] may be added after a finished reconstruction
            compared.append("cascade")
        other = [] if saved.clip_sha256 == current.clip_sha256 else ["the CLIP has other weights"]
        if saved.recipe.kind != kind:
            other.append(f"its recipe has [{saved.recipe.kind}], this one has [{kind}]")
            compared = []
        for part in compared:
            other += differences(getattr(saved.recipe, part, None), getattr(current.recipe, part, None), part)
        if saved.train_images != current.train_images:
            other.append(f"it had {saved.train_images:,} train images, now there are {current.train_images:,}")
        if (saved.labels or current.labels) != current.labels:
            other.append("the labels differ")
        if other:
            raise CheckpointError(
                f"{checkpoint} belongs to another run ({'; '.join(other)}): give the same recipe, or choose an empty "
                f"--out"
            )
        self.tensors = load_tensors(checkpoint / "state.safetensors")
        self.learner.restore(checkpoint, self.tensors, self.fabric.device)
        self.images.record_broken(saved.broken)
        if saved.step == self.steps:  # finished, and possibly evaluated
            self.meta = current.model_copy(update={"metrics": saved.metrics, "val_images": saved.val_images})
        self.done = saved.step
        self.console.print(f"resuming {checkpoint} at step {self.done:,} of {self.steps:,}")

    def _cache(self) -> ActivationCache | None:
        settings, fabric = self.recipe.training, self.fabric
        if settings.cache == "none":
            return None
        return open_cache(
            self.learner.activations,
            self.out / "activations",
            settings.cache,
            clip=self.clip,
            source=self.recipe.data.train,
            plan=self.plan,
            precision=settings.precision,
            rank=fabric.global_rank,
            world=fabric.world_size,
            log=self.console.print,
        )
