"""The replacement model for export to ONNX: its prediction, and C_{i->j} of every pair of layers.

`models.dictionary.replacement` with one difference: what is replaced is an input, so one graph serves every window and
token type. Every layer therefore runs both its MLP and the CLT for all tokens and selects one. With nothing replaced
the embedding is CLIP's own, and the scores are those of the unmodified CLIP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.projection import projection_scores
from vitrine.models.dictionary.sparsify import Sparsifier
from vitrine.models.graph.attribution import served_encoders, sparse_code


class ReplacementGraph(nn.Module):
    """A tower and its CLT: (pixels [B, 3, H, W], replaced [L, 2] bool) -> the tensors of `REPLACEMENT_OUTPUTS`.

    Args:
        tables: precision of the encoders, as in `AttributionGraph`.
    """

    biases: Tensor
    types: Tensor

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder, tables: torch.dtype) -> None:
        super().__init__()
        self.tower, self.layers = tower, clt.layers
        self.attention = nn.ModuleList(Attention(block) for block in tower.blocks)
        self.encoders = served_encoders(clt, tables)
        self.codes = nn.ModuleList(TokenCode(encoder.sparsifier, tables) for encoder in clt.encoders)
        self.sources = [clt.architecture.sources(target) for target in range(clt.layers)]
        self.decoders = nn.ModuleList(nn.ModuleList(map(Int8Decoder, decoder.weights)) for decoder in clt.decoders)
        self.register_buffer("biases", clt.decoder_biases())
        self.register_buffer("types", torch.arange(tower.tokens).clamp_max(1))  # [T] 0: [CLS], 1: patches

    def forward(self, pixels: Tensor, replaced: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.tower
        stream = tower.embed(pixels)
        codes, contributions = [], []
        for layer in range(self.layers):
            stream = stream + self.attention[layer](stream).out
            mlp_in, mlp_out = tower.mlp(layer, stream)
            codes.append(self.codes[layer](self.encoders[layer](mlp_in), self.types))
            parts = torch.stack(self._written(layer, codes))  # [sources, B, T, d]
            mask = replaced[layer].index_select(0, self.types)[:, None]
            stream = stream + torch.where(mask, parts.sum(0) + self.biases[layer], mlp_out)
            contributions.append(self._by_type(layer, parts))
        return F.normalize(tower.head(stream[:, 0]), dim=-1), torch.stack(contributions, dim=2)

    def _written(self, target: int, codes: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """What each source layer writes to a target, [B, T, d] each."""
        tables: Any = self.decoders[target]
        return [table(*codes[source]) for source, table in zip(self.sources[target], tables, strict=True)]

    def _by_type(self, target: int, parts: Tensor) -> Tensor:
        """C_{i->j} of one target for [CLS], and its mean over patches [B, 2, L]; 0 for layers that do not write.

        Patches to which nothing is written have no score and are excluded from the mean.
        """
        scores = projection_scores(parts, 0).permute(1, 2, 0)  # [B, T, sources]
        written = (scores != 0).any(-1)[:, 1:].sum(-1, keepdim=True).clamp_min(1)
        by_type = torch.stack([scores[:, 0], scores[:, 1:].sum(1) / written], dim=1)
        return F.pad(by_type, (self.sources[target].start, self.layers - 1 - target))


class TokenCode(nn.Module):
    """Pre-activations of all tokens [B, T, F] to their code, (features, activations) [B, T, k] each, as one layer's
    sparsifier computes it outside training."""

    threshold: Tensor | None  # [2, F]
    usable: Tensor | None  # [2, k]

    def __init__(self, sparsifier: Sparsifier, tables: torch.dtype) -> None:
        super().__init__()
        types = (True, False)  # [CLS], patches
        places = [sparsifier.inference_places(cls) for cls in types]
        thresholds = [sparsifier.inference_threshold(cls) for cls in types]
        self.k, self.signed = max(places), sparsifier.signed
        defined = [threshold for threshold in thresholds if threshold is not None]
        self.register_buffer("threshold", torch.stack(defined).to(tables).float() if defined else None)
        usable = torch.arange(self.k) < torch.tensor(places)[:, None]
        self.register_buffer("usable", None if usable.all() else usable)

    def forward(self, preactivations: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """types [T]: 0 for [CLS], 1 for patches."""
        threshold, usable = (
            None if part is None else part.index_select(0, types) for part in (self.threshold, self.usable)
        )
        return sparse_code(preactivations, self.k, threshold, self.signed, usable)


class Int8Decoder(nn.Module):
    """One decoder [F, d], each row as int8 values and a scale."""

    rows: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("rows", (weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales[:, 0])

    def forward(self, indices: Tensor, values: Tensor) -> Tensor:
        """sum_k z * row[feature]: [B, T, k] each -> [B, T, d]"""
        rows, scales = self.rows_of(indices)
        return torch.matmul((values * scales)[..., None, :], rows)[..., 0, :]

    def products(self, indices: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        """z * <row[feature], gradient[token]>: [T, k] each, gradients of n directions [T, d, n] -> [T, k, n]

        A gradient must not come straight from a transposition: ONNX Runtime would make the two one product, which at
        one direction takes three times as long.
        """
        rows, scales = self.rows_of(indices)
        return torch.matmul(rows, gradient) * (values * scales)[..., None]

    def rows_of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(rows without their scales [..., d], scales [...]) of features [...]."""
        places = indices.flatten()
        rows = self.rows.index_select(0, places).float().view(*indices.shape, self.rows.shape[-1])
        return rows, self.scales.index_select(0, places).view(indices.shape)
