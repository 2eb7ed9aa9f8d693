"""A small CLIP from scratch, on labelled images: open_clip's model and schedule, sentences as the classifier.

For the embedded bundle, which is made of nothing but CIFAR-10 (`training/recipes/clip/demo.toml`). With ten classes a
contrastive batch is full of equal captions, which open_clip's `ClipLoss` would push apart. So images are compared
with every sentence there is, in a template drawn anew each step: class names, or class names on a background of
every colour. Its softmax is the one that zero-shot classification uses.

<out>/<name>.json, model.safetensors    the CLIP, float16, as `[clip] config, weights` of a recipe takes it
      state.safetensors, pretrain.json  what resuming reads; a run goes on from its last whole epoch
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import PatchDropout
from open_clip_train.scheduler import cosine_lr
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from training.captions import COLOURS, background_colour, class_prompts, coloured_prompts
from training.data import Images, load
from training.mimetic import mimetic_start
from training.recipes import RecipeError, Section, Share, Source, Template
from training.sources import open_images

WEIGHTS = "model.safetensors"


class ModelSection(BaseModel):
    """open_clip's own configuration of a model."""

    embed_dim: PositiveInt
    vision_cfg: dict[str, Any]
    text_cfg: dict[str, Any]


class PretrainData(Section):
    """Labelled images of the model's size."""

    train: Source
    val: Source
    labels: tuple[str, ...] = Field(min_length=1, description="in the order of the data's classes")
    templates: tuple[Template, ...] = Field(min_length=1)


class PretrainTraining(Section):
    seed: int = 0
    epochs: PositiveInt
    images_per_step: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_share: Share = 0.05
    label_smoothing: Share = 0.1
    patches_dropped: Share = Field(default=0.5, description="share of patches left out; a ViT learns nearly as much")
    all_patches_share: Share = Field(default=0.125, description="last share of the run, which sees every patch")
    crop_padding: int = Field(default=4, ge=0, description="pixels by which images are shifted at most")
    workers: int = Field(default=1, ge=0, description="processes that decode images")


class PretrainRecipe(Section):
    name: str
    model: ModelSection
    data: PretrainData
    training: PretrainTraining


class EpochResult(BaseModel):
    loss: float
    top1: float  # zero-shot, on val


class Progress(BaseModel):
    """pretrain.json."""

    recipe: PretrainRecipe
    epochs: list[EpochResult]


