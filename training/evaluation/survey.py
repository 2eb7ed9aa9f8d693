"""What must be known of the targets, MLP outputs or streams, before anything is measured: their means, and how long
they usually are.

A pass over the tower alone, over a sample of the images: SAMPLE of them at most, evenly spaced, all if there are no
more. The median is exactly that of the tokens surveyed.

L layers, T tokens, d width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrine.training.evaluation.contributions import CLS, PATCHES

SAMPLE = 256  # images: 50,000 tokens of a ViT with 197


class Survey(NamedTuple):
    """Of all tokens surveyed."""

    means: Tensor  # [3, L, d] of the targets: all tokens, [CLS], patches; float64
    median_norms: Tensor  # [L] of all tokens, float64


class Surveyor:
    """Collects a `Survey`."""

    def __init__(self, layers: int, width: int) -> None:
        self._sums = torch.zeros(2, layers, width, dtype=torch.float64)
        self._norms: list[Tensor] = []  # [L, B * T]
        self._images = self._tokens = 0

    def add(self, targets: Tensor) -> None:
        """The targets of a batch of the sample [L, B, T, d]."""
        y = targets.double()
        self._sums[CLS] += y[:, :, 0].sum(1).cpu()
        self._sums[PATCHES] += y[:, :, 1:].sum((1, 2)).cpu()
        self._norms.append(y.norm(dim=-1).flatten(1).float().cpu())
        self._images, self._tokens = self._images + y.shape[1], y.shape[2]

    def survey(self) -> Survey:
        counts = torch.tensor([1.0, self._tokens - 1], dtype=torch.float64)[:, None, None]
        means = self._sums / (self._images * counts)
        overall = self._sums.sum(0) / (self._images * self._tokens)
        norms = np.median(torch.cat(self._norms, dim=1).numpy(), axis=1)
        return Survey(torch.stack([overall, *means]), torch.from_numpy(norms.astype(np.float64)))
