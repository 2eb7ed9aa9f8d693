"""A CLT's inputs and targets: streamed from the tower, shuffled. Nothing is stored on disk unless a cache
(training/data/cache.py) is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from vitrine.models.clip.tower import Taps, Tower
from vitrine.training.data.cache import ActivationCache
from vitrine.training.data.images import Images, Plan, load

Context = Callable[[], AbstractContextManager[object]]


class Activations(NamedTuple):
    """Inputs and outputs of every MLP for N tokens; for whole images N = images * T, [CLS] first in each."""

    mlp_in: Tensor  # [L, N, d]
    mlp_out: Tensor  # [L, N, d]
    is_cls: Tensor  # [N] bool


def activations(taps: Taps) -> Activations:
    """Flatten taps over images and tokens."""
    is_cls = torch.zeros(taps.residual_out.shape[:2], dtype=torch.bool, device=taps.residual_out.device)
    is_cls[:, 0] = True
    return Activations(taps.mlp_in.flatten(1, 2), taps.mlp_out.flatten(1, 2), is_cls.flatten())


def stream(
    tower: Tower, batches: Iterable[tuple[Tensor, Tensor]], context: Context = nullcontext
) -> Iterator[Activations]:
    """One `Activations` per batch of pixels [B, 3, H, W], computed on the tower's device in `context` (autocast)."""
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
    """The tokens of every step of `plan`, starting at global step `skip`; float32, on the tower's device.

    All processes together get images_per_step * T tokens per step, each process its share of them (see `Plan`). One
    chunk is held in memory: 2 * L * mixed_images * T * d numbers. A chunk is always forwarded in the same batches, so
    its activations are bit-identical in every epoch and in every resumed run. With a cache, the first visit of a chunk
    writes it and later visits read it.
    """
    visits = list(plan.visits(skip))
    cached = cache.readable_chunks() if cache else set()
    fresh = []  # for each visit, whether its activations must be computed
    for visit in visits:
        fresh.append(visit.chunk not in cached)
        if cache:
            cached.add(visit.chunk)

    def forward(chunks: Iterable[int]) -> Iterator[Activations]:
        batches = (batch for chunk in chunks for batch in plan.share(chunk, rank, world))
        pin_memory = next(tower.parameters()).device.type == "cuda"
        return stream(tower, load(images, batches, workers, pin_memory), context)

    # One stream for all chunks, so that workers decode ahead during a step.
    ahead = forward(visit.chunk for visit, is_fresh in zip(visits, fresh, strict=True) if is_fresh)
    for visit, is_fresh in zip(visits, fresh, strict=True):
        chunk = None if is_fresh else _from_cache(cache, visit.chunk, tower, images)
        if chunk is None:
            share = plan.share(visit.chunk, rank, world)
            batches = islice(ahead, len(share)) if is_fresh else forward([visit.chunk])
            chunk = _concatenate(batches, sum(map(len, share)) * tower.tokens)
            if cache:
                stored = cache.write(visit.chunk, chunk.mlp_in, chunk.mlp_out, images.broken)
                chunk = Activations(*stored, chunk.is_cls)
        if plan.mixed:
            for order in plan.tokens(visit, tower.tokens, rank, world):
                indices = order.to(chunk.is_cls.device)
                yield Activations(chunk.mlp_in[:, indices], chunk.mlp_out[:, indices], chunk.is_cls[indices])
        else:
            yield chunk
        del chunk  # free it before the next one is computed


def _concatenate(batches: Iterable[Activations], tokens: int) -> Activations:
    """Concatenate batches into preallocated tensors, float32."""
    result, start = None, 0
    for batch in batches:
        layers, count, width = batch.mlp_in.shape
        if result is None:
            shape, device = (layers, tokens, width), batch.mlp_in.device
            is_cls = torch.empty(tokens, dtype=torch.bool, device=device)
            result = Activations(torch.empty(shape, device=device), torch.empty(shape, device=device), is_cls)
        columns = slice(start, start + count)
        result.mlp_in[:, columns], result.mlp_out[:, columns], result.is_cls[columns] = batch
        start += count
    assert result is not None
    assert start == tokens
    return result


def _from_cache(cache: ActivationCache | None, chunk: int, tower: Tower, images: Images) -> Activations | None:
    entry = cache.read(chunk) if cache else None
    if entry is None:
        return None
    mlp_in, mlp_out, broken = entry
    images.record_broken(broken)
    device = next(tower.parameters()).device
    is_cls = torch.arange(mlp_in.shape[1], device=device) % tower.tokens == 0
    return Activations(mlp_in.to(device), mlp_out.to(device), is_cls)
