"""Medians over images of what residual SAEs make of every token: the paper's baseline (arXiv 2509.17401).

A feature that is active in fewer than half of the images has the median 0, which under a TopK is nearly all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.relevance import Medians


@torch.no_grad()
def medians(
    tower: Tower, saes: ResidualSaes, images: Callable[[], Iterable[Tensor]], tokens_at_once: int = 16
) -> Medians:
    """The medians of activations by feature and token, and of errors and of the stream by channel and token; of an even
    number the lower of the two in the middle. Computed and returned on the tower's device, but what is collected is
    kept on the host.

    Args:
        images: gives the same batches of normalised pixels [B, 3, H, W] each time it is called.
        tokens_at_once: the images are run once for so many tokens. What is kept of them for N images takes
            tokens_at_once N (L - 1) (8 d + 12 k) bytes: at B/16 (k 160) for 1,024 images and 16 tokens 1.5 GB, in
            13 passes.
    """
    device = tower.visual.proj.device
    of_activations: list[list[Tensor]] = [[] for _ in range(saes.layers)]  # [t, F] of each slice of tokens
    of_errors: list[list[Tensor]] = [[] for _ in range(saes.layers)]
    of_streams: list[list[Tensor]] = [[] for _ in range(saes.layers)]
    for start in range(0, tower.tokens, tokens_at_once):
        part = slice(start, start + tokens_at_once)
        codes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(saes.layers)]
        errors: list[list[Tensor]] = [[] for _ in range(saes.layers)]
        streams: list[list[Tensor]] = [[] for _ in range(saes.layers)]
        for pixels in images():
            stream = tower.embed(pixels.to(device))
            for layer in range(saes.layers):
                stream = stream + tower.attention(layer, stream)
                stream = stream + tower.mlp(layer, stream)[1]
                code = Code(saes, layer, stream)
                of_part = code.values[:, part]
                places = of_part.abs().topk(min(saes.encoders[layer].sparsifier.places, of_part.shape[-1]), dim=-1)
                values = of_part.gather(-1, places.indices)
                codes[layer].append((places.indices.cpu(), values.cpu()))
                errors[layer].append(code.errors[:, part].cpu())
                streams[layer].append(stream[:, part].cpu())
        for layer, features in enumerate(saes.architecture.features):
            indices, values = (torch.cat(parts) for parts in zip(*codes[layer], strict=True))  # [N, t, k]
            by_token = [_of_codes(indices[:, t], values[:, t], features) for t in range(indices.shape[1])]
            of_activations[layer].append(torch.stack(by_token))
            of_errors[layer].append(torch.cat(errors[layer]).median(0).values)
            of_streams[layer].append(torch.cat(streams[layer]).median(0).values)
    activations = [torch.cat(parts).to(device) for parts in of_activations]
    errors_and_streams = [torch.stack([torch.cat(parts) for parts in of]).to(device) for of in (of_errors, of_streams)]
    return Medians(activations, *errors_and_streams)


def _of_codes(indices: Tensor, values: Tensor, features: int) -> Tensor:
    """Codes of one token in N images, [N, k] each, to the medians of its features [F]."""
    medians = values.new_zeros(features)
    counts = torch.bincount(indices[values != 0], minlength=features)
    often = (counts * 2 >= len(values)).nonzero()[:, 0]
    column = torch.full((features,), len(often))
    column[often] = torch.arange(len(often))
    dense = values.new_zeros(len(values), len(often) + 1)  # the last column: of all others
    dense.scatter_(1, column[indices], values)
    medians[often] = dense[:, :-1].median(0).values
    return medians
