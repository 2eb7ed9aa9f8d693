"""Trains a small CLIP from scratch on labelled images: open_clip's model and schedule, prompts as the classifier.

For the embedded bundle, which is made only from CIFAR-10 (`training/recipes/clip/demo.toml`). With ten classes a
contrastive batch contains many equal captions, which open_clip's `ClipLoss` would push apart. Instead, images are
compared with every prompt, using a template drawn at each step: class names, or class names on a background of every
colour. The softmax is the same as in zero-shot classification.

<out>/<name>.json, model.safetensors      the CLIP, float16, for `[clip] config, weights` of a recipe
      pretrain.json, state-N.safetensors  for resuming; a run continues from its last complete epoch, the N-th
"""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import PatchDropout
from open_clip_train.scheduler import cosine_lr
from PIL import Image
from pydantic import BaseModel, ValidationError
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, RandomSampler
from torchvision.transforms import v2

from vitrine.models.clip.tower import Tower
from vitrine.models.files.writing import prepare_folder, write_text, written
from vitrine.models.progress import track
from vitrine.models.stopping import advising
from vitrine.training.checkpoint import CheckpointError, first_problem, load_tensors, section
from vitrine.training.data.images import DataError, Images, Listing, load
from vitrine.training.data.sources import open_images
from vitrine.training.pretraining.captions import COLOURS, background_colour, class_prompts, coloured_prompts
from vitrine.training.pretraining.mimetic import mimetic_start
from vitrine.training.pretraining.recipe import PretrainRecipe
from vitrine.training.recipes.recipe import RecipeError
from vitrine.training.recipes.settings import differences
from vitrine.training.run.trainer import TrainingDiverged

WEIGHTS = "model.safetensors"
RECORD = "pretrain.json"


class EpochResult(BaseModel):
    loss: float
    top1: float  # zero-shot, on val


class Record(BaseModel):
    """pretrain.json."""

    recipe: PretrainRecipe
    epochs: list[EpochResult]


