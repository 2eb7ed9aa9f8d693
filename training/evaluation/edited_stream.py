"""The running network with some nodes of residual SAEs at their medians (arXiv 2509.17401): cascaded, errors kept.

    x       = the stream after block l, as edited below
    z, err  = SAE l's code of x, and what it leaves
    stream  = x + s (z' - z) W_dec + err' - err

with z' the median of an edited feature, at every token, and z of every other; err' the median error where the layer's
error is edited; s the token's standard deviation. So where nothing is edited this is the tower itself, and later
blocks, and SAEs, read what was edited below.

R runs (an image, edited in one way each), L blocks, T tokens, d width, F features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrine.models.dictionary.residual_replacement import ResidualReplacement
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.relevance import Medians


class EditedStream:
    """A tower with its SAEs, and the medians, on one device."""

    def __init__(self, model: ResidualReplacement, medians: Medians) -> None:
        self.model, self.medians = model, medians

    @torch.no_grad()
    def __call__(self, embedded: Tensor, edited: Sequence[Tensor]) -> Tensor:
        """[CLS] before ln_post [R, d].

        Args:
            embedded: images [R, T, d] (`Tower.embed`).
            edited: of each SAE's layer, the features at their medians and last the error, [R, T, F + 1] bool; or
                [R, 1, F + 1], at all tokens.
        """
        stream, last = embedded, self.model.tower.layers - 1
        for layer in range(last):
            stream = self.edit(layer, self.model.block(layer, stream), edited[layer])
        return self.model.block(last, stream, cls_only=True)[:, 0]

    def edit(self, layer: int, stream: Tensor, edited: Tensor) -> Tensor:
        """The stream after a block [R, T, d], edited."""
        code = Code(self.model.saes, layer, stream)
        difference = torch.where(edited[..., :-1], self.medians.activations[layer] - code.values, 0)
        of_errors = torch.where(edited[..., -1:], self.medians.errors[layer] - code.errors, 0)
        return stream + difference @ code.decoder.weight * code.scale + of_errors
