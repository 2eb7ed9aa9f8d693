"""The pixels of images: each decoded once, as far as memory goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.files.names import printable
from vitrine.models.inputs.files import read_file
from vitrine.service.engine.decoders import Decoders
from vitrine.service.errors import ServiceError
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.failures import failure
from vitrine.service.operations.settings import Settings

KEPT = 2**30  # bytes of pixels in memory; what does not fit is decoded again


class Pictures:
    """A folder's images. Use as a context manager: a process decodes them."""

    def __init__(self, root: Path, preprocessing: Preprocessing, settings: Settings) -> None:
        self.root, self._size = root, preprocessing.size
        self._decoders = Decoders(1, preprocessing, settings.image_limits, settings.decode_seconds)
        self._kept: dict[str, NDArray[np.float32]] = {}

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._decoders.__exit__(kind, error, at)

    def pixels(self, image: str) -> NDArray[np.float32]:
        """[3, H, W] normalised. Raises OSError, `ServiceError`."""
        if (kept := self._kept.get(image)) is not None:
            return kept
        pixels = self._decoders.decode(read_file(self.root / image)).pixels
        if (len(self._kept) + 1) * pixels.nbytes <= KEPT:
            self._kept[image] = pixels
        return pixels

    def batches(self, images: Sequence[str], size: int) -> Iterator[NDArray[np.float32]]:
        """[B, 3, H, W], in order, of images that `readable` found to be so."""
        for at in range(0, len(images), size):
            yield np.stack([self.pixels(image) for image in images[at : at + size]])

    def readable(self, images: Sequence[str]) -> tuple[NDArray[np.bool_], list[str]]:
        """([n] which can be used, why others cannot). Raises `DebiasError` if a file is not there, or none can be
        used: the table is of other images."""
        usable, reasons = np.ones(len(images), bool), []
        for number, image in enumerate(images):
            try:
                self.pixels(image)
            except FileNotFoundError as error:
                raise DebiasError(
                    f"{self.root} has no file {printable(image)}; names of images must be paths below --data"
                ) from error
            except (OSError, ServiceError) as error:
                usable[number] = False
                reasons.append(f"{printable(image)}: {failure(error)[1]}")
        if not usable.any():
            raise DebiasError(f"none of {len(images):,} images can be used; the first: {reasons[0]}")
        return usable, reasons
