"""What a CLT reads and what it must produce: streamed from the tower, shuffled, normalised. Nothing lies on disk,
unless a cache (training/data/cache.py) is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrine.models.clip.tower import Taps, Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.data.cache import ActivationCache
from vitrine.training.data.images import Images, Plan, load

Context = Callable[[], AbstractContextManager[object]]


class Activations(NamedTuple):
    """Tokens with what every MLP reads and writes; from whole images N = images * T, [CLS] first in each."""

    mlp_in: Tensor  # [L, N, d]
    mlp_out: Tensor  # [L, N, d]
    is_cls: Tensor  # [N] bool


def activations(taps: Taps) -> Activations:
    """Taps flattened over images and tokens."""
    is_cls = torch.zeros(taps.residual_out.shape[:2], dtype=torch.bool, device=taps.residual_out.device)
    is_cls[:, 0] = True
    return Activations(taps.mlp_in.flatten(1, 2), taps.mlp_out.flatten(1, 2), is_cls.flatten())


def stream(
    tower: Tower, batches: Iterable[tuple[Tensor, Tensor]], context: Context = nullcontext
) -> Iterator[Activations]:
    """One `Activations` a batch of pixels [B, 3, H, W], computed where the tower lies, within `context` (autocast)."""
    device = next(tower.parameters()).device
    for pixels, _ in batches:
        with torch.no_grad(), context():
            taps = tower(pixels.to(device, non_blocking=True))
        yield activations(taps)


def steps(
    tower: Tower,
    images: Images,
    plan: Plan,
    *,
    workers: int,
    skip: int = 0,
    rank: int = 0,
    world: int = 1,
    cache: ActivationCache | None = None,
    context: Context = nullcontext,
) -> Iterator[Activations]:
    """The tokens of every step of `plan`, from global step `skip` on, float32, where the tower lies.

    All processes together get images_per_step * T tokens a step, a single one its share of them (see `Plan`). One
    chunk lies in memory: 2 * L * mixed_images * T * d numbers. A chunk is always forwarded in the same batches, so
    that its activations are the same bits in every epoch and in every run that is taken up. With a cache, a chunk's
    first visit writes it and later ones read it.
    """
    visits = list(plan.visits(skip))
    known = cache.whole() if cache else set()
    fresh = []  # for each visit: must it be computed?
    for visit in visits:
        fresh.append(visit.chunk not in known)
        if cache:
            known.add(visit.chunk)

    def forward(chunks: Iterable[int]) -> Iterator[Activations]:
        batches = (batch for chunk in chunks for batch in plan.share(chunk, rank, world))
        pin_memory = next(tower.parameters()).device.type == "cuda"
        return stream(tower, load(images, batches, workers, pin_memory), context)

    # One stream for all chunks, so that workers decode ahead while a step is made.
    ahead = forward(visit.chunk for visit, is_fresh in zip(visits, fresh, strict=True) if is_fresh)
    for visit, is_fresh in zip(visits, fresh, strict=True):
        chunk = None if is_fresh else _from_cache(cache, visit.chunk, tower, images)
        if chunk is None:
            share = plan.share(visit.chunk, rank, world)
            found = islice(ahead, len(share)) if is_fresh else forward([visit.chunk])
            chunk = _gather(found, sum(map(len, share)) * tower.tokens)
            if cache:
                stored = cache.write(visit.chunk, chunk.mlp_in, chunk.mlp_out, images.broken)
                chunk = Activations(*stored, chunk.is_cls)
        if plan.mixed:
            for places in plan.tokens(visit, tower.tokens, rank, world):
                here = places.to(chunk.is_cls.device)
                yield Activations(chunk.mlp_in[:, here], chunk.mlp_out[:, here], chunk.is_cls[here])
        else:
            yield chunk
        del chunk  # before the next one is made


def _gather(batches: Iterable[Activations], tokens: int) -> Activations:
    """Batches one after the other in one piece of memory, float32."""
    whole, start = None, 0
    for batch in batches:
        layers, count, width = batch.mlp_in.shape
        if whole is None:
            shape, device = (layers, tokens, width), batch.mlp_in.device
            is_cls = torch.empty(tokens, dtype=torch.bool, device=device)
            whole = Activations(torch.empty(shape, device=device), torch.empty(shape, device=device), is_cls)
        here = slice(start, start + count)
        whole.mlp_in[:, here], whole.mlp_out[:, here], whole.is_cls[here] = batch
        start += count
    assert whole is not None
    assert start == tokens
    return whole


def _from_cache(cache: ActivationCache | None, chunk: int, tower: Tower, images: Images) -> Activations | None:
    found = cache.read(chunk) if cache else None
    if found is None:
        return None
    mlp_in, mlp_out, broken = found
    images.note(broken)
    device = next(tower.parameters()).device
    is_cls = torch.arange(mlp_in.shape[1], device=device) % tower.tokens == 0
    return Activations(mlp_in.to(device), mlp_out.to(device), is_cls)


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

    def to(self, device: torch.device) -> Normalisation:
        """The same on another device."""
        return Normalisation(*(getattr(self, field.name).to(device) for field in fields(self)))

    def inputs(self, mlp_in: Tensor) -> Tensor:
        """Normalised ln_2 outputs [L, N, d]."""
        return (mlp_in - self.in_mean[:, None]) / self.in_scale[:, None, None]

    def targets(self, mlp_out: Tensor) -> Tensor:
        """Normalised MLP outputs [L, N, d]."""
        return (mlp_out - self.out_mean[:, None]) / self.out_scale[:, None, None]

    @torch.no_grad()
    def fold_into(self, clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
        """A CLT on raw activations that does what `clt` does on normalised ones, outputs de-normalised; float32.

        Pre-activations stay what they are, so sparsifiers (thresholds) are taken over as they are.
        """
        folded = CrossLayerTranscoder(clt.architecture)
        encoder: Any
        decoder: Any
        raw: Any
        for layer, (encoder, raw) in enumerate(zip(clt.encoders, folded.encoders, strict=True)):
            weight = encoder.weight.float() / self.in_scale[layer]
            raw.weight.copy_(weight)
            raw.bias.copy_(encoder.bias.float() - weight @ self.in_mean[layer])
            raw.sparsifier.load_state_dict(encoder.sparsifier.state_dict())
        for target, (decoder, raw) in enumerate(zip(clt.decoders, folded.decoders, strict=True)):
            for weight, raw_weight in zip(decoder.weights, raw.weights, strict=True):
                raw_weight.copy_(weight.float() * self.out_scale[target])
            raw.bias.copy_(decoder.bias.float() * self.out_scale[target] + self.out_mean[target])
        return folded.train(clt.training)
