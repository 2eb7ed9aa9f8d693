"""Images in class folders, in an order that depends on (seed, epoch) alone, so that a run can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from models.errors import VitrineError


class DataError(VitrineError, ValueError):
    """The images cannot be used; the message names the folder or the file."""


def _open_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} is no readable image: {error}") from error


def image_folder(root: Path, transform: Callable[[Image.Image], Tensor]) -> ImageFolder:
    """`root/<class>/*.jpg` as a data set of (pixels [3, H, W], class index). Raises `DataError` if there is none."""
    try:
        return ImageFolder(str(root), transform=transform, loader=_open_rgb)
    except FileNotFoundError as error:
        raise DataError(f"no images under {root}: {error}") from error


def batches(
    folder: ImageFolder, size: int, workers: int, *, seed: int, epochs: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled full batches (pixels [size, 3, H, W], classes [size]) of `epochs` passes, without the first `skip`."""
    if len(folder) < size:
        raise DataError(f"{folder.root} holds {len(folder)} images, fewer than one step's {size}")
    orders = [
        torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in range(epochs)
    ]
    steps = [order[: len(order) // size * size].view(-1, size) for order in orders]
    sampler = [batch.tolist() for batch in torch.cat(steps)[skip:]]
    yield from DataLoader(folder, batch_sampler=sampler, num_workers=workers)


def steps_per_epoch(folder: ImageFolder, size: int) -> int:
    """Full batches in one pass."""
    return len(folder) // size
