"""The one pass over the images. Kept are counts, the strongest images of every feature, [CLS]'s codes and embeddings.

Memory does not grow with the activations: for L * F features, K exemplars, P patches and N images it is about
L F (2 * 256 * 4 + 2 K (2 P + 12)) + N (4 D + 6 L k) bytes, 0.6 GB for CLIP's B/32 with 6,144 features a layer. It is
saved every few minutes, so that an interrupted survey goes on where it was.
"""

from __future__ import annotations

import os
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
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.data.images import Images, load

# Activations are counted in bins of equal ratio, fine enough for quantiles and histograms of any scale; those below
# the first bin or above the last (2^8) are counted there.
BINS_AN_OCTAVE, LEAST = 16, 2.0**-8
LOG_BINS = 16 * BINS_AN_OCTAVE
CLS, PATCHES = 0, 1  # the two readings of a feature, see `models.bundle.cards`
SAVE_EVERY_SECONDS = 120.0


@dataclass
class Survey:
    """What was seen of the exemplar images (the first of the order) and of the held-out ones (the others).

    Args of `empty` say the sizes; R = 2 readings. Image numbers are places in the order of the survey.
    """

    seen: Tensor  # [] images, exemplar and held-out
    fires: Tensor  # [R, L, F] int64: images with [CLS] active; active patches
    bins: Tensor  # [R, L, F, LOG_BINS] int32: exemplar images by |activation|
    values: Tensor  # [R, L, F, K] the largest activations by magnitude, signed; 0: none
    images: Tensor  # [R, L, F, K] int32, where they were
    masks: Tensor  # [R, L, F, K, P] float16: |activation| on that image's patches
    embeddings: Tensor  # [N + H, D] unit
    classes: Tensor  # [N + H] int32 class indices of their source
    code_indices: Tensor  # [C, L, k] int32, at [CLS] of the first C images
    code_values: Tensor  # [C, L, k] float16
    held_out: Tensor  # [H, R, L, ceil(F / 8)] uint8: bit f % 8 of byte f // 8 says whether feature f fires

    @classmethod
    def empty(
        cls, tower: Tower, clt: CrossLayerTranscoder, images: int, held_out: int, exemplars: int, codes: int
    ) -> Survey:
        """For so many images, exemplars a feature and codes that are kept."""
        layers, features, patches = clt.layers, clt.features, tower.tokens - 1
        k = max(int(encoder.sparsifier.inference_places()) for encoder in clt.encoders)
        codes = min(codes, images)
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
            held_out=torch.zeros(held_out, 2, layers, -(-features // 8), dtype=torch.uint8),
        )

    @property
    def exemplar_images(self) -> int:
        """How many of the images exemplars are chosen from."""
        return len(self.embeddings) - len(self.held_out)

    @torch.no_grad()
    def add(self, tower: Tower, clt: CrossLayerTranscoder, pixels: Tensor, classes: Tensor) -> None:
        """The next images, normalised pixels [B, 3, H, W] where the tower and the CLT lie, and class indices [B]: all
        of them exemplar images, or all held out."""
        taps = tower(pixels)
        start, count = int(self.seen), len(pixels)
        held_out = start >= self.exemplar_images
        embeddings = F.normalize(tower.head(taps.residual_out[:, 0]), dim=-1)
        self.embeddings[start : start + count] = embeddings.float().cpu()
        self.classes[start : start + count] = classes.int()
        is_cls = torch.zeros(count, tower.tokens, dtype=torch.bool, device=pixels.device)
        is_cls[:, 0] = True
        for layer, (encoder, mlp_in) in enumerate(zip(clt.encoders, taps.mlp_in, strict=True)):
            code = encoder(mlp_in.flatten(0, 1), is_cls.flatten())
            dense = code.values.new_zeros(len(code.values), clt.features)
            dense = dense.scatter_(1, code.indices, code.values).view(count, tower.tokens, clt.features)
            if held_out:
                self._hold_out(layer, start - self.exemplar_images, dense)
            else:
                self._collect(layer, start, dense)
                self._keep_codes(layer, start, code.indices, code.values, tower.tokens)
        self.seen += count

    def _hold_out(self, layer: int, start: int, dense: Tensor) -> None:
        """Which features fire in each of these images: dense activations [B, T, F]."""
        fires = torch.stack([dense[:, 0] != 0, (dense[:, 1:] != 0).any(1)], dim=1).cpu()  # [B, R, F]
        padded = F.pad(fires, (0, -fires.shape[-1] % 8)).unflatten(-1, (-1, 8))
        weights = 1 << torch.arange(8)
        self.held_out[start : start + len(dense), :, layer] = (padded * weights).sum(-1).to(torch.uint8)

    def _collect(self, layer: int, start: int, dense: Tensor) -> None:
        """Counts and exemplars, from dense activations [B, T, F]."""
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
        """Add magnitudes [B, F] to bins [F, LOG_BINS]; zeros do not count."""
        image, feature = magnitudes.nonzero(as_tuple=True)
        place = ((magnitudes[image, feature] / LEAST).log2() * BINS_AN_OCTAVE).floor().clamp(0, LOG_BINS - 1)
        ones = torch.ones(len(place), dtype=bins.dtype)
        bins.view(-1).scatter_add_(0, feature * LOG_BINS + place.long(), ones)

    def _merge(self, reading: int, layer: int, start: int, values: Tensor, masks: Tensor) -> None:
        """Put those of the images' activations [B, F] in that belong among the K largest; masks [B, P, F]."""
        kept, images, patches = (part[reading, layer] for part in (self.values, self.images, self.masks))
        count, exemplars = len(values), kept.shape[1]
        better = (values.abs().amax(0) > kept[:, -1].abs()).nonzero()[:, 0]
        if not len(better):
            return
        offered = torch.cat([kept[better], values.T[better]], dim=1)  # [n, K + B]
        best = offered.abs().topk(exemplars, dim=1).indices
        numbers = torch.arange(start, start + count, dtype=images.dtype).expand(len(better), count)
        kept[better] = offered.gather(1, best)
        images[better] = torch.cat([images[better], numbers], dim=1).gather(1, best)
        maps = torch.cat([patches[better], masks[:, :, better].permute(2, 0, 1)], dim=1)
        patches[better] = maps.gather(1, best[..., None].expand(-1, -1, maps.shape[-1]))

    def _keep_codes(self, layer: int, start: int, indices: Tensor, values: Tensor, tokens: int) -> None:
        """[CLS]'s codes of the first images, from those of all tokens [B * T, K]."""
        count = max(0, min(len(self.code_indices) - start, len(indices) // tokens))
        places = min(self.code_indices.shape[-1], indices.shape[-1])
        # The active ones first: thresholds may leave them anywhere among the places.
        order = (values[::tokens] == 0).to(torch.uint8).sort(dim=1, stable=True).indices[:count, :places]
        here = slice(start, start + count)
        self.code_indices[here, layer, :places] = indices[::tokens][:count].gather(1, order).int().cpu()
        self.code_values[here, layer, :places] = values[::tokens][:count].gather(1, order).half().cpu()

    def fires_held_out(self, reading: int, layer: int) -> Tensor:
        """[H, F] bool."""
        packed = self.held_out[:, reading, layer]
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten(1)[:, : self.fires.shape[-1]].bool()

    def save(self, file: Path, key: str) -> None:
        """Replace `file`, in one step; key: what this survey is of."""
        partial = file.with_name(f".{file.name}")
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, partial, {"key": key})
        os.replace(partial, file)

    @classmethod
    def load(cls, file: Path, key: str) -> Survey | None:
        """What `save` wrote; None if there is nothing, or of something else."""
        if not file.is_file():
            return None
        with safe_open(file, "pt") as opened:
            if opened.metadata().get("key") != key:
                return None
        return cls(**load_file(file))


def batches(
    orders: list[tuple[Images, list[int]]], skip: int, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised pixels [B, 3, H, W], class indices [B]) of all images in turn, from place `skip` on; no batch has
    images of two sources."""
    for data, order in orders:
        left = order[skip:]
        skip = max(0, skip - len(order))
        yield from load(data, [left[at : at + batch_size] for at in range(0, len(left), batch_size)], workers)


class Saver:
    """Saves a survey when it is time to."""

    def __init__(self, survey: Survey, file: Path, key: str) -> None:
        self.survey, self.file, self.key, self._last = survey, file, key, monotonic()

    def maybe(self) -> None:
        """If the last time is long ago."""
        if monotonic() - self._last >= SAVE_EVERY_SECONDS:
            self.now()

    def now(self) -> None:
        self.survey.save(self.file, self.key)
        self._last = monotonic()


def quantiles(bins: Tensor, at: tuple[float, ...]) -> Tensor:
    """Quantiles [..., Q] of what fell into bins [..., LOG_BINS], within half a bin (2 %); nan where nothing did."""
    total = bins.sum(-1, keepdim=True).double()
    cumulated = bins.cumsum(-1).double()
    wanted = (torch.tensor(at, dtype=torch.float64) * total).clamp_min(1)  # the first one is there already
    place = torch.searchsorted(cumulated, wanted).clamp(max=LOG_BINS - 1)
    return centres()[place].where(total > 0, torch.nan)


def histogram(bins: Tensor, largest: Tensor, count: int) -> Tensor:
    """Bins [..., LOG_BINS] to `count` bins of equal width from 0 to `largest` [...]: [..., count] int64."""
    place = (centres() / largest[..., None].double().clamp_min(1e-30) * count).floor().clamp(0, count - 1).long()
    made = torch.zeros(*bins.shape[:-1], count, dtype=torch.int64)
    return made.scatter_add_(-1, place, bins.long())


def centres() -> Tensor:
    """Geometric middle of each of the bins [LOG_BINS]."""
    return LEAST * 2 ** ((torch.arange(LOG_BINS, dtype=torch.float64) + 0.5) / BINS_AN_OCTAVE)
