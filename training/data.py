"""Images in class folders, in an order that depends on (seed, epoch) alone, so that a run can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder

from models.errors import VitrineError


class DataError(VitrineError, ValueError):
    """The images cannot be used; the message names the folder or the file."""


class Folder(ImageFolder):
    """`root/<class>/*.jpg` as (pixels [3, H, W], class index). A broken image is a `DataError` *in place of* its item:
    a worker process cannot raise one without drowning its message in a traceback. `load` raises it."""

    def __getitem__(self, index: int) -> Any:
        try:
            return super().__getitem__(index)
        except DataError as error:
            return error


def image_folder(root: Path, transform: Callable[[Image.Image], Tensor]) -> Folder:
    """The images under `root`. Raises `DataError` if there are none."""
    try:
        return Folder(str(root), transform=transform, loader=_open_rgb)
    except OSError as error:
        raise DataError(f"no images under {root}: {error}") from error


def batches(
    folder: Folder, size: int, workers: int, *, seed: int, epochs: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled full batches (pixels [size, 3, H, W], classes [size]) of `epochs` passes, without the first `skip`."""
    if len(folder) < size:
        raise DataError(f"{folder.root} holds {len(folder)} images, fewer than one step's {size}")
    orders = [
        torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in range(epochs)
    ]
    steps = [order[: len(order) // size * size].view(-1, size) for order in orders]
    yield from load(folder, torch.cat(steps)[skip:].tolist(), workers)


def load(folder: Folder, batches: Iterable[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The given batches of indices, decoded in `workers` processes. Raises `DataError` naming a broken image."""
    for batch in DataLoader(folder, batch_sampler=batches, num_workers=workers, collate_fn=_collate):
        if isinstance(batch, DataError):
            raise batch
        yield batch


def steps_per_epoch(folder: Folder, size: int) -> int:
    """Full batches in one pass."""
    return len(folder) // size


def _open_rgb(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise DataError(f"{path} is no readable image: {error}") from error


def _collate(items: list[Any]) -> Any:
    """A batch, or the first error among its items."""
    return next((item for item in items if isinstance(item, DataError)), None) or default_collate(items)
