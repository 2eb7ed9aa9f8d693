"""The fused vision graph: CLIP's prediction and its account in one pass, for export to ONNX.

Only [CLS] is explained at serving time, so the encoder of each layer reads one token. The decoders of a source layer
are summed over their targets once (`CrossLayerTranscoder.directions`), so decoding reads k rows per layer. Nothing
here depends on labels. Outputs: `models.bundle.layout.EVERY_OUTPUT`; the exported graph computes `ON_REQUEST` only on
request (`models.graph.onnx_file`). Mathematics: `models.account.ledger`.

All layers are encoded by one top-k, whatever the sparsifier: `encode` computes what `models.dictionary.sparsify` does
for [CLS] outside training, for layers of different budgets at once. It works in two steps, because at batch size 1 the
cost of an account is reading the encoders. One product over all features selects four times as many candidates as there
are places; their pre-activations are then recomputed from their own rows. So the first product may be coarse
(`models.graph.variants.preselect` makes it an int8 product), and the result is that of the exact encoders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention, linear
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.projection import projection_scores

CANDIDATES = 4  # features whose pre-activation is computed exactly, for each place of a code


class AttributionGraph(nn.Module):
    """A tower and its CLT as one module: pixels [B, 3, H, W] -> the tensors of `EVERY_OUTPUT`.

    Args:
        tower: the CLIP's vision tower.
        clt: the CLT on raw activations.
        cls_mean: mean MLP output of [CLS] over the training images [L, d], the reference mean of the fidelity's R^2.
        tables: precision of the CLT's weights; float16 halves the bundle, and every row is still exact, because
            the error row contains whatever the CLT does not write.
    """

    fold: Tensor
    beta: Tensor
    prior: Tensor
    threshold: Tensor | None  # [L, F]; None if features are chosen by rank
    usable: Tensor | None  # [L, k] bool; None if every layer uses all k places
    directions: Tensor
    last_decoders: Tensor
    bias: Tensor
    cls_mean: Tensor
    offsets: Tensor
    encoder_rows: Tensor  # [L * F, d], in `tables`
    encoder_biases: Tensor

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder, cls_mean: Tensor, tables: torch.dtype) -> None:
        super().__init__()
        if (clt.layers, clt.width) != (tower.layers, tower.width):
            raise ValueError(
                f"the CLT has {clt.layers} layers of width {clt.width}, the tower {tower.layers} of {tower.width}"
            )
        sparsifiers = [encoder.sparsifier for encoder in clt.encoders]
        self.tower, self.layers, self.features, self.signed = tower, clt.layers, clt.features, sparsifiers[0].signed
        self.places = tuple(int(sparsifier.inference_places()) for sparsifier in sparsifiers)  # of each layer
        self.k = max(self.places)
        thresholds = [sparsifier.inference_threshold() for sparsifier in sparsifiers]
        last = clt.layers - 1  # after the last attention only [CLS] is read
        self.attention = nn.ModuleList(Attention(block, layer == last) for layer, block in enumerate(tower.blocks))
        fold, beta = tower.fold()
        self.register_buffer("fold", fold)
        self.register_buffer("beta", beta)
        self.register_buffer("prior", tower.prior().detach())
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
        self.register_buffer("cls_mean", cls_mean.sum(0) @ fold)
        self.register_buffer("offsets", torch.arange(clt.layers)[:, None] * clt.features)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        """Register a buffer, unless it is None: at such a buffer torch's exporter fails, and begins again in a way that
        takes three times as long."""
        if tensor is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, tensor)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tower = self.tower
        stream = before_last = tower.embed(pixels)
        mlp_ins, attn_outs, mlp_outs, residuals, weights, token_values = [], [], [], [], [], []
        for layer in range(self.layers):
            last = layer == self.layers - 1
            if last:
                before_last = stream
            attention = self.attention[layer](stream)
            stream = (stream[:, :1] if last else stream) + attention.out
            mlp_in, mlp_out = tower.mlp(layer, stream)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in[:, :1])
            attn_outs.append(attention.out[:, 0])
            mlp_outs.append(mlp_out[:, 0])
            residuals.append(stream[:, 0])
            weights.append(attention.weights[:, :, 0])
            token_values.append(attention.values)

        indices, values = self.encode(mlp_ins)
        written, to_last = self.decode(indices, values)
        error = torch.stack(mlp_outs).sum(0) - written.sum(1) - self.bias
        components = self.components(torch.stack(attn_outs, dim=1), written, error)
        parts: Any = self.attention
        heads = [part.by_head(*of) for part, *of in zip(parts, weights, token_values, strict=True)]
        return (
            *self.account(stream[:, 0], components, indices, values, to_last),
            F.normalize(tower.head(torch.stack(residuals, dim=1)), dim=-1),
            torch.stack(weights, dim=1),
            torch.stack(token_values, dim=1),
            before_last.norm(dim=-1),
            torch.stack(heads, dim=1),
        )

    def components(self, attention: Tensor, written: Tensor, *others: Tensor) -> Tensor:
        """[B, R, d] in the order of `models.account.ledger`: of what attention and the features write [B, L, d], and
        what comes after the biases [B, d] each."""
        prior, bias = (part.expand(written.shape[0], 1, -1) for part in (self.prior, self.bias))
        return torch.cat([prior, attention, written, bias, *(other[:, None] for other in others)], dim=1)

    def account(
        self, residual: Tensor, components: Tensor, indices: Tensor, values: Tensor, to_last: Tensor
    ) -> tuple[Tensor, ...]:
        """`ALWAYS` of residuals [B, d] that are the sum of components [B, R, d].

        to_last: as by `decode`.
        """
        z = self.tower.head(residual)
        norm = z.norm(dim=-1)
        sigma = self._sigma(residual)
        folded = components @ self.fold  # [B, R, D]
        rows = folded / sigma[:, None, None]
        bias = 2 * self.layers + 1
        rows = torch.cat([rows[:, :bias], rows[:, bias : bias + 1] + self.beta, rows[:, bias + 1 :]], dim=1)
        projection = F.pad(projection_scores(to_last, 1), (self.layers - to_last.shape[1], 0))
        return (
            z / norm[:, None],
            rows / norm[:, None, None],
            sigma,
            self._sigma(residual[:, None] - components),
            norm,
            indices,
            values,
            projection,
            self._fidelity(folded),
            components,
        )

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

    def encode(self, mlp_in: list[Tensor]) -> tuple[Tensor, Tensor]:
        """mlp_in: [CLS] of every layer, L times [B, 1, d]. Returns (features, activations) [B, L, k] each."""
        coarse = torch.cat([encoder(x) for encoder, x in zip(self.encoders, mlp_in, strict=True)], dim=1)
        rank = coarse if self.threshold is None else coarse - self.threshold
        candidates = (rank.abs() if self.signed else rank).topk(self.candidates, dim=-1).indices  # [B, L, C]
        rows = self._rows(self.encoder_rows, candidates)  # [B, L, C, d]
        exact = torch.matmul(rows, torch.cat(mlp_in, dim=1)[..., None])[..., 0]

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

    def _sigma(self, residual: Tensor) -> Tensor:
        """Standard deviation of residuals [..., d] as in ln_post."""
        return denominator(residual, self.tower.visual.ln_post)

    def _fidelity(self, folded: Tensor) -> Tensor:
        """(R^2, cosine) [B, 2] of what the CLT adds to the embedding, compared with what the MLPs add."""
        clt = folded[:, 1 + self.layers : 2 + 2 * self.layers].sum(1)  # features and decoder biases
        error = folded[:, 2 + 2 * self.layers]
        mlp = clt + error
        r2 = 1 - error.square().sum(-1) / (mlp - self.cls_mean).square().sum(-1)
        return torch.stack([r2, F.cosine_similarity(mlp, clt, dim=-1)], dim=-1)


def denominator(stream: Tensor, ln: nn.LayerNorm) -> Tensor:
    """Standard deviation [...] of a stream [..., d] as in a LayerNorm."""
    return (stream.var(dim=-1, unbiased=False) + ln.eps).sqrt()


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
