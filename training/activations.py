"""What a CLT reads and what it must produce, streamed from the tower: nothing is cached on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.clip import Taps, Tower
from models.clt import CrossLayerTranscoder


class Activations(NamedTuple):
    """Every token of a batch of images; N = images * T tokens, image by image, [CLS] first in each."""

    mlp_in: Tensor  # [L, N, d]
    mlp_out: Tensor  # [L, N, d]
    is_cls: Tensor  # [N] bool


def activations(taps: Taps) -> Activations:
    """Taps flattened over images and tokens."""
    is_cls = torch.zeros(taps.residual_out.shape[:2], dtype=torch.bool, device=taps.residual_out.device)
    is_cls[:, 0] = True
    return Activations(taps.mlp_in.flatten(1, 2), taps.mlp_out.flatten(1, 2), is_cls.flatten())


def stream(tower: Tower, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Activations]:
    """One `Activations` a batch of pixels [B, 3, H, W]."""
    for pixels, _ in batches:
        with torch.no_grad():
            taps = tower(pixels)
        yield activations(taps)


@dataclass
class Normalisation:
    """Per layer and side: a mean vector and one scale (root mean square of the deviation from it).

    Training works on (x - mean) / scale, so that no layer dominates the loss by its norm; `fold_into` then writes
    the same function for raw activations. The mean output of [CLS] is kept for the R^2 of [CLS] alone.
    """

    in_mean: Tensor  # [L, d]
    in_scale: Tensor  # [L]
    out_mean: Tensor  # [L, d]
    out_scale: Tensor  # [L]
    out_mean_cls: Tensor  # [L, d]

    @classmethod
    def estimate(cls, batches: Iterable[Activations]) -> Normalisation:
        """Over all tokens of all batches (give many: a single batch misleads)."""
        count = cls_count = 0
        sums: list[Tensor] = []
        for batch in batches:
            x, y = batch.mlp_in.double(), batch.mlp_out.double()
            found = [x.sum(1), x.square().sum((1, 2)), y.sum(1), y.square().sum((1, 2)), y[:, batch.is_cls].sum(1)]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            count += x.shape[1]
            cls_count += int(batch.is_cls.sum())
        if not count:
            raise ValueError("no activations to estimate the normalisation from")
        x_mean, y_mean = sums[0] / count, sums[2] / count
        width = x_mean.shape[1]
        x_scale = ((sums[1] / count - x_mean.square().sum(1)) / width).sqrt()
        y_scale = ((sums[3] / count - y_mean.square().sum(1)) / width).sqrt()
        parts = (x_mean, x_scale, y_mean, y_scale, sums[4] / cls_count)
        return cls(*(part.float() for part in parts))

    def inputs(self, mlp_in: Tensor) -> Tensor:
        """Normalised ln_2 outputs [L, N, d]."""
        return (mlp_in - self.in_mean[:, None]) / self.in_scale[:, None, None]

    def targets(self, mlp_out: Tensor) -> Tensor:
        """Normalised MLP outputs [L, N, d]."""
        return (mlp_out - self.out_mean[:, None]) / self.out_scale[:, None, None]

    @torch.no_grad()
    def fold_into(self, clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
        """A CLT on raw activations that does what `clt` does on normalised ones: same codes, outputs de-normalised."""
        folded = CrossLayerTranscoder(clt.layers, clt.width, clt.features, clt.k)
        folded.w_enc.copy_(clt.w_enc / self.in_scale[:, None, None])
        folded.b_enc.copy_(clt.b_enc - torch.einsum("lfd,ld->lf", folded.w_enc, self.in_mean))
        for target, w_dec in enumerate(clt.w_dec):
            folded.w_dec[target].copy_(w_dec * self.out_scale[target])
        folded.b_dec.copy_(clt.b_dec * self.out_scale[:, None] + self.out_mean)
        return folded
