"""Which features carry the cue: those that it changes, times what the change does to the logits. To first order.

A photo with the cue and the same photo without it differ in activations z; the gradient of the difference of the two
classes' logits, at what each feature writes, says what that does:

    effect of a feature = sum over tokens of (z with - z without) * <W, gradient>      mean over photos

in the running network with the cue, whose attention and later MLPs the gradient passes (attribution patching; Nanda,
2023). A feature that the cue makes speak for its class has a positive effect.

B photos, T tokens, L layers (of SAEs: all but the last), F features, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.encoder import Encoder
from vitrine.models.dictionary.replacement import which_are_cls
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.graph.rerun import dense
from vitrine.training.evaluation.results import Part

Dictionary = CrossLayerTranscoder | ResidualSaes
CARRIERS = 20  # features that count as the cue's


class Carrier(Part):
    """A feature of the cue."""

    layer: int
    index: int
    effect: float  # logits, mean over photos


class Truth(Part):
    """The features of one dictionary that carry the cue, the strongest first."""

    carriers: tuple[Carrier, ...]
    features: int  # in all
    shift: float  # logits by which the cue itself moves the difference of the two classes, mean over photos


class Pair(NamedTuple):
    """The same photos [B, 3, H, W], normalised."""

    with_cue: Tensor
    without: Tensor


def find_truth(tower: Tower, dictionary: Dictionary, pairs: Iterable[Pair], direction: Tensor) -> Truth:
    """direction: [D], logit scale times (the first class's unit embedding - the second's)."""
    total, shift, count = torch.zeros(()), 0.0, 0
    for pair in pairs:
        total = total + effects(tower, dictionary, pair, direction).double().sum(0)
        shift += float((_margin(tower, pair.with_cue, direction) - _margin(tower, pair.without, direction)).sum())
        count += len(pair.with_cue)
    mean = total / count  # [L, F]
    best = mean.flatten().topk(min(CARRIERS, mean.numel()))
    places = [divmod(place, mean.shape[1]) for place in best.indices.tolist()]
    carriers = (
        Carrier(layer=layer, index=index, effect=value)
        for (layer, index), value in zip(places, best.values.tolist(), strict=True)
    )
    return Truth(carriers=tuple(carriers), features=mean.numel(), shift=shift / count)


def effects(tower: Tower, dictionary: Dictionary, pair: Pair, direction: Tensor) -> Tensor:
    """[B, L, F]; features that a layer has not (SAEs' counts may differ) have none."""
    streams, inputs, gradients = _run(tower, pair.with_cue, direction)
    with torch.no_grad():
        others, other_inputs, _ = _run(tower, pair.without, None)
        if isinstance(dictionary, CrossLayerTranscoder):
            return _of_clt(dictionary, inputs, other_inputs, gradients)
        return _of_saes(dictionary, streams, others, gradients)


def _activations(encoder: Encoder, read: Tensor) -> Tensor:
    """Of all features [B, T, F] of an encoder that reads [B, T, d]."""
    code = encoder(read.flatten(0, 1), which_are_cls(read, "all"))
    return dense((code.indices, code.values), len(encoder.weight)).unflatten(0, read.shape[:2])


def _of_clt(
    clt: CrossLayerTranscoder, inputs: Sequence[Tensor], others: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    found = []
    for layer, encoder in enumerate(clt.encoders):
        change = _activations(encoder, inputs[layer]) - _activations(encoder, others[layer])
        written = torch.zeros(())
        for target in range(layer, clt.layers):
            decoder = clt.decoders[target]
            if layer in decoder.sources:
                written = written + gradients[target] @ decoder.weights[layer - decoder.sources[0]].T
        found.append((change * written).sum(1))
    return torch.stack(found, 1)


def _of_saes(
    saes: ResidualSaes, streams: Sequence[Tensor], others: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    found = torch.zeros(len(streams[0]), saes.layers, saes.features)
    for layer, (encoder, decoder) in enumerate(zip(saes.encoders, saes.decoders, strict=True)):
        own, other = standardise(streams[layer]), standardise(others[layer])
        change = _activations(encoder, own.x) - _activations(encoder, other.x)
        written = own.scale * gradients[layer] @ decoder.weight.T
        found[:, layer, : len(decoder.weight)] = (change * written).sum(1)
    return found


def _run(
    tower: Tower, pixels: Tensor, direction: Tensor | None
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """After each block the stream, what its MLP read, and the gradient at the stream [B, T, d] (without a direction:
    none)."""
    stream = tower.embed(pixels).requires_grad_(direction is not None)
    streams, inputs = [], []
    for layer in range(tower.layers):
        stream = stream + tower.attention(layer, stream)
        mlp_in, mlp_out = tower.mlp(layer, stream)
        stream = stream + mlp_out
        streams.append(stream)
        inputs.append(mlp_in.detach())
    if direction is None:
        return streams, inputs, ()
    margin = normalize(tower.head(stream[:, 0]), dim=-1) @ direction
    gradients = torch.autograd.grad(margin.sum(), streams)
    return [stream.detach() for stream in streams], inputs, gradients


@torch.no_grad()
def _margin(tower: Tower, pixels: Tensor, direction: Tensor) -> Tensor:
    """[B] logit of the first class less that of the second."""
    stream = tower(pixels).residual_out
    return normalize(tower.head(stream[:, 0]), dim=-1) @ direction
