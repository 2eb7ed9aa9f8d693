"""The forward half of accounts that go back through whole blocks (`models.graph.gated`), for export to ONNX: one pass
that keeps what is held fast, and the code of the residual SAEs if there are any.

The network itself runs: an SAE only says of what a token of the stream consists (`models.graph.residual`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention, linear
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.graph.gated import Held, gates
from vitrine.models.graph.replacement import TokenCode
from vitrine.models.graph.vision import denominator


def hold(block: Any, attention: nn.Module, stream: Tensor, *, cls_only: bool = False) -> tuple[Held, Tensor]:
    """Run a block, whose attention is a `models.clip.attention.Attention`, on the stream [B, T, d]: (what is held fast,
    the stream after it). cls_only: its MLP runs for [CLS] alone, the stream after it is [B, 1, d], other gates 0."""
    tokens = stream.shape[1]
    before_attention = denominator(stream, block.ln_1)
    attended = attention(stream)
    stream = stream + attended.out
    before_mlp = denominator(stream, block.ln_2)
    if cls_only:
        stream = stream[:, :1]
    hidden = block.mlp.c_fc(block.ln_2(stream))
    of_tokens = gates(block.mlp.gelu, hidden)
    stream = stream + block.ls_2(block.mlp.c_proj(hidden * of_tokens))
    of_tokens = nn.functional.pad(of_tokens, (0, 0, 0, tokens - of_tokens.shape[1]))
    return Held(attended.weights, before_attention, before_mlp, of_tokens), stream


class GatedTraceGraph(nn.Module):
    """A tower, and its residual SAEs if there are any: pixels [B, 3, H, W] -> what
    `models.account.residual.ResidualTrace` has, by batch.

    Embedding [B, D], scale sigma |z| [B], norm |z| [B], attention weights [B, L, H, T, T], LN1's and LN2's denominators
    [B, L, T], the MLPs' gates [B, L, T, M], the stream before every block [B, L, T, d], which begins with the
    embeddings; with SAEs their tokens' standard deviations [B, L - 1, T], features and activations [B, L - 1, T, k].
    After the last block only [CLS] is read: the gates of its patches are left at 0.

    At B/16 (12 layers, 197 tokens, k 160) 61 MB an image in float32, gates 29 and attention weights 22 of it.

    Args:
        saes: in evaluation mode. None, or those of a tower of one layer, which has none: no code.
    """

    types: Tensor

    def __init__(self, tower: Tower, saes: ResidualSaes | None) -> None:
        super().__init__()
        self.tower = tower
        self.attention = nn.ModuleList(Attention(block) for block in tower.blocks)
        self.saes = 0 if saes is None else saes.layers
        if saes is not None and saes.layers:
            self.encoders = nn.ModuleList(linear(e.weight.detach(), e.bias.detach()) for e in saes.encoders)
            codes = [TokenCode(encoder.sparsifier, tower.visual.proj.dtype) for encoder in saes.encoders]
            self.codes, self.places = nn.ModuleList(codes), max(code.k for code in codes)
        self.register_buffer("types", torch.arange(tower.tokens).clamp_max(1))  # [T] 0: [CLS], 1: patches

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tower, last = self.tower, self.tower.layers - 1
        stream = tower.embed(pixels)
        held: list[Held] = []
        streams: list[Tensor] = []
        codes: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer in range(tower.layers):
            if 0 < layer <= self.saes:
                codes.append(self._code(layer - 1, stream))
            streams.append(stream)
            of_block, stream = hold(tower.blocks[layer], self.attention[layer], stream, cls_only=layer == last)
            held.append(of_block)
        residual = stream[:, 0]
        z = tower.head(residual)
        norm = z.norm(dim=-1)
        scale = norm * denominator(residual, tower.visual.ln_post)
        parts = (*zip(*held, strict=True), streams, *zip(*codes, strict=True))
        return z / norm[:, None], scale, norm, *(torch.stack(list(part), dim=1) for part in parts)

    def _code(self, layer: int, stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(standard deviations [B, T], features [B, T, k], activations [B, T, k]) of one layer's SAE."""
        of_tokens: Any = standardise(stream)
        indices, values = self.codes[layer](self.encoders[layer](of_tokens.x), self.types)
        unused = (0, self.places - indices.shape[-1])
        return of_tokens.scale[..., 0], nn.functional.pad(indices, unused), nn.functional.pad(values, unused)
