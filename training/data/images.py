"""Images by number, decoded in worker processes; which image and which token comes when (`Plan`).

Both depend on the recipe alone, so that a run can be taken up anywhere. An image that cannot be read is replaced by
the next one that can, named in the main process, and fatal only beyond the recipe's `data.max_broken`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrine.models.errors import DAMAGED_IMAGE, VitrineError

_DAMAGED = (*DAMAGED_IMAGE, Image.DecompressionBombError)


class DataError(VitrineError, ValueError):
    """The images cannot be used; the message names the folder, the file or the data set's id."""


class Listing(Protocol):
    """What a source holds, by number. Kinds of sources are in training/data/sources.py."""

    title: str  # the whole source, for messages
    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For people: file path, "id[split] row 7", "shard.tar: key"."""

    def open(self, index: int) -> tuple[Image.Image, int]:
        """(image in any mode, class index); a broken image may raise here or when it is decoded."""


class Images(Dataset[tuple[Tensor, int]]):
    """A source's images as (pixels [3, H, W], class index), in place of a broken one the next readable one.

    `broken` (name -> reason) holds those that were met, in the main process, for the log and the checkpoint; a run
    that is taken up is told what its checkpoint knows by `note`. Under data parallelism each process knows its own.
    """

    def __init__(self, listing: Listing, transform: Callable[[Image.Image], Tensor], max_broken: float = 0.0) -> None:
        self.listing, self.transform, self.max_broken = listing, transform, max_broken
        self.title, self.classes, self.name = listing.title, listing.classes, listing.name
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises `DataError` once more images are broken than `allowed_broken`."""
        found = self._find(index)
        self.note(found.broken)
        return found.pixels, found.class_index

    def __getitems__(self, indices: list[int]) -> list[_Found]:
        """What a DataLoader's worker calls."""
        return [self._find(index) for index in indices]

    @property
    def allowed_broken(self) -> int:
        """max_broken of all images, but at least one; none for max_broken = 0; never all."""
        allowed = max(1, int(self.max_broken * len(self))) if self.max_broken else 0
        return min(allowed, len(self) - 1)

    def note(self, broken: Mapping[str, str]) -> None:
        """Add to `broken`. Raises `DataError`, naming the first few, once they are more than `allowed_broken`."""
        self.broken.update(broken)
        count, allowed = len(self.broken), self.allowed_broken
        if count > allowed:
            first = "; ".join(f"{name}: {reason}" for name, reason in islice(self.broken.items(), 3))
            raise DataError(
                f"{self.title}: {count} of {len(self):,} images cannot be read, {allowed} may "
                f"(max_broken = {self.max_broken}): {first}{'; ...' if count > 3 else ''}. "
                "Mend or remove them, or raise max_broken"
            )

    def _find(self, index: int) -> _Found:
        broken: dict[str, str] = {}
        for offset in range(self.allowed_broken + 1):
            near = (index + offset) % len(self)
            try:
                image, class_index = self.listing.open(near)
                with image:
                    rgb = _upright(image).convert("RGB")
            except _DAMAGED as error:
                broken[self.name(near)] = _reason(error)
            else:
                return _Found(self.transform(rgb), class_index, broken)
        return _Found(torch.empty(0), -1, broken)  # never seen: `note` raises first


class _Found(NamedTuple):
    pixels: Tensor
    class_index: int
    broken: dict[str, str]  # passed over on the way


