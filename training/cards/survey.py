"""The single pass over the images. It keeps counts, each feature's strongest images, and [CLS] codes and embeddings.

Memory does not grow with the activations: for L * F features, K exemplars, P patches and N images it is about
L F (2 * 256 * 4 + 2 K (2 P + 12)) + 4 N D + C L (6 k + F / 4) bytes, where C is the number of images with codes: 0.8 GB
for CLIP's B/32 with 6,144 features per layer. The survey is saved every few minutes, so that it can be resumed after an
interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from time import monotonic

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.files.writing import written
from vitrine.training.cards.dictionary import Dictionary
from vitrine.training.data.images import Images, load

# Activations are counted in logarithmic bins, fine enough for quantiles and histograms at any scale; values below the
# first bin or above the last (2^8) are counted in that bin.
BINS_PER_OCTAVE, MIN_ACTIVATION = 16, 2.0**-8
LOG_BINS = 16 * BINS_PER_OCTAVE
CLS, PATCHES = 0, 1  # the two readings of a feature, see `models.bundle.cards`
SAVE_EVERY_SECONDS = 120.0


@dataclass
class Survey:
    """Statistics of the exemplar images (first in the order) and of the held-out images (the rest).

    `empty` sets the sizes; R = 2 readings, F the features of the largest layer: in smaller ones the last never fire.
    Image numbers are positions in the order of the survey.
    """

    seen: Tensor  # [] number of images processed, exemplar and held-out
    fires: Tensor  # [R, L, F] int64: images with [CLS] active; active patches
    bins: Tensor  # [R, L, F, LOG_BINS] int32: exemplar images by |activation|
    values: Tensor  # [R, L, F, K] the largest activations by magnitude, signed; 0: none
    images: Tensor  # [R, L, F, K] int32, image numbers of these; -1: none
    masks: Tensor  # [R, L, F, K, P] float16: |activation| on that image's patches
    embeddings: Tensor  # [N + H, D] unit
    classes: Tensor  # [N + H] int32, class indices of the image's source
    code_indices: Tensor  # [C, L, k] int32, at [CLS] of the first C images
    code_values: Tensor  # [C, L, k] float16
    # Whether features fire, on the first C images and on the held-out ones: [C or H, R, L, ceil(F / 8)] uint8, where
    # feature f is bit f % 8 of byte f // 8.
    fired: Tensor
    fired_held_out: Tensor

    @classmethod
    def empty(
        cls, tower: Tower, dictionary: Dictionary, images: int, held_out: int, exemplars: int, codes: int
    ) -> Survey:
        """An empty survey for these numbers of images, exemplars per feature and stored codes."""
        layers, features, patches = len(dictionary.features), max(dictionary.features), tower.tokens - 1
        k, codes = dictionary.places, min(codes, images)
        return cls(
            seen=torch.zeros((), dtype=torch.int64),
            fires=torch.zeros(2, layers, features, dtype=torch.int64),
            bins=torch.zeros(2, layers, features, LOG_BINS, dtype=torch.int32),
            values=torch.zeros(2, layers, features, exemplars),
            images=torch.full((2, layers, features, exemplars), -1, dtype=torch.int32),
            masks=torch.zeros(2, layers, features, exemplars, patches, dtype=torch.float16),
            embeddings=torch.zeros(images + held_out, tower.embedding),
            classes=torch.zeros(images + held_out, dtype=torch.int32),
            code_indices=torch.zeros(codes, layers, k, dtype=torch.int32),
            code_values=torch.zeros(codes, layers, k, dtype=torch.float16),
            fired=torch.zeros(codes, 2, layers, -(-features // 8), dtype=torch.uint8),
            fired_held_out=torch.zeros(held_out, 2, layers, -(-features // 8), dtype=torch.uint8),
        )

    @property
    def exemplar_images(self) -> int:
        """The number of images from which exemplars are chosen."""
        return len(self.embeddings) - len(self.fired_held_out)

    @torch.no_grad()
    def add(self, tower: Tower, dictionary: Dictionary, pixels: Tensor, classes: Tensor) -> None:
        """Add the next images: normalised pixels [B, 3, H, W] on the device of tower and dictionary, and class indices
        [B]. A batch contains either exemplar images or held-out images, not both."""
        taps = tower(pixels)
        start, count = int(self.seen), len(pixels)
        held_out = start >= self.exemplar_images
        embeddings = F.normalize(tower.head(taps.residual_out[:, 0]), dim=-1)
        self.embeddings[start : start + count] = embeddings.float().cpu()
        self.classes[start : start + count] = classes.int()
        features = self.fires.shape[-1]
        for layer, code in enumerate(dictionary.codes(taps)):
            dense = code.values.new_zeros(len(code.values), features)
            dense = dense.scatter_(1, code.indices, code.values).view(count, tower.tokens, features)
            if held_out:
                self._pack(self.fired_held_out[start - self.exemplar_images :, :, layer], dense)
            else:
                self._pack(self.fired[start:, :, layer], dense)
                self._collect(layer, start, dense)
                self._keep_codes(layer, start, code.indices, code.values, tower.tokens)
        self.seen += count

    @staticmethod
    def _pack(fired: Tensor, dense: Tensor) -> None:
        """Set the bits of the next images [.., R, ceil(F / 8)], as far as there are any, from activations [B, T, F]."""
        fires = torch.stack([dense[:, 0] != 0, (dense[:, 1:] != 0).any(1)], dim=1).cpu()  # [B, R, F]
        padded = F.pad(fires, (0, -fires.shape[-1] % 8)).unflatten(-1, (-1, 8))
        bits = (padded * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
        fired[: len(bits)] = bits[: len(fired)]

    def _collect(self, layer: int, start: int, dense: Tensor) -> None:
        """Update counts and exemplars, from dense activations [B, T, F]."""
        patches = dense[:, 1:]
        strongest = patches.gather(1, patches.abs().argmax(1, keepdim=True))[:, 0]
        self.fires[CLS, layer] += (dense[:, 0] != 0).sum(0).cpu()
        self.fires[PATCHES, layer] += (patches != 0).sum((0, 1)).cpu()
        masks = patches.abs().half().cpu()
        for reading, values in ((CLS, dense[:, 0].cpu()), (PATCHES, strongest.cpu())):
            self._count(self.bins[reading, layer], values.abs())
            self._merge(reading, layer, start, values, masks)

    @staticmethod
    def _count(bins: Tensor, magnitudes: Tensor) -> None:
        """Add magnitudes [B, F] to bins [F, LOG_BINS]; zeros are not counted."""
        image, feature = magnitudes.nonzero(as_tuple=True)
        bin_index = (
            ((magnitudes[image, feature] / MIN_ACTIVATION).log2() * BINS_PER_OCTAVE).floor().clamp(0, LOG_BINS - 1)
        )
        ones = torch.ones(len(bin_index), dtype=bins.dtype)
        bins.view(-1).scatter_add_(0, feature * LOG_BINS + bin_index.long(), ones)

    def _merge(self, reading: int, layer: int, start: int, values: Tensor, masks: Tensor) -> None:
        """Merge the images' activations [B, F] into the K largest; masks [B, P, F]."""
        values_kept, images, patches = (part[reading, layer] for part in (self.values, self.images, self.masks))
        count, exemplars = len(values), values_kept.shape[1]
        better = (values.abs().amax(0) > values_kept[:, -1].abs()).nonzero()[:, 0]
        if not len(better):
            return
        candidates = torch.cat([values_kept[better], values.T[better]], dim=1)  # [n, K + B]
        best = candidates.abs().topk(exemplars, dim=1).indices
        numbers = torch.arange(start, start + count, dtype=images.dtype).expand(len(better), count)
        values_kept[better] = candidates.gather(1, best)
        images[better] = torch.cat([images[better], numbers], dim=1).gather(1, best)
        candidate_masks = torch.cat([patches[better], masks[:, :, better].permute(2, 0, 1)], dim=1)
        patches[better] = candidate_masks.gather(1, best[..., None].expand(-1, -1, candidate_masks.shape[-1]))

    def _keep_codes(self, layer: int, start: int, indices: Tensor, values: Tensor, tokens: int) -> None:
        """Store the [CLS] codes of the first images, from the codes of all tokens [B * T, K]."""
        count = max(0, min(len(self.code_indices) - start, len(indices) // tokens))
        places = min(self.code_indices.shape[-1], indices.shape[-1])
        # Active features first: with thresholds they may be at any place.
        order = (values[::tokens] == 0).to(torch.uint8).sort(dim=1, stable=True).indices[:count, :places]
        rows = slice(start, start + count)
        self.code_indices[rows, layer, :places] = indices[::tokens][:count].gather(1, order).int().cpu()
        self.code_values[rows, layer, :places] = values[::tokens][:count].gather(1, order).half().cpu()

    def fires_at(self, layer: int, reading: Tensor, held_out: bool) -> Tensor:
        """On which images the features of a layer fire, each at its reading [F]: [C, F] bool of the first images, or
        [H, F] of the held-out ones."""
        packed = (self.fired_held_out if held_out else self.fired)[:, :, layer]
        bits = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(2)[..., : len(reading)].bool()
        return torch.where(reading == CLS, bits[:, CLS], bits[:, PATCHES])

    def save(self, file: Path, key: str) -> None:
        """Write `file`, replacing it atomically; key: identifies what was surveyed. Raises `FileError`."""
        with written(file) as partial:
            save_file({field.name: getattr(self, field.name) for field in fields(self)}, partial, {"key": key})

    @classmethod
    def load(cls, file: Path, key: str) -> Survey | None:
        """Read a survey written by `save`; None if there is none, or if it has another key."""
        if not file.is_file():
            return None
        with safe_open(file, "pt") as opened:
            if opened.metadata().get("key") != key:
                return None
        return cls(**load_file(file))


def batches(
    orders: list[tuple[Images, list[int]]], skip: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised pixels [B, 3, H, W], class indices [B]) of all images in order, from position `skip` on; no batch
    contains images of two sources."""
    for data, order in orders:
        remaining = order[skip:]
        skip = max(0, skip - len(order))
        yield from load(data, [remaining[at : at + batch_size] for at in range(0, len(remaining), batch_size)], workers)


class Saver:
    """Saves a survey every `SAVE_EVERY_SECONDS`."""

    def __init__(self, survey: Survey, file: Path, key: str) -> None:
        self.survey, self.file, self.key, self._last = survey, file, key, monotonic()

    def save_if_due(self) -> None:
        """Save if the last save was long enough ago."""
        if monotonic() - self._last >= SAVE_EVERY_SECONDS:
            self.save()

    def save(self) -> None:
        self.survey.save(self.file, self.key)
        self._last = monotonic()


def quantiles(bins: Tensor, at: tuple[float, ...]) -> Tensor:
    """Quantiles [..., Q] from counts in bins [..., LOG_BINS], accurate to half a bin (2 %); nan without any counts."""
    total = bins.sum(-1, keepdim=True).double()
    cumulated = bins.cumsum(-1).double()
    ranks = (torch.tensor(at, dtype=torch.float64) * total).clamp_min(1)  # the lowest rank is 1
    bin_index = torch.searchsorted(cumulated, ranks).clamp(max=LOG_BINS - 1)
    return centres()[bin_index].where(total > 0, torch.nan)


def histogram(bins: Tensor, largest: Tensor, count: int) -> Tensor:
    """Convert bins [..., LOG_BINS] to `count` bins of equal width from 0 to `largest` [...]: [..., count] int64."""
    bin_index = (centres() / largest[..., None].double().clamp_min(1e-30) * count).floor().clamp(0, count - 1).long()
    counts = torch.zeros(*bins.shape[:-1], count, dtype=torch.int64)
    return counts.scatter_add_(-1, bin_index, bins.long())


def centres() -> Tensor:
    """Geometric centre of each bin [LOG_BINS]."""
    return MIN_ACTIVATION * 2 ** ((torch.arange(LOG_BINS, dtype=torch.float64) + 0.5) / BINS_PER_OCTAVE)
