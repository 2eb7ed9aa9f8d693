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
from vitrine.models.clip.tower import Taps, Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder, SortedCode


class ReplacementOutput(NamedTuple):
    """One pass through the replacement model."""

    residual: Tensor  # [B, T, d] what enters ln_post
    mlp_in: Tensor  # [L, B, T, d] ln_2 outputs under replacement
    mlp_out: Tensor  # [L, B, T, d] what was added to the stream: the CLT's where replaced, else the MLP's own
    codes: list[SortedCode | None]  # [L], each [B * t, K] over the replaced tokens; None where no decoder reads it


class Precomputed(NamedTuple):
    """Results of the unmodified tower for the same pixels, so that layers before a window need not run again."""

    taps: Taps
    codes: list[SortedCode]  # [L], each [B * T, K]


class Replacement(nn.Module):
    """A tower and the CLT that replaces its MLPs. Differentiable: gradients reach the CLT through the tower."""

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder) -> None:
        super().__init__()
        if (clt.layers, clt.width) != (tower.layers, tower.width):
            raise ValueError(
                f"the CLT has {clt.layers} layers of width {clt.width}, the tower {tower.layers} of {tower.width}"
            )
        self.tower, self.clt = tower, clt

    def forward(
        self, pixels: Tensor, window: range, tokens: Tokens = "all", precomputed: Precomputed | None = None
    ) -> ReplacementOutput:
        """Run normalised pixels [B, 3, H, W] with the MLPs of the layers `window` replaced for the chosen tokens.

        An empty window gives the tower's own result, bit for bit; `precomputed` saves time and changes no result.

        Raises `ValueError` for layers that do not exist.
        """
        layers = range(self.tower.layers)
        if window and (window.step != 1 or window[0] not in layers or window[-1] not in layers):
            raise ValueError(f"{window} is no window of {self.tower.layers} layers")
        encoded = {source for target in window for source in self.clt.architecture.sources(target)}
        stream = self.tower.embed(pixels)
        is_cls = _is_cls(stream, tokens)
        mlp_ins: list[Tensor] = []
        mlp_outs: list[Tensor] = []
        codes: list[SortedCode | None] = []
        for layer in layers:
            if precomputed and window and layer < window[0]:
                taps = precomputed.taps
                attn_out, mlp_in, mlp_out = taps.attn_out[layer], taps.mlp_in[layer], taps.mlp_out[layer]
                stream = stream + attn_out + mlp_out
                mlp_ins.append(mlp_in)
                mlp_outs.append(mlp_out)
                codes.append(_select_code(precomputed.codes[layer], len(pixels), tokens) if layer in encoded else None)
                continue
            stream = stream + self.tower.attention(layer, stream)
            mlp_in = self.tower.mlp_input(layer, stream)
            replaced = _select_tokens(mlp_in, tokens).flatten(0, 1)
            codes.append(self.clt.encoders[layer](replaced, is_cls) if layer in encoded else None)
            if layer in window:
                decoded = self.clt.decoders[layer](codes).unflatten(0, (len(pixels), -1))
                mlp_out = self._with_mlp(layer, mlp_in, decoded, tokens)
            else:
                mlp_out = self.tower.mlp_output(layer, mlp_in)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in)
            mlp_outs.append(mlp_out)
        return ReplacementOutput(stream, torch.stack(mlp_ins), torch.stack(mlp_outs), codes)

    def _with_mlp(self, layer: int, mlp_in: Tensor, decoded: Tensor, tokens: Tokens) -> Tensor:
        """The CLT's output [B, t, d] for the replaced tokens and the MLP's for the others: [B, T, d]."""
        if tokens == "cls":
            return torch.cat([decoded, self.tower.mlp_output(layer, mlp_in[:, 1:])], dim=1)
        if tokens == "patches":
            return torch.cat([self.tower.mlp_output(layer, mlp_in[:, :1]), decoded], dim=1)
        return decoded


def _select_tokens(values: Tensor, tokens: Tokens) -> Tensor:
    """The chosen tokens [B, t, d] of values [B, T, d]; [CLS] is the first."""
    return {"all": values, "cls": values[:, :1], "patches": values[:, 1:]}[tokens]


def _select_code(code: SortedCode, images: int, tokens: Tokens) -> SortedCode:
    """The code of the chosen tokens [B * t, K], from that of all tokens [B * T, K]; without its `order`."""
    indices, values = (_select_tokens(part.unflatten(0, (images, -1)), tokens).flatten(0, 1) for part in code[:2])
    return code._replace(indices=indices, values=values, order=None)


def _is_cls(stream: Tensor, tokens: Tokens) -> Tensor:
    """Which of the chosen tokens of [B, T, d] are [CLS]: [B * t] bool."""
    is_cls = torch.zeros(*stream.shape[:2], 1, dtype=torch.bool, device=stream.device)
    is_cls[:, 0] = True
    return _select_tokens(is_cls, tokens).flatten()
