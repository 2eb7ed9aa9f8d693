"""Interventions in features of residual SAEs (`models.dictionary.residual_sae`), for export to ONNX.

As `models.graph.rerun`, with other features: after block l, before directions are changed there,

    x <- x + s sum over features of l of (gain z + offset) W_dec      z the SAE's activation in this network, s the
                                                                      token's standard deviation, as it comes to the SAE

so that the SAE's error stays as it is. The account is that of the vision graph: the CLT's code is that of this network,
and the last row has all that was added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import linear
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.graph.replacement import TokenCode
from vitrine.models.graph.rerun import Changed, ChangedGraph, dense, run_changed
from vitrine.models.graph.vision import VisionGraph


class ResidualRerunGraph(ChangedGraph):
    """Features are of residual SAEs.

    Args:
        saes: in evaluation mode; at least one.
    """

    def __init__(self, vision: VisionGraph, saes: ResidualSaes) -> None:
        super().__init__(vision)
        self.features = saes.architecture.features
        self.saes = nn.ModuleList(linear(e.weight.detach(), e.bias.detach()) for e in saes.encoders)
        self.codes = nn.ModuleList(TokenCode(e.sparsifier, vision.fold.dtype) for e in saes.encoders)
        for layer, decoder in enumerate(saes.decoders):
            self.register_buffer(f"decoder_{layer}", decoder.weight.detach())

    def run(self, pixels: Tensor, changed: Changed) -> tuple[Tensor, ...]:
        """As `ChangedGraph`."""

        def features(layer: int, mlp_in: Tensor, stream: Tensor) -> Tensor:
            if layer == len(self.features):  # the last block, after which there is no SAE
                return torch.zeros_like(stream)
            of_tokens: Any = standardise(stream)
            code = self.codes[layer](self.saes[layer](of_tokens.x), self.types)
            own = changed.indices.clamp_max(self.features[layer] - 1)  # those of larger SAEs are of other layers
            difference = changed.difference(dense(code, self.features[layer]).index_select(-1, own), layer)
            return of_tokens.scale * (difference @ getattr(self, f"decoder_{layer}").index_select(0, own))

        residual, attn_outs, mlp_outs, added, mlp_ins = run_changed(self.vision, pixels, changed, features)
        return self.vision.explain(residual, attn_outs, mlp_outs, mlp_ins, added)
