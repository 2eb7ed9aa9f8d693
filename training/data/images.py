"""Images by index, decoded in worker processes; the order of images and tokens (`Plan`).

Both depend only on the recipe, so that a run can be resumed at any step. An unreadable image is replaced by the next
readable one and recorded in the main process; it is fatal only beyond the recipe's `data.max_broken`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitrine.models.errors import VitrineError
from vitrine.models.files.problems import naming
from vitrine.models.images.decode import TRUSTED, decode, from_pillow
from vitrine.models.images.errors import ImageError
from vitrine.models.inputs.skipped import Skipped
from vitrine.models.stopping import heed_the_second_signal_alone

SHARED = Path("/dev/shm")  # noqa: S108  (where Linux has its shared memory)
_PAGES = 65_536  # bytes beside the pixels: classes, and what fills up pages


class DataError(VitrineError, ValueError):
    """The images cannot be used; the message names the folder, the file or the data set's id."""


class Listing(Protocol):
    """The images of a source, by index. The kinds of sources are in training/data/sources.py."""

    title: str  # name of the source in messages
    classes: tuple[str, ...]  # () if there are none, and then every class index is 0
    unlabelled: str  # why there are none
    skipped: Skipped

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Human-readable name: file path, "id[split] row 7", "shard.tar: key"."""

    def read(self, index: int) -> tuple[bytes | Image.Image, int]:
        """(an image file, or an image of a source that keeps no files; class index).

        Raises `OSError` or `ImageError` for an image that cannot be read.
        """


class Images(Dataset[tuple[Tensor, int]]):
    """A source's images as (pixels [3, H, W], class index); a broken image is replaced by the next readable one.

    In the main process `broken` (name -> reason) records the broken images seen so far, for the log and the checkpoint;
    a resumed run adds those of its checkpoint with `record_broken`. Under data parallelism each process has its own.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Callable[[Image.Image], Tensor],
        max_broken: float = 0.0,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        """classes: what to call the listing's classes, in its order; two may have one name."""
        self.listing, self.transform, self.max_broken = listing, transform, max_broken
        self.title, self.name = listing.title, listing.name
        self.classes = listing.classes if classes is None else classes
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises `DataError` once more images are broken than `allowed_broken`."""
        sample = self._decode(index)
        self.record_broken(sample.broken)
        return sample.pixels, sample.class_index

    def __getitems__(self, indices: list[int]) -> list[_Sample]:
        """Called by the workers of a DataLoader."""
        return [self._decode(index) for index in indices]

    def summary(self) -> list[str]:
        """How many images in how many classes, then what was left out: a line for each reason."""
        classes = (
            f"in {len(set(self.classes)):,} classes" if self.classes else f"without classes: {self.listing.unlabelled}"
        )
        return [f"{self.title}: {len(self):,} images {classes}", *self.listing.skipped.lines()]

    def print_summary(self, console: Console) -> None:
        """Print `summary`."""
        for line in self.summary():
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def broken_line(self, names_in: Path | None = None) -> str | None:
        """How many images were broken, in one line, if any were; names_in: the file that has all names."""
        if not self.broken:
            return None
        count = len(self.broken)
        said = f"names and reasons: {names_in}" if names_in else "; ".join(islice(self.broken, 3)) + "; …" * (count > 3)
        return (
            f"{self.title}: {count:,} of {len(self):,} images could not be read and were replaced by the next ones: "
            f"{said}"
        )

    def print_broken(self, console: Console, names_in: Path | None = None) -> None:
        """Print `broken_line`, if there is one."""
        if line := self.broken_line(names_in):
            console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def require_classes(self) -> None:
        """Raises `DataError` if the images have no classes."""
        if not self.classes:
            raise DataError(
                f"{self.title}: classes are needed here, but {self.listing.unlabelled}; give images with classes, or "
                f"for shards `classes`, a text file with one class name per line"
            )

    @property
    def allowed_broken(self) -> int:
        """The share max_broken of all images, but at least one; zero for max_broken = 0; never all images."""
        allowed = max(1, int(self.max_broken * len(self))) if self.max_broken else 0
        return min(allowed, len(self) - 1)

    def record_broken(self, broken: Mapping[str, str]) -> None:
        """Add to `broken`. Raises `DataError`, naming the first few, if there are more than `allowed_broken`."""
        self.broken.update(broken)
        count, allowed = len(self.broken), self.allowed_broken
        if count > allowed:
            first = "; ".join(f"{name}: {reason}" for name, reason in islice(self.broken.items(), 3))
            raise DataError(
                f"{self.title}: {count} of {len(self):,} images cannot be read, but at most {allowed} are allowed "
                f"(max_broken = "
                f"{self.max_broken}): {first}{'; ...' if count > 3 else ''}. Fix or remove them, or raise max_broken"
            )

    def _decode(self, index: int) -> _Sample:
        broken: dict[str, str] = {}
        for offset in range(self.allowed_broken + 1):
            candidate = (index + offset) % len(self)
            try:
                image, class_index = self.listing.read(candidate)
                picture = decode(image, TRUSTED) if isinstance(image, bytes) else from_pillow(image)
                return _Sample(self.transform(picture.image), class_index, broken)
            except (OSError, ImageError) as error:
                broken[self.name(candidate)] = (
                    str(error) if isinstance(error, ImageError) else f"{type(error).__name__}: {error}"
                )
        return _Sample(torch.empty(0), -1, broken)  # never used: `record_broken` raises first


class _Sample(NamedTuple):
    pixels: Tensor
    class_index: int
    broken: dict[str, str]  # skipped before a readable image


def load(
    images: Images, batches: Iterable[list[int]], workers: int, pin_memory: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode batches of indices in `workers` processes: (pixels [B, 3, H, W], classes [B]).

    Raises `DataError`, in this process, if more images are broken than allowed, or if the processes have no shared
    memory.
    """
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
    )
    with naming(SHARED):
        loaded = iter(loader)  # starts the processes
    for batch in loaded:
        if isinstance(batch, str):
            raise DataError(batch)
        pixels, classes, broken = batch
        images.record_broken(broken)
        yield pixels, classes


