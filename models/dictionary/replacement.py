"""The replacement model: the tower with its MLPs replaced by a CLT in a window of layers (arXiv 2604.13304).

Block by block, as the tower itself runs, but for what the MLPs of the window write:

    x_j  = ln_2(stream + attention)               of the stream as it is *under replacement*
    z_j  = encoder j of x_j
    y_j  = decoder j of z_0 ... z_j               instead of MLP j, where j is in the window and the token is replaced
    stream = stream + attention + y_j             (or the MLP's own output)

So the replacement is cascaded: errors of one layer reach the next one's encoder. Layers before the window keep their
MLPs and read CLIP's true stream; their features still write into the window. What nothing decodes is not encoded, and
no MLP is run for tokens that are replaced.

L layers, B images, T tokens, t tokens replaced an image, d width, K places of a code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.account.windows import Tokens
from vitrine.models.clip.tower import Taps, Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder, SortedCode


class Replaced(NamedTuple):
    """One pass through the replacement model."""

    residual: Tensor  # [B, T, d] what enters ln_post
    mlp_in: Tensor  # [L, B, T, d] ln_2 outputs under replacement
    mlp_out: Tensor  # [L, B, T, d] what was added to the stream: the CLT's where replaced, else the MLP's own
    codes: list[SortedCode | None]  # [L], each [B * t, K] over the replaced tokens; None where nothing decodes it


class Known(NamedTuple):
    """What is known of the tower itself for the same pixels, so that layers before a window need not run again."""

    taps: Taps
    codes: list[SortedCode]  # [L], each [B * T, K]


class Replacement(nn.Module):
    """A tower and the CLT that stands in for its MLPs. Differentiable: gradients reach the CLT through the tower."""

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder) -> None:
        super().__init__()
        if (clt.layers, clt.width) != (tower.layers, tower.width):
            raise ValueError(
                f"the CLT has {clt.layers} layers of width {clt.width}, the tower {tower.layers} of {tower.width}"
            )
        self.tower, self.clt = tower, clt

    def forward(self, pixels: Tensor, window: range, tokens: Tokens = "all", known: Known | None = None) -> Replaced:
        """Normalised pixels [B, 3, H, W] with the MLPs of the layers `window` replaced for the chosen tokens.

        An empty window is the tower itself, bit for bit; `known` changes nothing but the time that it takes. Raises
        `ValueError` for layers that there are not.
        """
        layers = range(self.tower.layers)
        if window and (window.step != 1 or window[0] not in layers or window[-1] not in layers):
            raise ValueError(f"{window} is no window of {self.tower.layers} layers")
        read = {source for target in window for source in self.clt.architecture.sources(target)}
        stream = self.tower.embed(pixels)
        is_cls = _is_cls(stream, tokens)
        mlp_ins: list[Tensor] = []
        mlp_outs: list[Tensor] = []
        codes: list[SortedCode | None] = []
        for layer in layers:
            if known and window and layer < window[0]:
                taps = known.taps
                attn_out, mlp_in, mlp_out = taps.attn_out[layer], taps.mlp_in[layer], taps.mlp_out[layer]
                stream = stream + attn_out + mlp_out
                mlp_ins.append(mlp_in)
                mlp_outs.append(mlp_out)
                codes.append(_code_of(known.codes[layer], len(pixels), tokens) if layer in read else None)
                continue
            stream = stream + self.tower.attention(layer, stream)
            mlp_in = self.tower.mlp_input(layer, stream)
            replaced = _chosen(mlp_in, tokens).flatten(0, 1)
            codes.append(self.clt.encoders[layer](replaced, is_cls) if layer in read else None)
            if layer in window:
                decoded = self.clt.decoders[layer](codes).unflatten(0, (len(pixels), -1))
                mlp_out = self._joined(layer, mlp_in, decoded, tokens)
            else:
                mlp_out = self.tower.mlp_output(layer, mlp_in)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in)
            mlp_outs.append(mlp_out)
        return Replaced(stream, torch.stack(mlp_ins), torch.stack(mlp_outs), codes)

    def _joined(self, layer: int, mlp_in: Tensor, decoded: Tensor, tokens: Tokens) -> Tensor:
        """The CLT's output [B, t, d] and, for the other tokens, the MLP's own: [B, T, d]."""
        if tokens == "cls":
            return torch.cat([decoded, self.tower.mlp_output(layer, mlp_in[:, 1:])], dim=1)
        if tokens == "patches":
            return torch.cat([self.tower.mlp_output(layer, mlp_in[:, :1]), decoded], dim=1)
        return decoded


def _chosen(values: Tensor, tokens: Tokens) -> Tensor:
    """Of [B, T, d] the chosen tokens [B, t, d]; [CLS] is the first."""
    return {"all": values, "cls": values[:, :1], "patches": values[:, 1:]}[tokens]


def _code_of(code: SortedCode, images: int, tokens: Tokens) -> SortedCode:
    """Of all tokens' code [B * T, K] that of the chosen ones [B * t, K], without what a gradient would need."""
    indices, values = (_chosen(part.unflatten(0, (images, -1)), tokens).flatten(0, 1) for part in code[:2])
    return code._replace(indices=indices, values=values, order=None)


def _is_cls(stream: Tensor, tokens: Tokens) -> Tensor:
    """Which of the chosen tokens of [B, T, d] are [CLS]: [B * t] bool."""
    is_cls = torch.zeros(*stream.shape[:2], 1, dtype=torch.bool, device=stream.device)
    is_cls[:, 0] = True
    return _chosen(is_cls, tokens).flatten()