def load(
    images: Images, batches: Iterable[list[int]], workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The given batches of indices, decoded in `workers` processes: (pixels [B, 3, H, W], classes [B]).

    Raises `DataError`, in this process, when more images are broken than may be.
    """
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=_collate, pin_memory=pin_memory)
    for pixels, classes, broken in loader:
        images.note(broken)
        yield pixels, classes


def _collate(found: list[_Found]) -> tuple[Tensor, Tensor, dict[str, str]]:
    broken = {name: reason for one in found for name, reason in one.broken.items()}
    pixels = [one.pixels for one in found if one.class_index >= 0]
    return torch.stack(pixels) if pixels else torch.empty(0), torch.tensor([one.class_index for one in found]), broken


def _upright(image: Image.Image) -> Image.Image:
    """As the service sees it: turned by its EXIF orientation, if that can be read."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED:
        return image  # the picture itself is sound


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text names an object in memory
        return "not an image in a known format"
    return f"{type(error).__name__}: {error}"


class Visit(NamedTuple):
    """One pass over one chunk."""

    epoch: int
    chunk: int
    skip: int  # its first steps that are not wanted


@dataclass(frozen=True)
class Plan:
    """Which image and which token comes when, from these numbers alone: any step can be found without its past.

    Images are put in one order (by seed) and cut into chunks of `mixed_images`, the last one shorter; what is left
    after the last full step is dropped. Every epoch visits the chunks in an order of its own. Within a chunk the
    tokens of all images are shuffled, anew in every epoch, and served in steps of `images_per_step` times T tokens
    (T tokens an image). mixed_images = images_per_step: a step is whole images, [CLS] first in each.

    Under data parallelism process `rank` of `world` forwards the images at places rank, rank + world, ... of a chunk
    and gets of every step the tokens of those: about 1/world of them, some more or fewer. All processes together get
    images_per_step * T tokens in every step, those of a run in one process.
    """

    images: int
    images_per_step: int
    mixed_images: int
    seed: int
    epochs: int

    def __post_init__(self) -> None:
        if self.mixed_images % self.images_per_step:
            raise ValueError(f"mixed_images = {self.mixed_images} is no multiple of {self.images_per_step}")
        if self.images < self.images_per_step:
            raise DataError(
                f"the data have {self.images} images, fewer than one step's {self.images_per_step}: "
                "give more images or lower images_per_step"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one pass."""
        return self.images // self.images_per_step

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.steps_per_epoch * self.epochs

    @property
    def mixed(self) -> bool:
        """Whether tokens are shuffled across steps."""
        return self.mixed_images > self.images_per_step

    @property
    def chunks(self) -> int:
        """Chunks in one pass."""
        return -(-self.steps_per_epoch * self.images_per_step // self.mixed_images)

    def chunk(self, chunk: int) -> list[int]:
        """The images of a chunk, in the order of its tokens."""
        end = min((chunk + 1) * self.mixed_images, self.steps_per_epoch * self.images_per_step)
        return self._order[chunk * self.mixed_images : end].tolist()

    def share(self, chunk: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """The images of a chunk that a process forwards, in batches of images_per_step / world, rounded up."""
        if world > self.images_per_step:
            raise DataError(f"images_per_step = {self.images_per_step} cannot be shared out to {world} processes")
        images, size = self.chunk(chunk)[rank::world], -(-self.images_per_step // world)
        return [images[start : start + size] for start in range(0, len(images), size)]

    def visits(self, skip: int = 0) -> Iterator[Visit]:
        """The chunks in the order of the run, from global step `skip` on."""
        for epoch in range(skip // self.steps_per_epoch, self.epochs):
            left = max(0, skip - epoch * self.steps_per_epoch)
            for chunk in _random(2, self.seed, epoch).permutation(self.chunks).tolist():
                steps = len(self.chunk(chunk)) // self.images_per_step
                if left < steps:
                    yield Visit(epoch, chunk, left)
                left = max(0, left - steps)

    def batches(self, skip: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        """Images for `load`, batch by batch; one batch a step if tokens are not mixed."""
        for visit in self.visits(skip):
            yield from self.share(visit.chunk, rank, world)

    def tokens(self, visit: Visit, tokens_per_image: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """For each step of a visit, places among the process's own tokens of that chunk, which lie image by image."""
        places = np.arange(len(self.chunk(visit.chunk)) * tokens_per_image)
        if self.mixed:
            _random(3, self.seed, visit.epoch, visit.chunk).shuffle(places)
        for step in places.reshape(-1, self.images_per_step * tokens_per_image)[visit.skip :]:
            image, token = np.divmod(step, tokens_per_image)
            mine = image % world == rank
            yield torch.from_numpy(image[mine] // world * tokens_per_image + token[mine])

    @cached_property
    def _order(self) -> np.ndarray:
        return _random(1, self.seed).permutation(self.images)


def _random(purpose: int, seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng((purpose, seed % 2**32, *key))
