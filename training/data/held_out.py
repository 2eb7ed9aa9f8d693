"""The labelled val images on which a CLT is evaluated, in an order that depends only on a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.training.data.images import DataError, Images, load
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.recipe import DataSection


@dataclass(frozen=True)
class HeldOut:
    """Selected images of a data set, and the labels of the zero-shot classification."""

    data: Images
    indices: tuple[int, ...]  # into `data`
    labels: tuple[str, ...]
    label_of_class: Tensor  # [classes of `data`] index into `labels`
    seed: int = 0  # with which they were selected
    batch_size: int = 50
    workers: int = 1

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(normalised pixels [B, 3, H, W], label indices [B]), always in the same order."""
        for pixels, classes in load(self.data, self._split(), self.workers):
            yield pixels, self.label_of_class[classes]

    def pixels(self, positions: list[int]) -> Tensor:
        """Normalised pixels of a few images, given as positions among the selected ones: [n, 3, H, W]."""
        batches = load(self.data, [[self.indices[position]] for position in positions], workers=0)
        return torch.cat([pixels for pixels, _ in batches])

    def _split(self) -> list[list[int]]:
        return [list(self.indices[at : at + self.batch_size]) for at in range(0, len(self), self.batch_size)]


def held_out(
    section: DataSection, data_root: Path, clip: Clip, *, images: int | None = None, seed: int = 0, **options: int
) -> HeldOut:
    """A recipe's val images, or a random sample of `images` of them. `options`: batch_size, workers.

    Raises `DataError` if there are fewer than two images, or classes that are not among the recipe's labels.
    """
    data = open_images(section.val, data_root, clip.transform(), section.max_broken)
    data.require_classes()
    labels = section.labels or tuple(data.classes)
    if unknown := sorted(set(data.classes) - set(labels)):
        raise DataError(f"{data.title}: classes that are no labels of the recipe: {', '.join(unknown)}")
    order = list(range(len(data)))
    if images is not None and images < len(data):
        shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        order = sorted(shuffled[:images].tolist())
    if len(order) < 2:
        raise DataError(f"{len(order)} images of {data.title} are too few to measure anything; two are the least")
    label_of_class = torch.tensor([labels.index(name) for name in data.classes])
    return HeldOut(data, tuple(order), labels, label_of_class, seed, **options)