def _begin_worker(_: int) -> None:
    heed_the_second_signal_alone()


def _collate(samples: list[_Sample]) -> tuple[Tensor, Tensor, dict[str, str]] | str:
    """A batch; or why it cannot be handed over."""
    if problem := _no_shared_memory(sum(sample.pixels.nbytes for sample in samples)):
        return problem
    broken = {name: reason for sample in samples for name, reason in sample.broken.items()}
    pixels = [sample.pixels for sample in samples if sample.class_index >= 0]
    classes = torch.tensor([sample.class_index for sample in samples])
    return torch.stack(pixels) if pixels else torch.empty(0), classes, broken


def _no_shared_memory(size: int) -> str:
    """Why a worker process cannot hand over a batch of so many bytes: torch would print a traceback there, and here it
    would wait for ever. The other processes may each be about to hand over one, too."""
    worker = get_worker_info()
    if worker is None or not SHARED.is_dir():
        return ""
    status = os.statvfs(SHARED)
    free = status.f_bavail * status.f_frsize
    if free > worker.num_workers * (size + _PAGES):
        return ""
    return (
        f"{SHARED} has {free / 1e6:,.1f} MB free, but a batch needs {size / 1e6:,.1f} MB, since processes that decode "
        "images pass them on there; free some space (in a container: --shm-size=1g), use smaller batches, or set "
        "`workers = 0`"
    )


class Visit(NamedTuple):
    """One pass over one chunk."""

    epoch: int
    chunk: int
    skip: int  # number of its first steps to skip


