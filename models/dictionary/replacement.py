"""The replacement model: the tower with its MLPs replaced by a CLT in a window of layers (arXiv 2604.13304).

Runs block by block like the tower itself, except for the MLPs in the window:

    x_j  = ln_2(stream + attention)               of the stream *under replacement*
    z_j  = encoder j of x_j
    y_j  = decoder j of z_0 ... z_j               instead of MLP j, where j is in the window and the token is replaced
    stream = stream + attention + y_j             (or the MLP's own output)

So the replacement is cascaded: errors of one layer reach the encoder of the next. Layers before the window keep their
MLPs and read CLIP's true stream; their features still write into the window. A layer is encoded only if a decoder reads
it, and MLPs are not run for replaced tokens.

L layers, B images, T tokens, t replaced tokens per image, d width, K places of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.account.windows import Tokens
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.sparse_products import SortedCode


class ReplacementOutput(NamedTuple):
    """One pass through the replacement model."""

    residual: Tensor  # [B, T, d] what enters ln_post
    mlp_in: Tensor  # [L, B, T, d] ln_2 outputs under replacement
    mlp_out: Tensor  # [L, B, T, d] what was added to the stream: the CLT's where replaced, else the MLP's own
    codes: list[SortedCode | None]  # [L], each [B * t, K] over the replaced tokens; None where no decoder reads it


class Replacement(nn.Module):
    """A tower and the CLT that replaces its MLPs. Differentiable: gradients reach the CLT through the tower."""

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder) -> None:
        super().__init__()
        if (clt.layers, clt.width) != (tower.layers, tower.width):
            raise ValueError(
                f"the CLT has {clt.layers} layers of width {clt.width}, but the tower has {tower.layers} of "
                f"{tower.width}"
            )
        self.tower, self.clt = tower, clt

    def forward(self, pixels: Tensor, window: range, tokens: Tokens = "all") -> ReplacementOutput:
        """Run normalised pixels [B, 3, H, W] with the MLPs of the layers `window` replaced for the chosen tokens.

        An empty window gives the tower's own result, bit for bit.

        Raises `ValueError` for layers that do not exist.
        """
        layers = range(self.tower.layers)
        if window and (window.step != 1 or window[0] not in layers or window[-1] not in layers):
            raise ValueError(f"{window} is not a window of {self.tower.layers} layers")
        encoded = {source for target in window for source in self.clt.architecture.sources(target)}
        stream = self.tower.embed(pixels)
        is_cls = which_are_cls(stream, tokens)
        mlp_ins: list[Tensor] = []
        mlp_outs: list[Tensor] = []
        codes: list[SortedCode | None] = []
        for layer in layers:
            stream = stream + self.tower.attention(layer, stream)
            mlp_in = self.tower.mlp_input(layer, stream)
            replaced = of_type(mlp_in, tokens).flatten(0, 1)
            codes.append(self.clt.encoders[layer](replaced, is_cls) if layer in encoded else None)
            if layer in window:
                decoded = self.clt.decoders[layer](codes).unflatten(0, (len(pixels), -1))
                mlp_out = with_mlp(self.tower, layer, mlp_in, decoded, tokens)
            else:
                mlp_out = self.tower.mlp_output(layer, mlp_in)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in)
            mlp_outs.append(mlp_out)
        return ReplacementOutput(stream, torch.stack(mlp_ins), torch.stack(mlp_outs), codes)


def with_mlp(tower: Tower, layer: int, mlp_in: Tensor, decoded: Tensor, tokens: Tokens) -> Tensor:
    """The CLT's output [B, t, d] for the replaced tokens, the MLP's for the others: [B, T, d]."""
    if tokens == "cls":
        return torch.cat([decoded, tower.mlp_output(layer, mlp_in[:, 1:])], dim=1)
    if tokens == "patches":
        return torch.cat([tower.mlp_output(layer, mlp_in[:, :1]), decoded], dim=1)
    return decoded


def of_type(values: Tensor, tokens: Tokens, dim: int = 1) -> Tensor:
    """The tokens of one type, which lie along `dim`; [CLS] is the first."""
    if tokens == "all":
        return values
    return values.narrow(dim, 0, 1) if tokens == "cls" else values.narrow(dim, 1, values.shape[dim] - 1)


def which_are_cls(stream: Tensor, tokens: Tokens) -> Tensor:
    """Which of the chosen tokens of [B, T, d] are [CLS]: [B * t] bool."""
    is_cls = torch.zeros(*stream.shape[:2], 1, dtype=torch.bool, device=stream.device)
    is_cls[:, 0] = True
    return of_type(is_cls, tokens).flatten()
