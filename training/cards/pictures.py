"""Small pictures of the model's inputs: after cropping and resizing, so that masks match them.

During the survey they are stored in a file, not in memory. The user chooses what is put into the bundle, because data
sets have licences: thumbnails of the images, the mean of each feature's exemplars, or nothing.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import written

Pictures = Literal["thumbnails", "means", "none"]
SIZES: dict[Pictures, int] = {"thumbnails": 64, "means": 32, "none": 0}  # pixels of the longer side, at most
QUALITY = 45  # of WebP


class Album:
    """Small pictures by image number, uint8 [N, h, w, 3], in a file that persists across interruptions."""

    def __init__(self, file: Path, preprocessing: Preprocessing, count: int, kind: Pictures) -> None:
        height, width = preprocessing.size
        shrink = min(1.0, SIZES[kind] / max(height, width))
        self.size = max(1, round(height * shrink)), max(1, round(width * shrink))
        self._mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(3, 1, 1)
        shape = (count, *self.size, 3)
        self._file = file
        if not (file.is_file() and np.load(file, mmap_mode="r").shape == shape):
            with written(file) as partial:
                np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)  # zeros, that take no room
        self._pixels: np.memmap = np.load(file, mmap_mode="r")

    def add(self, start: int, pixels: Tensor) -> None:
        """Add normalised pixels [B, 3, H, W] of images from number `start` on; those beyond the album are ignored.

        Raises `FileError` if there is no room for them.
        """
        unnormalised = (pixels[: max(0, len(self._pixels) - start)].cpu() * self._std + self._mean).clamp(0, 1)
        small = F.interpolate(unnormalised, self.size, mode="area") if len(unnormalised) else unnormalised
        # Written to the file, not to the memory that maps it: there a full disk would end the process (SIGBUS).
        with naming(self._file), self._file.open("r+b") as file:
            file.seek(self._pixels.offset + start * self._pixels[0].nbytes)
            file.write((small * 255).round().byte().permute(0, 2, 3, 1).numpy().tobytes())

    def picture(self, image: int) -> bytes:
        """One image as WebP."""
        return _webp(self._pixels[image])

    def mean(self, images: NDArray[np.integer]) -> bytes:
        """The unweighted mean of images as WebP: with many images, none of them is recognisable."""
        return _webp(self._pixels[images].mean(0).round().astype(np.uint8))


def _webp(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()
