"""A CLT's first weights, taken from the MLPs that it replaces.

An MLP is already a dictionary: neuron n reads a_n = W_n x + b_n and writes act(a_n) V_n. GELU and QuickGELU are nearly
a ReLU, and of the neurons of a token few write much. So each of a layer's first features becomes a neuron: its
pre-activation is a_n |V_n|, so that top-k keeps the neurons that write most, and its decoder, of length 1, is
V_n / |V_n|. It writes to its own layer's MLP output alone; what it writes to later ones is learnt. On a ViT-Ti/16 with
48 features a token this explains 0.80 to 0.91 of every layer's variance before the first step (training/RESULTS.md).

Of more neurons than features those that write most are taken. Features beyond the neurons begin with random directions,
short enough that they seldom come before a neuron.
"""

from __future__ import annotations

import torch

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation

OTHERS = 0.25  # length of the first encoder rows of features that are no neurons


@torch.no_grad()
def start_from_neurons(
    clt: CrossLayerTranscoder, tower: Tower, normalisation: Normalisation, batch: Activations
) -> None:
    """Replace the random weights of an initialised CLT, which is on normalised activations, in place.

    Args:
        clt: initialised, on the tower's device. Its sparsifier must prefer larger activations, as all but abs_topk do.
        batch: tokens by which neurons are chosen and the decoders' biases set.
    """
    n, inputs = normalisation, normalisation.inputs(batch.mlp_in)
    for layer, encoder in enumerate(clt.encoders):
        reads, biases, writes = tower.neurons(layer)
        writes = writes / n.out_scale[layer]
        lengths = writes.norm(dim=-1).clamp_min(torch.finfo(writes.dtype).tiny)
        rows = reads * (n.in_scale[layer] * lengths)[:, None]
        offsets = (biases + reads @ n.in_mean[layer]) * lengths
        if len(rows) > clt.features:
            written = (inputs[layer] @ rows.T + offsets).relu().mean(0)
            chosen = written.topk(clt.features).indices
            rows, offsets, writes, lengths = rows[chosen], offsets[chosen], writes[chosen], lengths[chosen]
        encoder.weight.mul_(OTHERS)
        encoder.weight[: len(rows)] = rows
        encoder.bias[: len(rows)] = offsets
        clt.decoders[layer].weights[-1][: len(rows)] = writes / lengths[:, None]
    for decoder in clt.decoders:
        for weight in decoder.weights[:-1]:
            weight.zero_()
    kept = n.kept(batch.mlp_out).to(inputs.dtype)
    missing = n.targets(batch.mlp_out) - clt(inputs, batch.is_cls)[1]
    means = torch.einsum("lnd,ln->ld", missing, kept) / kept.sum(1).clamp_min(1)[:, None]
    for decoder, mean in zip(clt.decoders, means, strict=True):
        decoder.bias.add_(mean)
