"""One step of a residual circuit, for export to ONNX: the sources of a feature of one SAE, or of the logit, among the
features of the SAE below (arXiv 2509.17401).

A token of the stream after block l consists of what its SAE (`models.dictionary.residual_sae`) says, and the rest:

    x = s sum of z W_dec[f] + s b_dec + error + mean        s its standard deviation, held fast

(the mean over channels is read by nothing: every gradient here is orthogonal to it). So a direction that starts after
block l + 1 and is followed back through that block (`models.graph.gated`) is, with G the gradient where it arrives,

    features    z s <W_dec[f], G[t]>        of every active feature at every token t, of the layer below alone
    errors      <x, G[t]> - features - bias of every token
    bias        s <b_dec, G[t]>             summed over tokens
    constants   of the block, and of the encoder

which sum to the logit, or to the feature's pre-activation W_enc[f] (x - mean) / s + b_enc[f], which is its activation.
Below block 0 are the embeddings: <e, G[t]>. A tower of one layer has no SAE; its logit's sources are embeddings.

There is a graph for each layer, L in all: weights of one block alone are read, and what it is given of the trace is one
layer's. A direction starts at one token, so G[t] is a sum over heads (`models.graph.gated.Spread`), and every feature
of the dictionary is multiplied with each head's direction once, at however many tokens it is active. At B/16 (k 160,
F 3,072) that takes (H + 1) (F + 2 T k) numbers a direction, 3.5 MB in float32.

L layers, T tokens, d width, k places, n directions, H heads, F features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.graph.gated import GatedBlock, Held, Spread


class Below(nn.Module):
    """What gradients at the stream after block `layer` find there; layer -1: the embeddings, which have no SAE."""

    weight: Tensor  # [F, d] the decoder's rows
    bias: Tensor  # [d] its bias

    def __init__(self, saes: ResidualSaes | None, layer: int) -> None:
        super().__init__()
        if saes is not None and layer >= 0:
            self.register_buffer("weight", saes.decoders[layer].weight.detach())
            self.register_buffer("bias", saes.decoders[layer].bias.detach())

    def forward(
        self,
        gradients: Spread,
        stream: Tensor,
        deviations: Tensor | None,
        indices: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """stream [T, d]; deviations [T], indices, values [T, k] of its SAE -> features [n, T, k], errors [n, T], bias
        [n]; without an SAE embeddings [n, T] alone."""
        directions, shares = gradients.directions.flatten(0, 1), gradients.shares.permute(2, 0, 1)  # [T, H + 1, n]
        (tokens, _), ways = stream.shape, shares.shape[1:]

        def products(rows: Tensor) -> Tensor:
            """[R, d] -> [R, H + 1, n]"""
            return (rows @ directions.t()).view(-1, *ways)

        if deviations is None or indices is None or values is None:
            return ((products(stream) * shares).sum(1).t(),)
        chosen = products(self.weight).index_select(0, indices.flatten()).view(tokens, -1, *ways)
        features = (chosen * shares[:, None]).sum(2) * (values * deviations[:, None])[..., None]  # [T, k, n]
        biases = (products(self.bias[None]) * shares).sum(1) * deviations[:, None]  # [T, n]
        centred = stream - stream.mean(-1, keepdim=True)
        errors = (products(centred) * shares).sum(1) - biases - features.sum(1)
        return features.permute(2, 0, 1), errors.t(), biases.sum(0)


class LogitSourcesGraph(nn.Module):
    """The sources of n numbers u . x of [CLS] after the last block: u [n, d], what its block holds fast, and what is
    below it -> the outputs of `Below`, and constants [n]."""

    def __init__(self, tower: Tower, saes: ResidualSaes | None) -> None:
        super().__init__()
        self.block = GatedBlock(tower.blocks[-1])
        self.below = Below(saes, tower.layers - 2)

    def forward(
        self,
        direction: Tensor,
        weights: Tensor,
        before_attention: Tensor,
        before_mlp: Tensor,
        gates: Tensor,
        stream: Tensor,
        deviations: Tensor | None = None,
        indices: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        token = torch.zeros_like(direction[:, 0], dtype=torch.int64)
        held = Held(weights, before_attention, before_mlp, gates)
        gradients, constants = self.block.of_one(direction, token, held)
        return *self.below(gradients, stream, deviations, indices, values), constants


class FeatureSourcesGraph(nn.Module):
    """The sources of n features' pre-activations in the SAE after block `layer`: feature and token [n] of each, the
    SAE's standard deviations [T], what the block holds fast, and what is below it -> as of `LogitSourcesGraph`."""

    rows: Tensor  # [F, d] the encoder's
    biases: Tensor  # [F] the encoder's

    def __init__(self, tower: Tower, saes: ResidualSaes, layer: int) -> None:
        super().__init__()
        encoder: Any = saes.encoders[layer]
        self.register_buffer("rows", encoder.weight.detach())
        self.register_buffer("biases", encoder.bias.detach())
        self.block = GatedBlock(tower.blocks[layer])
        self.below = Below(saes, layer - 1)

    def forward(
        self,
        feature: Tensor,
        token: Tensor,
        scales: Tensor,
        weights: Tensor,
        before_attention: Tensor,
        before_mlp: Tensor,
        gates: Tensor,
        stream: Tensor,
        deviations: Tensor | None = None,
        indices: Tensor | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        rows = self.rows.index_select(0, feature)
        direction = (rows - rows.mean(-1, keepdim=True)) / scales.index_select(0, token)[:, None]
        held = Held(weights, before_attention, before_mlp, gates)
        gradients, constants = self.block.of_one(direction, token, held)
        constants = constants + self.biases.index_select(0, feature)
        return *self.below(gradients, stream, deviations, indices, values), constants
