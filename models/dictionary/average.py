"""The average picture: the mean activation of every feature, and the mean stream, at [CLS] and over patches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise


@torch.no_grad()
def mean_code(tower: Tower, clt: CrossLayerTranscoder, images: Iterable[Tensor]) -> Tensor:
    """Mean activations [L, 2, F] over batches of normalised pixels [B, 3, H, W], at [CLS] and over all patches; a
    feature that is not active counts as 0. Computed on the tower's device."""
    device = next(tower.parameters()).device
    sums = torch.zeros(clt.layers, 2, clt.features, dtype=torch.float64, device=device)
    count = 0
    for pixels in images:
        mlp_in = tower(pixels.to(device)).mlp_in  # [L, B, T, d]
        is_cls = torch.arange(len(pixels) * tower.tokens, device=device) % tower.tokens == 0
        for layer, code in enumerate(clt.encode(mlp_in.flatten(1, 2), is_cls)):
            for row, of_type in enumerate((is_cls, ~is_cls)):
                places = code.indices[of_type].flatten()
                sums[layer, row].index_add_(0, places, code.values[of_type].flatten().double())
        count += len(pixels)
    tokens = torch.tensor([1, tower.tokens - 1], device=device)[:, None] * count
    return (sums / tokens).float().cpu()


@torch.no_grad()
def mean_residual_code(tower: Tower, saes: ResidualSaes, images: Iterable[Tensor]) -> Tensor:
    """Mean activations [L - 1, 2, F] of residual SAEs, as of `mean_code`; F is the largest of them, the others end in
    0. Computed on the tower's device."""
    device = next(tower.parameters()).device
    sums = torch.zeros(saes.layers, 2, saes.features, dtype=torch.float64, device=device)
    count = 0
    for pixels in images:
        taps = tower(pixels.to(device))
        streams = taps.residual_in + (taps.attn_out + taps.mlp_out).cumsum(0)  # [L, B, T, d] after each block
        is_cls = torch.arange(len(pixels) * tower.tokens, device=device) % tower.tokens == 0
        for layer, stream in enumerate(streams[:-1]):
            code = saes.encoders[layer](standardise(stream.flatten(0, 1)).x, is_cls)
            for row, of_type in enumerate((is_cls, ~is_cls)):
                places = code.indices[of_type].flatten()
                sums[layer, row].index_add_(0, places, code.values[of_type].flatten().double())
        count += len(pixels)
    return (sums / (torch.tensor([1, tower.tokens - 1], device=device)[:, None] * count)).float().cpu()


@torch.no_grad()
def mean_stream(tower: Tower, images: Iterable[Tensor]) -> Tensor:
    """Mean stream [L + 1, 2, d] before every block and after the last, over batches of normalised pixels [B, 3, H, W],
    at [CLS] and over all patches. Computed on the tower's device."""
    device = next(tower.parameters()).device
    sums, count = torch.zeros(tower.layers + 1, 2, tower.width, dtype=torch.float64, device=device), 0
    for pixels in images:
        taps = tower(pixels.to(device))
        parts = torch.cat([taps.residual_in[None], taps.attn_out + taps.mlp_out])  # [L + 1, B, T, d]
        streams = parts.double().cumsum(0)
        sums += torch.stack([streams[:, :, 0], streams[:, :, 1:].mean(2)], dim=2).sum(1)
        count += len(pixels)
    return (sums / count).float().cpu()