def pretrain(recipe: PretrainRecipe, data_root: Path, out: Path, console: Console) -> Path:
    """Train the CLIP, or resume the run in `out`. Returns the path of the weights.

    The same recipe gives the same weights on the same machine, regardless of interruptions.

    Raises:
        CheckpointError: `out` contains another run, or a damaged one.
        FileError: `out` cannot be written.
        DataError: the images cannot be used, or there are too few.
        RecipeError: open_clip cannot build the model, or data and labels do not match.
        TrainingDiverged: the loss is not finite.
    """
    settings, size = recipe.training, recipe.model.vision_cfg["image_size"]
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is not a folder; choose another --out")
    done = _completed_epochs(recipe, out)
    if len(done) == settings.epochs:
        console.print(f"{out} is complete: all {settings.epochs} epochs are done")
        return out / WEIGHTS
    val = open_images(recipe.data.val, data_root, _pixels(size))
    val.require_classes()
    train = _training_images(recipe, data_root, val.classes, console)
    run = _Run(recipe, steps_per_epoch=len(train) // settings.images_per_step)
    if done:
        run.restore(load_tensors(out / _state(len(done))), len(done))
        console.print(f"resuming {out} after epoch {len(done)} of {settings.epochs}")
    prepare_folder(out)
    write_text(out / f"{recipe.name}.json", recipe.model.model_dump_json(indent=2))
    for epoch in range(len(done), settings.epochs):
        torch.manual_seed(settings.seed * 1_000_003 + epoch)  # order, crops, flips and dropped patches
        order = BatchSampler(RandomSampler(train), settings.images_per_step, drop_last=True)
        batches = load(train, order, settings.workers)
        title = f"epoch {epoch + 1}/{settings.epochs}"
        with advising(f"run the same command again to continue after epoch {epoch} of {settings.epochs}"):
            losses = [run.step(*batch) for batch in track(batches, title, run.steps_per_epoch, console, "steps")]
            done.append(EpochResult(loss=sum(losses) / len(losses), top1=run.top1(val, console)))
            run.save(out, done)
        console.print(f"{title}: loss {done[-1].loss:.4f}, zero-shot top-1 {done[-1].top1:.4f}")
    train.print_broken(console)
    val.print_broken(console)
    return out / WEIGHTS


class _Run:
    """Model, optimiser and schedule of a run."""

    def __init__(self, recipe: PretrainRecipe, steps_per_epoch: int) -> None:
        self.recipe, settings = recipe, recipe.training
        torch.manual_seed(settings.seed)
        self.model = _build(recipe)
        self.patch_dropout = self.model.visual.patch_dropout = PatchDropout(settings.patches_dropped)
        mimetic_start(self.model.visual, torch.Generator().manual_seed(settings.seed))
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.steps_per_epoch, self.steps = steps_per_epoch, steps_per_epoch * settings.epochs
        warmup = int(settings.warmup_share * self.steps)
        self.schedule = cosine_lr(self.optimiser, settings.learning_rate, warmup, self.steps)
        self.done = 0

    def step(self, pixels: Tensor, prompt_indices: Tensor) -> float:
        """One optimiser step on pixels [B, 3, H, W] and each image's index into the coloured prompts [B]; the loss."""
        settings, labels = self.recipe.training, self.recipe.data.labels
        self.schedule(self.done)
        late = self.done >= self.steps * (1 - settings.all_patches_share)
        self.patch_dropout.prob = 0.0 if late else settings.patches_dropped
        generator = random.Random(settings.seed * 1_000_003 + self.done)  # noqa: S311  (no secret)
        template, coloured = generator.choice(self.recipe.data.templates), generator.random() < 0.5
        prompts, truth = class_prompts(labels, template), prompt_indices // len(COLOURS)
        if coloured:
            prompts, truth = coloured_prompts(labels, template), prompt_indices

        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(self.tokenizer(prompts), normalize=True)
        logits = self.model.logit_scale.exp() * image.float() @ text.float().T
        loss = cross_entropy(logits, truth, label_smoothing=settings.label_smoothing)
        if not math.isfinite(loss.item()):
            raise TrainingDiverged(f"the loss is {loss.item()} at step {self.done}; lower the learning rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=torch.tensor(100.0).log())  # as CLIP does
        self.done += 1
        return loss.item()

    @torch.no_grad()
    def top1(self, val: Images, console: Console) -> float:
        """Zero-shot accuracy, with the templates' unit embeddings averaged."""
        self.model.eval()
        text = torch.stack(
            [
                self.model.encode_text(self.tokenizer(class_prompts(self.recipe.data.labels, template)), normalize=True)
                for template in self.recipe.data.templates
            ]
        ).mean(0)
        batches = torch.arange(len(val)).split(250)
        loaded = load(val, [batch.tolist() for batch in batches], self.recipe.training.workers)
        hits = [
            (self.model.encode_image(pixels) @ text.T).argmax(-1) == classes
            for pixels, classes in track(loaded, "zero-shot", len(val), console, "images", 250)
        ]
        return torch.cat(hits).double().mean().item()

    def save(self, out: Path, done: list[EpochResult]) -> None:
        """Write state, weights, and last the record, which determines the valid state; each is replaced atomically.

        If killed in between, the run resumes from the previous epoch: its state is removed only after the new record.
        """
        weights = {key: tensor.contiguous() for key, tensor in self.model.state_dict().items()}
        state = {f"model.{key}": tensor for key, tensor in weights.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"adam.{index}.{key}": tensor for key, tensor in moments.items()}
        record = Record(recipe=self.recipe, epochs=done)
        for name, write in (
            (_state(len(done)), lambda path: save_file(state, path)),
            (WEIGHTS, lambda path: save_file(self._published(weights), path)),
            (RECORD, lambda path: path.write_text(record.model_dump_json(indent=2), encoding="utf-8")),
        ):
            with written(out / name) as partial:
                write(partial)
        for old in out.glob(_state("*")):
            if old.name != _state(len(done)):
                old.unlink()

    def _published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in float16, with 0 for tokens that no prompt uses: their embeddings are still random."""
        halves = {key: tensor.half() for key, tensor in weights.items()}
        data = self.recipe.data
        pairs = itertools.product((class_prompts, coloured_prompts), data.templates)
        used = self.tokenizer([prompt for make, template in pairs for prompt in make(data.labels, template)]).unique()
        table = halves["token_embedding.weight"]
        halves["token_embedding.weight"] = torch.zeros_like(table).index_copy(0, used, table[used])
        return halves

    def restore(self, state: dict[str, Tensor], epochs: int) -> None:
        """Restore weights, Adam's moments and the position in the schedule after `epochs` epochs."""
        self.model.load_state_dict(section(state, "model"))
        adam = self.optimiser.state_dict()
        for key, tensor in section(state, "adam").items():
            index, name = key.split(".")
            adam["state"].setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict(adam)
        self.done = epochs * self.steps_per_epoch


def _state(epochs: int | str) -> str:
    return f"state-{epochs}.safetensors"


def _completed_epochs(recipe: PretrainRecipe, out: Path) -> list[EpochResult]:
    """The complete epochs of this run that `out` contains."""
    if not (out / RECORD).exists():
        return []
    try:
        record = Record.model_validate_json((out / RECORD).read_bytes())
    except ValidationError as error:
        problem = first_problem(error)
        raise CheckpointError(
            f"{out / RECORD} was not written by Vitrine: {problem}; choose an empty folder"
        ) from error
    if different := differences(record.recipe, recipe):
        raise CheckpointError(
            f"{out} holds a run of another recipe ({'; '.join(different)}): "
            "give the same one, or choose an empty folder"
        )
    return record.epochs


def _build(recipe: PretrainRecipe) -> Any:
    """open_clip's model; checks that Vitrine can explain it and that its text tower fits the prompts."""
    try:
        model = open_clip.CLIP(**recipe.model.model_dump())
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise RecipeError(f"open_clip cannot build [model]: {error}") from error
    Tower(model.visual)  # raises for architectures without an exact account
    tokenizer = open_clip.SimpleTokenizer()
    if model.vocab_size < tokenizer.vocab_size:
        raise RecipeError(
            f"model.text_cfg.vocab_size must be {tokenizer.vocab_size}, the size of open_clip's own vocabulary"
        )
    for template in recipe.data.templates:
        for prompt in coloured_prompts(recipe.data.labels, template):
            needed = len(tokenizer.encode(prompt)) + 2  # start and end
            if needed > model.context_length:
                raise RecipeError(f"model.text_cfg.context_length is too short for {prompt!r}: {needed} tokens")
    return model


def _training_images(recipe: PretrainRecipe, data_root: Path, classes: tuple[str, ...], console: Console) -> Images:
    """Images with random shifts and flips. The class is an index into the coloured prompts (`_Coloured`)."""
    data, settings, size = recipe.data, recipe.training, recipe.model.vision_cfg["image_size"]
    images = open_images(data.train, data_root, lambda image: torch.tensor(background_colour(image)))
    images.require_classes()
    if images.classes != classes:
        raise RecipeError(
            f"data.val and data.train ({images.title}) have different classes; val has {', '.join(classes)}"
        )
    if len(classes) != len(data.labels):
        raise RecipeError(f"data.labels has {len(data.labels)} names, but {images.title} has {len(classes)} classes")
    if len(images) < settings.images_per_step:
        raise DataError(
            f"{images.title} has {len(images)} images, fewer than one step's {settings.images_per_step}: "
            "give more images or lower training.images_per_step"
        )
    batches = [batch.tolist() for batch in torch.arange(len(images)).split(500)]
    loaded = track(load(images, batches, settings.workers), "background colours", len(images), console, "images", 500)
    colours = torch.cat([indices for indices, _ in loaded])
    resize = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])  # as in `_pixels`
    augment = v2.Compose([v2.RandomCrop(size, settings.crop_padding), v2.RandomHorizontalFlip()])
    return Images(_Coloured(images.listing, colours.tolist()), v2.Compose([resize, augment, _pixels(size)]))


class _Coloured:
    """A listing's images; the class of each is the index of its prompt in `coloured_prompts`."""

    def __init__(self, listing: Listing, colours: list[int]) -> None:
        self.listing, self.colours = listing, colours
        self.title, self.classes, self.name = listing.title, listing.classes, listing.name
        self.unlabelled, self.skipped = listing.unlabelled, listing.skipped

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        image, class_index = self.listing.read(index)
        return image, class_index * len(COLOURS) + self.colours[index]


def _pixels(size: int) -> Any:
    return open_clip.image_transform(
        size, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
