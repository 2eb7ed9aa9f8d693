"""The val images on which a dictionary is evaluated, in an order that depends only on a seed, and their classes, if
any; and train images, for what is needed of other images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.training.data.classes import labels_for, recipe_labels
from vitrine.training.data.images import DataError, Images, load
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.recipe import DataSection


@dataclass(frozen=True)
class HeldOut:
    """Selected images of a data set, and the labels of the zero-shot classification."""

    data: Images
    indices: tuple[int, ...]  # into `data`
    labels: tuple[str, ...]  # () if there are none: nothing is predicted
    label_of_class: Tensor  # [classes of `data`] index into `labels`
    seed: int = 0  # with which they were selected
    batch_size: int = 50
    workers: int = 1

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def has_classes(self) -> bool:
        """Whether it is known which prediction is right."""
        return len(self.label_of_class) > 0

    @property
    def left_out(self) -> list[str]:
        """What cannot be measured on these images, and what it takes: a sentence for each reason."""
        if not self.labels:
            return [
                "there are no labels, so nothing is predicted, and it cannot be measured how often predictions stay "
                "the same when MLPs are replaced or source layers left out; give `labels` or `labels_file` in [data], "
                "or --labels-file"
            ]
        if not self.has_classes:
            return [
                f"{self.data.title} has no classes, so predictions cannot be checked: agreement with CLIP's own "
                f"predictions is measured, but not accuracies and retrieval"
            ]
        return []

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(normalised pixels [B, 3, H, W], label indices [B]; -1 without classes), always in the same order."""
        for pixels, classes in load(self.data, self._split(), self.workers):
            yield pixels, self.label_of_class[classes] if self.has_classes else torch.full_like(classes, -1)

    def pixels(self, positions: list[int]) -> Tensor:
        """Normalised pixels of a few images, given as positions among the selected ones: [n, 3, H, W]."""
        batches = load(self.data, [[self.indices[position]] for position in positions], workers=0)
        return torch.cat([torch.empty(0), *(pixels for pixels, _ in batches)])

    def _split(self) -> list[list[int]]:
        return [list(self.indices[at : at + self.batch_size]) for at in range(0, len(self), self.batch_size)]


def held_out(
    section: DataSection,
    data_root: Path,
    clip: Clip,
    *,
    images: int | None = None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    **options: int,
) -> HeldOut:
    """A recipe's val images, or a random sample of `images` of them.

    Args:
        labels: instead of the recipe's, whose default are the classes of the images.
        options: batch_size, workers.

    Raises:
        DataError: there are fewer than two images, or classes that are not among the labels.
    """
    data = open_images(section.val, data_root, clip.transform(), section.max_broken, section.classes)
    labels = labels_for(data, labels if labels is not None else recipe_labels(section, data_root))
    order = _drawn(len(data), images, seed)
    if len(order) < 2:
        raise DataError(f"{len(order)} images of {data.title} are too few to measure anything; at least two are needed")
    label_of_class = torch.tensor([labels.index(name) for name in data.classes], dtype=torch.int64)
    return HeldOut(data, tuple(order), labels, label_of_class, seed, **options)


def train_images(
    section: DataSection, data_root: Path, clip: Clip, *, images: int, seed: int = 0, **options: int
) -> HeldOut:
    """A random sample of a recipe's train images, or all there are, without labels and classes; options: batch_size,
    workers. Raises `DataError`."""
    data = open_images(section.train, data_root, clip.transform(), section.max_broken, section.classes)
    order = tuple(_drawn(len(data), images, seed))
    return HeldOut(data, order, (), torch.zeros(0, dtype=torch.int64), seed, **options)


def _drawn(count: int, images: int | None, seed: int) -> list[int]:
    """`images` of so many images, in order; None, or more than there are: all."""
    if images is None or images >= count:
        return list(range(count))
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:images].tolist())