@dataclass(frozen=True)
class Plan:
    """The order of images and tokens, as a function of these numbers only: any step can be computed on its own.

    Images are shuffled once (by seed) and split into chunks of `mixed_images`, the last one shorter; images after the
    last full step are dropped. Every epoch visits the chunks in a different order. Within a chunk the tokens of all
    images are shuffled, again in every epoch, and split into steps of `images_per_step` times T tokens (T tokens per
    image). If mixed_images = images_per_step, a step consists of whole images, [CLS] first in each.

    Under data parallelism process `rank` of `world` forwards the images at positions rank, rank + world, ... of a chunk
    and gets the tokens of these in every step: about 1/world of them, but not exactly. All processes together get
    images_per_step * T tokens in every step, the same ones as a run in a single process.
    """

    images: int
    images_per_step: int
    mixed_images: int
    seed: int
    epochs: int

    def __post_init__(self) -> None:
        if self.mixed_images % self.images_per_step:
            raise ValueError(f"mixed_images = {self.mixed_images} is not a multiple of {self.images_per_step}")
        if self.images < self.images_per_step:
            raise DataError(
                f"the data have {self.images} images, fewer than one step's {self.images_per_step}: "
                "give more images or lower images_per_step"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of full steps per epoch."""
        return self.images // self.images_per_step

    @property
    def steps(self) -> int:
        """Number of steps in all epochs."""
        return self.steps_per_epoch * self.epochs

    @property
    def mixed(self) -> bool:
        """Whether tokens are shuffled across steps."""
        return self.mixed_images > self.images_per_step

    @property
    def chunks(self) -> int:
        """Number of chunks per epoch."""
        return -(-self.steps_per_epoch * self.images_per_step // self.mixed_images)

    def chunk(self, chunk: int) -> list[int]:
        """The images of a chunk, in the order of its tokens."""
        end = min((chunk + 1) * self.mixed_images, self.steps_per_epoch * self.images_per_step)
        return self._order[chunk * self.mixed_images : end].tolist()

    def share(self, chunk: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """The images of a chunk that a process forwards, in batches of images_per_step / world, rounded up."""
        if world > self.images_per_step:
            raise DataError(f"images_per_step = {self.images_per_step} cannot be divided among {world} processes")
        images, size = self.chunk(chunk)[rank::world], -(-self.images_per_step // world)
        return [images[start : start + size] for start in range(0, len(images), size)]

    def visits(self, skip: int = 0) -> Iterator[Visit]:
        """The chunks in the order in which they are visited, starting at global step `skip`."""
        for epoch in range(skip // self.steps_per_epoch, self.epochs):
            remaining = max(0, skip - epoch * self.steps_per_epoch)
            for chunk in _random(2, self.seed, epoch).permutation(self.chunks).tolist():
                steps = len(self.chunk(chunk)) // self.images_per_step
                if remaining < steps:
                    yield Visit(epoch, chunk, remaining)
                remaining = max(0, remaining - steps)

    def batches(self, skip: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        """Batches of images for `load`; one batch per step if tokens are not mixed."""
        for visit in self.visits(skip):
            yield from self.share(visit.chunk, rank, world)

    def tokens(self, visit: Visit, tokens_per_image: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
        """For each step of a visit, indices into this process's tokens of that chunk, which are ordered by image."""
        order = np.arange(len(self.chunk(visit.chunk)) * tokens_per_image)
        if self.mixed:
            _random(3, self.seed, visit.epoch, visit.chunk).shuffle(order)
        for step in order.reshape(-1, self.images_per_step * tokens_per_image)[visit.skip :]:
            image, token = np.divmod(step, tokens_per_image)
            mine = image % world == rank
            yield torch.from_numpy(image[mine] // world * tokens_per_image + token[mine])

    @cached_property
    def _order(self) -> np.ndarray:
        return _random(1, self.seed).permutation(self.images)


def _random(purpose: int, seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng((purpose, seed % 2**32, *key))
