"""The forward half of the source account, for export to ONNX: one image's activations and all that is held fast.

With an image's attention weights and the denominators of its LayerNorms held fast, everything between what is written
to the residual stream and a logit is linear. This graph returns both: what is written (the embeddings, the MLP outputs,
the code of every token) and what is held fast. It knows of no label. `models.graph.sources` follows directions back
through it; the mathematics is in `models.account.sources`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.graph.attribution import served_encoders
from vitrine.models.graph.replacement import TokenCode
from vitrine.models.graph.vision import denominator


class TraceGraph(nn.Module):
    """A tower, and its CLT if there is one: pixels [B, 3, H, W] -> what `models.account.sources.Trace` has, by batch.

    Embedding [B, D], scale sigma |z| [B], norm |z| [B], attention weights [B, L, H, T, T], LN1's and LN2's denominators
    [B, L, T], embeddings [B, T, d], MLP outputs [B, L, T, d]; with a CLT features and activations [B, L, T, k] each.
    After the last block only [CLS] is read, so what its MLP writes at patches, and its features there, are left at 0.

    Args:
        tables: precision of the encoders, as in `AttributionGraph`.
    """

    types: Tensor

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder | None, tables: torch.dtype) -> None:
        super().__init__()
        self.tower, self.layers = tower, tower.layers
        self.attention = nn.ModuleList(Attention(block) for block in tower.blocks)
        self.has_code = clt is not None
        if clt is not None:
            self.features = clt.features
            self.encoders = served_encoders(clt, tables)
            codes = [TokenCode(encoder.sparsifier, tables) for encoder in clt.encoders]
            self.codes, self.places = nn.ModuleList(codes), max(code.k for code in codes)
        self.register_buffer("types", torch.arange(tower.tokens).clamp_max(1))  # [T] 0: [CLS], 1: patches

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tower = self.tower
        embedded = stream = tower.embed(pixels)
        weights, before_attention, before_mlp, written, indices, values = [], [], [], [], [], []
        for layer, block in enumerate(tower.blocks):
            before_attention.append(denominator(stream, block.ln_1))
            attention = self.attention[layer](stream)
            stream = stream + attention.out
            before_mlp.append(denominator(stream, block.ln_2))
            if layer == self.layers - 1:
                stream = stream[:, :1]
            mlp_in, mlp_out = tower.mlp(layer, stream)
            stream = stream + mlp_out
            weights.append(attention.weights)
            written.append(self._of_all_tokens(mlp_out))
            if self.has_code:
                code = self.codes[layer](self.encoders[layer](mlp_in), self.types[: mlp_in.shape[1]])
                features, activations = map(self._of_all_tokens, code)
                unused = (0, self.places - features.shape[-1])
                indices.append(nn.functional.pad(features, unused))
                values.append(nn.functional.pad(activations, unused))
        residual = stream[:, 0]
        z = tower.head(residual)
        norm = z.norm(dim=-1)
        codes = (torch.stack(indices, dim=1), torch.stack(values, dim=1)) if self.has_code else ()
        return (
            z / norm[:, None],
            norm * denominator(residual, tower.visual.ln_post),
            norm,
            torch.stack(weights, dim=1),
            torch.stack(before_attention, dim=1),
            torch.stack(before_mlp, dim=1),
            embedded,
            torch.stack(written, dim=1),
            *codes,
        )

    def _of_all_tokens(self, part: Tensor) -> Tensor:
        """[B, t, ...] of all tokens or of [CLS] -> [B, T, ...], 0 at the others."""
        return nn.functional.pad(part, (0, 0, 0, self.tower.tokens - part.shape[1]))
