"""The tokens of every training step: streamed from the tower, shuffled. Nothing is stored on disk unless a cache
(training/data/cache.py) is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.training.data.activations import Batch, batch_of
from vitrine.training.data.cache import ActivationCache
from vitrine.training.data.images import Images, Plan, load

Context = Callable[[], AbstractContextManager[object]]


def stream(
    kind: type[Batch], tower: Tower, batches: Iterable[tuple[Tensor, Tensor]], context: Context = nullcontext
) -> Iterator[Batch]:
    """One batch of the `kind` per batch of pixels [B, 3, H, W], computed on the tower's device in `context`
    (autocast)."""
    device = next(tower.parameters()).device
    for pixels, _ in batches:
        with torch.no_grad(), context():
            taps = tower(pixels.to(device, non_blocking=True))
        yield kind.of(taps)


def steps(
    kind: type[Batch],
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
) -> Iterator[Batch]:
    """The tokens of every step of `plan`, starting at global step `skip`; float32, on the tower's device.

    All processes together get images_per_step * T tokens per step, each process its share of them (see `Plan`). One
    chunk is held in memory: `tables` * mixed_images * T * d numbers. A chunk is always forwarded in the same batches,
    so its activations are bit-identical in every epoch and in every resumed run. With a cache, which must be of this
    kind, the first visit of a chunk writes it and later visits read it.
    """
    visits = list(plan.visits(skip))
    cached = cache.readable_chunks() if cache else set()
    fresh = []  # for each visit, whether its activations must be computed
    for visit in visits:
        fresh.append(visit.chunk not in cached)
        if cache:
            cached.add(visit.chunk)

    def forward(chunks: Iterable[int]) -> Iterator[Batch]:
        batches = (batch for chunk in chunks for batch in plan.share(chunk, rank, world))
        pin_memory = next(tower.parameters()).device.type == "cuda"
        return stream(kind, tower, load(images, batches, workers, pin_memory), context)

    # One stream for all chunks, so that workers decode ahead during a step.
    ahead = forward(visit.chunk for visit, is_fresh in zip(visits, fresh, strict=True) if is_fresh)
    for visit, is_fresh in zip(visits, fresh, strict=True):
        chunk = None if is_fresh else _from_cache(kind, cache, visit.chunk, tower, images)
        if chunk is None:
            share = plan.share(visit.chunk, rank, world)
            batches = islice(ahead, len(share)) if is_fresh else forward([visit.chunk])
            chunk = _concatenate(kind, batches, sum(map(len, share)) * tower.tokens)
            if cache:
                stored = cache.write(visit.chunk, chunk[:-1], images.broken)
                chunk = batch_of(kind, stored, chunk.is_cls)
        if plan.mixed:
            for order in plan.tokens(visit, tower.tokens, rank, world):
                indices = order.to(chunk.is_cls.device)
                yield batch_of(kind, [table[:, indices] for table in chunk[:-1]], chunk.is_cls[indices])
        else:
            yield chunk
        del chunk  # free it before the next one is computed


def _concatenate(kind: type[Batch], batches: Iterable[Batch], tokens: int) -> Batch:
    """Concatenate batches into preallocated tensors, float32."""
    result, start = None, 0
    for batch in batches:
        layers, count, width = batch[0].shape
        if result is None:
            shape, device = (layers, tokens, width), batch[0].device
            tables = (torch.empty(shape, device=device) for _ in batch[:-1])
            result = batch_of(kind, tables, torch.empty(tokens, dtype=torch.bool, device=device))
        columns = slice(start, start + count)
        for whole, part in zip(result[:-1], batch[:-1], strict=True):
            whole[:, columns] = part
        result.is_cls[columns] = batch.is_cls
        start += count
    assert result is not None
    assert start == tokens
    return result


def _from_cache(
    kind: type[Batch], cache: ActivationCache | None, chunk: int, tower: Tower, images: Images
) -> Batch | None:
    entry = cache.read(chunk) if cache else None
    if entry is None:
        return None
    tables, broken = entry
    images.record_broken(broken)
    device = next(tower.parameters()).device
    is_cls = torch.arange(tables[0].shape[1], device=device) % tower.tokens == 0
    return batch_of(kind, [table.to(device) for table in tables], is_cls)