def pretrain(recipe: PretrainRecipe, data_root: Path, out: Path, console: Console) -> Path:
    """Train the CLIP, or take up the run that `out` holds. Returns the weights' file.

    The same recipe gives the same weights on the same machine, however often the run is interrupted.
    Raises `RecipeError` if `out` holds another run, `DataError` if the images cannot be used.
    """
    settings, size = recipe.training, recipe.model.vision_cfg["image_size"]
    train = _Coloured(recipe, data_root)
    val = open_images(recipe.data.val, data_root, _pixels(size))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{recipe.name}.json").write_text(recipe.model.model_dump_json(indent=2))
    run = _Run(recipe, steps_per_epoch=len(train) // settings.images_per_step)
    done = run.resume(out)
    if done:
        console.print(f"taking up {out} after epoch {len(done)} of {settings.epochs}")
    for epoch in range(len(done), settings.epochs):
        torch.manual_seed(settings.seed * 1_000_003 + epoch)  # order, crops, flips and dropped patches
        batches = DataLoader(
            train, settings.images_per_step, shuffle=True, drop_last=True, num_workers=settings.workers
        )
        title = f"epoch {epoch + 1}/{settings.epochs}"
        losses = [run.step(*batch) for batch in track(batches, title, console=console)]
        done.append(EpochResult(loss=sum(losses) / len(losses), top1=run.top1(val)))
        run.save(out, done)
        console.print(f"{title}: loss {done[-1].loss:.4f}, zero-shot top-1 {done[-1].top1:.4f}")
    return out / WEIGHTS


class _Run:
    """Model, optimiser and schedule."""

    def __init__(self, recipe: PretrainRecipe, steps_per_epoch: int) -> None:
        self.recipe, settings = recipe, recipe.training
        torch.manual_seed(settings.seed)
        self.model: Any = open_clip.CLIP(**recipe.model.model_dump())
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

    def step(self, pixels: Tensor, classes: Tensor, colours: Tensor) -> float:
        """One optimiser step; the loss."""
        settings, labels = self.recipe.training, self.recipe.data.labels
        self.schedule(self.done)
        late = self.done >= self.steps * (1 - settings.all_patches_share)
        self.patch_dropout.prob = 0.0 if late else settings.patches_dropped
        drawn = random.Random(settings.seed * 1_000_003 + self.done)  # noqa: S311  (no secret)
        template, coloured = drawn.choice(self.recipe.data.templates), drawn.random() < 0.5
        prompts, truth = class_prompts(labels, template), classes
        if coloured:
            prompts, truth = coloured_prompts(labels, template), classes * len(COLOURS) + colours

        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(self.tokenizer(prompts), normalize=True)
        logits = self.model.logit_scale.exp() * image.float() @ text.float().T
        loss = cross_entropy(logits, truth, label_smoothing=settings.label_smoothing)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=torch.tensor(100.0).log())  # as CLIP does
        self.done += 1
        return loss.item()

    @torch.no_grad()
    def top1(self, val: Images) -> float:
        """Zero-shot accuracy, all templates averaged."""
        self.model.eval()
        text = torch.stack(
            [
                self.model.encode_text(self.tokenizer(class_prompts(self.recipe.data.labels, template)), normalize=True)
                for template in self.recipe.data.templates
            ]
        ).mean(0)
        every = torch.arange(len(val)).split(250)
        hits = [
            (self.model.encode_image(pixels) @ text.T).argmax(-1) == classes
            for pixels, classes in load(val, [batch.tolist() for batch in every], self.recipe.training.workers)
        ]
        return torch.cat(hits).double().mean().item()

    def save(self, out: Path, done: list[EpochResult]) -> None:
        """Weights and state; the JSON last, each replaced in one step."""
        weights = {key: tensor.contiguous() for key, tensor in self.model.state_dict().items()}
        state = {f"model.{key}": tensor for key, tensor in weights.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"adam.{index}.{key}": tensor for key, tensor in moments.items()}
        progress = Progress(recipe=self.recipe, epochs=done)
        for name, write in (
            (f"state-{len(done)}.safetensors", lambda path: save_file(state, path)),
            (WEIGHTS, lambda path: save_file({key: tensor.half() for key, tensor in weights.items()}, path)),
            ("pretrain.json", lambda path: path.write_text(progress.model_dump_json(indent=2))),
        ):
            write(out / f".{name}")
            os.replace(out / f".{name}", out / name)
        (out / f"state-{len(done) - 1}.safetensors").unlink(missing_ok=True)

    def resume(self, out: Path) -> list[EpochResult]:
        """Take up the last whole epoch found in `out`; the results so far."""
        if not (out / "pretrain.json").exists():
            return []
        progress = Progress.model_validate_json((out / "pretrain.json").read_text())
        if progress.recipe != self.recipe:
            raise RecipeError(f"{out} holds a run of another recipe; choose an empty folder")
        state = load_file(out / f"state-{len(progress.epochs)}.safetensors")
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        adam = self.optimiser.state_dict()
        for key, tensor in state.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                adam["state"].setdefault(int(index), {})[name] = tensor
        self.optimiser.load_state_dict(adam)
        self.done = len(progress.epochs) * self.steps_per_epoch
        return progress.epochs


class _Coloured(Dataset[tuple[Tensor, int, int]]):
    """Training images as (pixels, shifted and mirrored at random; class; colour of the background before that)."""

    def __init__(self, recipe: PretrainRecipe, data_root: Path) -> None:
        source, size, settings = recipe.data.train, recipe.model.vision_cfg["image_size"], recipe.training
        sized = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        shifted = v2.Compose([v2.RandomCrop(size, settings.crop_padding), v2.RandomHorizontalFlip()])
        self.images = open_images(source, data_root, v2.Compose([sized, shifted, _pixels(size)]))
        if len(self.images.classes) != len(recipe.data.labels):
            classes = f"{self.images.title} has {len(self.images.classes)} classes"
            raise RecipeError(f"data.labels has {len(recipe.data.labels)} names, {classes}")
        colours = open_images(source, data_root, lambda image: torch.tensor(background_colour(image)))
        every = torch.arange(len(colours)).split(500)
        self.colours = torch.cat(
            [found for found, _ in load(colours, [batch.tolist() for batch in every], settings.workers)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        pixels, class_index = self.images[index]
        return pixels, class_index, int(self.colours[index])


def _pixels(size: int) -> Any:
    return open_clip.image_transform(
        size, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
