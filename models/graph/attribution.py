"""The fused vision graph: CLIP's prediction and its account in one pass, for export to ONNX.

Only [CLS] is explained at serving time, so the encoder of each layer reads one token. The decoders of a source layer
are summed over their targets once (`CrossLayerTranscoder.directions`), so decoding reads k rows per layer. All else is
`models.graph.vision`'s.

All layers are encoded by one top-k, whatever the sparsifier: `encode` computes what `models.dictionary.sparsify` does
for [CLS] outside training, for layers of different budgets at once. It works in two steps, because at batch size 1 the
cost of an account is reading the encoders. One product over all features selects four times as many candidates as there
are places; their pre-activations are then recomputed from their own rows. So the first product may be coarse
(`models.graph.variants.preselect` makes it an int8 product), and the result is that of the exact encoders.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.bundle.layout import ALWAYS
from vitrine.models.clip.attention import linear
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.projection import projection_scores
from vitrine.models.graph.vision import VisionGraph

CANDIDATES = 4  # features whose pre-activation is computed exactly, for each place of a code


class AttributionGraph(VisionGraph):
    """A tower and its CLT as one module: pixels [B, 3, H, W] -> the tensors of `EVERY_OUTPUT`.

    Args:
        tower: the CLIP's vision tower.
        clt: the CLT on raw activations.
        cls_mean: mean MLP output of [CLS] over the training images [L, d], the reference mean of the fidelity's R^2.
        tables: precision of the CLT's weights; float16 halves the bundle, and every row is still exact, because
            the error row contains whatever the CLT does not write.
    """

    always = ALWAYS
    threshold: Tensor | None  # [L, F]; None if features are chosen by rank
    usable: Tensor | None  # [L, k] bool; None if every layer uses all k places
    directions: Tensor
    last_decoders: Tensor
    cls_mean: Tensor
    offsets: Tensor
    encoder_rows: Tensor  # [L * F, d], in `tables`
    encoder_biases: Tensor

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder, cls_mean: Tensor, tables: torch.dtype) -> None:
        super().__init__(tower)
        if (clt.layers, clt.width) != (tower.layers, tower.width):
            raise ValueError(
                f"the CLT has {clt.layers} layers of width {clt.width}, but the tower has {tower.layers} of "
                f"{tower.width}"
            )
        sparsifiers = [encoder.sparsifier for encoder in clt.encoders]
        self.features, self.signed = clt.features, sparsifiers[0].signed
        self.places = tuple(int(sparsifier.inference_places()) for sparsifier in sparsifiers)  # of each layer
        self.k = max(self.places)
        thresholds = [sparsifier.inference_threshold() for sparsifier in sparsifiers]
        self.encoders = served_encoders(clt, tables)
        self.candidates = min(self.features, CANDIDATES * self.k)
        encoders = clt.encoders
        self.register_buffer("encoder_rows", torch.cat([encoder.weight.detach() for encoder in encoders]).to(tables))
        biases = torch.stack([encoder.bias.detach() for encoder in encoders])
        self.register_buffer("encoder_biases", biases.to(tables).float())  # [L, F]
        by_rank = any(threshold is None for threshold in thresholds)
        usable = torch.arange(self.k) < torch.tensor(self.places)[:, None]
        self._keep("threshold", None if by_rank else torch.stack(thresholds).to(tables).float())
        self._keep("usable", None if usable.all() else usable)
        self.register_buffer("directions", clt.directions().to(tables).flatten(0, 1))  # [L * F, d]
        # To the last MLP output the last source layer writes its directions; per-layer transcoders write nothing else.
        earlier = clt.writers(clt.layers - 1)[: clt.layers - 1 if clt.architecture.cross_layer else 0]
        self.register_buffer("last_decoders", earlier.to(tables).flatten(0, 1))  # [(L - 1) * F, d], or [0, d]
        self.register_buffer("bias", clt.decoder_biases().sum(0))
        self.register_buffer("cls_mean", cls_mean.sum(0) @ self.fold)
        self.register_buffer("offsets", torch.arange(clt.layers)[:, None] * clt.features)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        """Register a buffer, unless it is None: at such a buffer torch's exporter fails, and begins again in a way that
        takes three times as long."""
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor)

    def explain(
        self, residual: Tensor, attention: Tensor, mlp: Tensor, mlp_in: Sequence[Tensor], *edit: Tensor
    ) -> tuple[Tensor, ...]:
        """As `VisionGraph`, by the features of this code."""
        indices, values = self.encode(mlp_in)
        written, to_last = self.decode(indices, values)
        error = mlp.sum(1) - written.sum(1) - self.bias
        components = self.components(attention, written, error, *edit)
        return self.account(residual, components, mlp, indices, values, to_last)

    def account(
        self, residual: Tensor, components: Tensor, mlp: Tensor, indices: Tensor, values: Tensor, to_last: Tensor
    ) -> tuple[Tensor, ...]:
        """`ALWAYS` of residuals [B, d] that are the sum of components [B, R, d].

        mlp: what the MLPs wrote [B, L, d]; to_last: as by `decode`.
        """
        folded = components @ self.fold  # [B, R, D]
        parts = self.rows(residual, components, folded)
        projection = F.pad(projection_scores(to_last, 1), (self.layers - to_last.shape[1], 0))
        _, _, sigma, _, norm = parts
        mlp_rows = mlp @ self.fold / (sigma * norm)[:, None, None]
        return *parts, indices, values, projection, self._fidelity(folded), components, mlp_rows

    def decode(self, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What a code of [CLS] [B, L, k] writes, by source layer: (to the final residual [B, L, d], to the last MLP
        output [B, layers that write to it, d])."""
        written = self._decode(self.directions, indices, values)
        to_last = written[:, -1:]
        if self.earlier:
            before = self._decode(self.last_decoders, indices[:, : self.earlier], values[:, : self.earlier])
            to_last = torch.cat([before, to_last], dim=1)
        return written, to_last

    @property
    def earlier(self) -> int:
        """How many layers before the last write to the last MLP output."""
        return len(self.last_decoders) // self.features

    def encode(self, mlp_in: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """mlp_in: [CLS] of every layer, L times [B, 1, d]. Returns (features, activations) [B, L, k] each."""
        coarse = torch.cat([encoder(x) for encoder, x in zip(self.encoders, mlp_in, strict=True)], dim=1)
        rank = coarse if self.threshold is None else coarse - self.threshold
        candidates = (rank.abs() if self.signed else rank).topk(self.candidates, dim=-1).indices  # [B, L, C]
        rows = self._rows(self.encoder_rows, candidates)  # [B, L, C, d]
        exact = torch.matmul(rows, torch.cat(list(mlp_in), dim=1)[..., None])[..., 0]

        def at_candidates(table: Tensor) -> Tensor:
            """[L, F] -> [B, L, C]"""
            return table.flatten().index_select(0, (candidates + self.offsets).flatten()).view(candidates.shape)

        exact = exact + at_candidates(self.encoder_biases)
        threshold = None if self.threshold is None else at_candidates(self.threshold)
        places, values = sparse_code(exact, self.k, threshold, self.signed, self.usable)
        return candidates.gather(-1, places), values

    def _decode(self, table: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        """sum_k z * table[feature], for each source layer in `indices`: [B, layers, d]."""
        return torch.matmul(values[:, :, None], self._rows(table, indices))[:, :, 0]

    def _rows(self, table: Tensor, indices: Tensor) -> Tensor:
        """The rows of features in a [layers * F, d] table, for each layer in `indices`: [B, layers, k, d]."""
        places = (indices + self.offsets[: indices.shape[1]]).flatten()
        return table.index_select(0, places).float().view(*indices.shape, -1)

    def _fidelity(self, folded: Tensor) -> Tensor:
        """(R^2, cosine) [B, 2] of what the CLT adds to the embedding, compared with what the MLPs add."""
        clt = folded[:, 1 + self.layers : 2 + 2 * self.layers].sum(1)  # features and decoder biases
        error = folded[:, 2 + 2 * self.layers]
        mlp = clt + error
        r2 = 1 - error.square().sum(-1) / (mlp - self.cls_mean).square().sum(-1)
        return torch.stack([r2, F.cosine_similarity(mlp, clt, dim=-1)], dim=-1)


def served_encoders(clt: CrossLayerTranscoder, tables: torch.dtype) -> nn.ModuleList:
    """x -> pre-activations of every source layer, with weights rounded to `tables`. Stored as float32 here, where a
    product reads the whole table; `encoder_rows`, where rows are looked up, stays in `tables`."""
    return nn.ModuleList(
        linear(encoder.weight.detach().to(tables).float(), encoder.bias.detach().to(tables).float())
        for encoder in clt.encoders
    )


def sparse_code(
    preactivations: Tensor, k: int, threshold: Tensor | None, signed: bool, usable: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pre-activations [..., F] to (features, activations) [..., k] each, as the sparsifier does outside training.

    Features are chosen by threshold [..., F], or by rank if it is None (by magnitude if `signed`). usable [..., k] bool
    marks the places that may be used; None: all.
    """
    if threshold is not None:
        margin, indices = (preactivations - threshold).topk(k, dim=-1)
        values = preactivations.gather(-1, indices).where(margin > 0, 0.0)
    elif signed:
        indices = preactivations.abs().topk(k, dim=-1).indices
        values = preactivations.gather(-1, indices)
    else:
        best, indices = preactivations.topk(k, dim=-1)
        values = best.relu()
    return indices, values if usable is None else values.where(usable, 0.0)
