"""What the units of a layer, features or channels, answer to, over many images: sums, from which nobody need judge.

Of every unit, by its activation z at patches:

    position   share of z's variance that the patch's place explains, whatever the image: of a position detector all
    class      share of the variance of an image's mean z that the image's class explains
    colour     share of z's variance that a patch's mean colour (three channels) explains linearly: R^2
    purity     of its EXEMPLARS strongest images, by the largest z, the share of the class that is there most
    fires      share of all patches at which z is not 0
    spread     share of an image's patches at which it fires, mean over images in which it does
    evenness   (sum z)^2 / (P sum z^2), mean over these images: 1 where z is the same everywhere, 1/P at one patch

Chance is measured, not computed: the first four are measured of a shuffled assignment, too, with places permuted within
each image, and classes and colours of the image before, which in a random order is any image.

B images, P patches, U units, C classes. Kept are 2 P U + 2 C U + 3 EXEMPLARS U numbers and a few more, however many
images there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXEMPLARS = 16


class Batch(NamedTuple):
    """What is known of B images, and of the images that chance takes for them."""

    classes: Tensor  # [B] int64; -1: unknown
    colours: Tensor  # [B, P, 3]
    shuffled_classes: Tensor
    shuffled_colours: Tensor
    places: Tensor  # [B, P] int64: a permutation of each image's patches


@dataclass(frozen=True)
class Measured:
    """Of every unit, [U] each; NaN where there is nothing to explain, or classes are not known."""

    position: Tensor
    of_class: Tensor
    colour: Tensor
    purity: Tensor


class UnitStatistics:
    """Sums of one layer's units."""

    def __init__(self, units: int, patches: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.images, self.patches, self.classes = 0, patches, classes
        self._sums, self._squares = zeros(units), zeros(units)
        self._mean_squares = zeros(units)  # of an image's mean
        self._at_places = zeros(2, patches, units)  # as it is, shuffled
        self._of_classes, self._counts = zeros(2, classes, units), zeros(2, classes)
        self._with_colours = zeros(2, units, 3)
        self._colours, self._colour_products = zeros(2, 3), zeros(2, 3, 3)
        self._active, self._fired, self._spread, self._evenness = (zeros(units) for _ in range(4))
        self._strongest = torch.full((units, EXEMPLARS), -torch.inf, device=device)
        self._strongest_classes = torch.full((2, units, EXEMPLARS), -1, device=device)

    @torch.no_grad()
    def update(self, z: Tensor, batch: Batch) -> None:
        """Activations [B, P, U]."""
        self.images += len(z)
        means, squares = z.mean(1), z.square()
        self._sums += z.sum((0, 1))
        self._squares += squares.sum((0, 1))
        self._mean_squares += means.square().sum(0)
        permuted = z.gather(1, batch.places[..., None].expand_as(z))
        for at, (values, classes, colours) in enumerate(
            ((z, batch.classes, batch.colours), (permuted, batch.shuffled_classes, batch.shuffled_colours))
        ):
            self._at_places[at] += values.sum(0)
            self._with_colours[at] += torch.einsum("bpu,bpc->uc", values, colours)
            self._colours[at] += colours.sum((0, 1))
            self._colour_products[at] += torch.einsum("bpc,bpd->cd", colours, colours)
            known = classes >= 0
            self._of_classes[at].index_add_(0, classes[known], means[known].double())
            self._counts[at] += torch.bincount(classes[known], minlength=self.classes)
        fires = z != 0
        active = fires.any(1)
        self._active += fires.sum((0, 1))
        self._fired += active.sum(0)
        self._spread += fires.float().mean(1).sum(0)
        evenness = z.sum(1).square() / (self.patches * squares.sum(1)).clamp_min(torch.finfo(z.dtype).tiny)
        self._evenness += evenness.sum(0)
        largest = z.amax(1).masked_fill(~active, -torch.inf).T  # [U, B]
        self._strongest, best = torch.cat([self._strongest, largest], dim=1).topk(EXEMPLARS, dim=1)
        new = torch.stack([batch.classes, batch.shuffled_classes])[:, None].expand(-1, len(largest), -1)
        candidates = torch.cat([self._strongest_classes, new], dim=2)
        self._strongest_classes = candidates.gather(2, best.expand(2, -1, -1))

    @property
    def counted(self) -> Tensor:
        """[U] bool: units that fire in EXEMPLARS images at least; of the others little can be said."""
        return self._fired >= EXEMPLARS

    @property
    def fires(self) -> Tensor:
        """[U]"""
        return self._active / (self.images * self.patches)

    @property
    def spread(self) -> Tensor:
        """[U]; NaN if it never fires."""
        return self._spread / self._fired

    @property
    def evenness(self) -> Tensor:
        """[U]; NaN if it never fires."""
        return self._evenness / self._fired

    def measured(self, shuffled: bool = False) -> Measured:
        """The first four figures, or chance."""
        at, tokens = int(shuffled), self.images * self.patches
        mean = self._sums / tokens
        variance = self._squares / tokens - mean.square()
        variance = variance.where(variance > 1e-12 * (self._squares / tokens), torch.nan)
        by_place = (self._at_places[at] / self.images - mean).square().mean(0) / variance
        return Measured(by_place, self._by_class(at), self._by_colour(at, mean, variance), self._purity(at))

    def _by_class(self, at: int) -> Tensor:
        counts, sums = self._counts[at][:, None], self._of_classes[at]
        images = counts.sum()  # NaN without classes
        mean = sums.sum(0) / images
        between = (sums.square() / counts.clamp_min(1)).sum(0) / images - mean.square()
        total = self._mean_squares / images - mean.square()
        return between / total.where(total > 0, torch.nan)

    def _by_colour(self, at: int, mean: Tensor, variance: Tensor) -> Tensor:
        tokens = self.images * self.patches
        of_colours = self._colours[at] / tokens
        products = self._with_colours[at] / tokens - mean[:, None] * of_colours
        covariance = self._colour_products[at] / tokens - of_colours[:, None] * of_colours
        return (products @ torch.linalg.pinv(covariance, hermitian=True) * products).sum(1) / variance

    def _purity(self, at: int) -> Tensor:
        classes = self._strongest_classes[at]
        same = (classes[:, :, None] == classes[:, None]).sum(-1).amax(-1) / EXEMPLARS
        return same.double().where((classes >= 0).all(1), torch.nan)
