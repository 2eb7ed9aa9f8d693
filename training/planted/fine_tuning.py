"""Fine-tunes a CLIP's vision tower on zero-shot prompts: cross-entropy of its logits over all labels.

The text tower stays as it is, so that the CLIP goes on to be asked in words. Only the upper blocks and the head are
trained: what they read is computed once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.loading import Clip, load_clip
from vitrine.models.clip.tower import Tower
from vitrine.models.files.writing import prepare_folder, write_text, written
from vitrine.models.progress import Progress
from vitrine.training.recipes.image_sources import Section
from vitrine.training.run.trainer import TrainingDiverged

CONFIG, WEIGHTS = "planted-clip.json", "model.safetensors"


class FineTuning(Section):
    """How strongly."""

    blocks: PositiveInt = Field(default=6, description="number of last blocks that are trained, at most all")
    epochs: PositiveInt = 4
    images_per_step: PositiveInt = 64
    learning_rate: PositiveFloat = 3e-4
    weight_decay: float = Field(default=0.05, ge=0)


def fine_tune(
    clip: Clip,
    batches: Iterable[tuple[Tensor, Tensor]],
    labels: Tensor,
    settings: FineTuning,
    seed: int,
    progress: Progress,
    title: str,
) -> nn.Module:
    """A copy of the CLIP's model, fine-tuned.

    Args:
        batches: (normalised pixels [B, 3, H, W], indices into the labels [B]) of all training images.
        labels: unit embeddings [labels, D].

    Raises `TrainingDiverged`.
    """
    model = deepcopy(clip.model)
    tower = Tower(model.visual)
    first = max(0, tower.layers - settings.blocks)
    streams, truth = _streams(tower, batches, first)
    trained = [*tower.blocks[first:].parameters(), *tower.visual.ln_post.parameters(), tower.visual.proj]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(streams) / settings.images_per_step)
    schedule = cosine_lr(optimiser, settings.learning_rate, steps // 10, steps)
    generator, task, done = torch.Generator().manual_seed(seed), progress.task(title, steps, "steps"), 0
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(streams), generator=generator).split(settings.images_per_step):
            schedule(done)
            loss = cross_entropy(clip.logit_scale * _embed(tower, streams[batch], first) @ labels.T, truth[batch])
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(f"the loss is {loss.item()} at step {done}; lower the learning rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            done += 1
            task.advance(1)
    return model.eval().requires_grad_(False)


def save(model: nn.Module, clip: Clip, folder: Path) -> Clip:
    """Write the fine-tuned model of a CLIP, as a configuration and weights, and load it.

    Raises `ClipError` if open_clip's format cannot say how images are prepared.
    """
    config = open_clip.get_model_config(clip.name)
    if config is None:
        raise ClipError(
            f"{clip.name} has its own configuration, which cannot be fine-tuned here; give a CLIP by open_clip's name "
            f"or by a file"
        )
    if any(isinstance(module, open_clip.transformer.QuickGELU) for module in model.modules()):
        config["quick_gelu"] = True
    prepare_folder(folder)
    write_text(folder / CONFIG, json.dumps(config, indent=1))
    with written(folder / WEIGHTS) as partial:
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, partial)
    loaded = load_clip(None, str(folder / WEIGHTS), folder / CONFIG)
    if loaded.preprocess != clip.preprocess:
        raise ClipError(f"{clip.name} prepares images in a way that weights from a file cannot have: {clip.preprocess}")
    return loaded


@torch.no_grad()
def _streams(tower: Tower, batches: Iterable[tuple[Tensor, Tensor]], first: int) -> tuple[Tensor, Tensor]:
    """(the stream before block `first` [n, T, d], label indices [n])."""
    streams, truth = [], []
    for pixels, indices in batches:
        stream = tower.embed(pixels)
        for layer in range(first):
            stream = _block(tower, layer, stream)
        streams.append(stream)
        truth.append(indices)
    return torch.cat(streams), torch.cat(truth)


def _embed(tower: Tower, stream: Tensor, first: int) -> Tensor:
    """Unit embeddings [B, D] of the stream before a block."""
    for layer in range(first, tower.layers):
        stream = _block(tower, layer, stream)
    return normalize(tower.head(stream[:, 0]), dim=-1)


def _block(tower: Tower, layer: int, stream: Tensor) -> Tensor:
    stream = stream + tower.attention(layer, stream)
    return stream + tower.mlp(layer, stream)[1]
