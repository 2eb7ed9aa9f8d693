"""The scale of a CLT's inputs and targets, estimated so that a few massive tokens cannot set it.

In a pretrained ViT some MLPs write a few *outlier tokens* whose outputs are many times as long as all others ("massive
activations", arXiv 2402.17762; "registers", arXiv 2309.16588): in a ViT-Ti/16 one token in fifty of layer 7 is up to 85
times as long as the median. They own the variance of such a layer. Divided by its root mean square, all other tokens
nearly vanish from the loss. So targets are centred and scaled by the tokens that are no outliers, and outliers weigh
less in the loss (`training.run.objective`).

L layers, N tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.training.data.activations import Activations

OUTLIER = 3.0  # a token is an outlier of a layer if its MLP output is longer than so many times the layer's median
_CONSTANT = 1e-4  # share of the targets' variance below which that of [CLS] counts as none


@dataclass
class Normalisation:
    """Per layer and side a mean vector and one scale (root mean square of the deviation from it).

    Training uses (x - mean) / scale, so that no layer dominates the loss by its norm; `fold_into` then converts the
    CLT to raw activations. Targets are described by the tokens that are no outliers.
    """

    in_mean: Tensor  # [L, d]
    in_scale: Tensor  # [L]
    out_mean: Tensor  # [L, d]
    out_scale: Tensor  # [L]
    out_mean_cls: Tensor  # [L, d] mean output of [CLS]
    out_scale_cls: Tensor  # [L] root mean square of its deviation from that, outliers included
    outlier_norm: Tensor  # [L] the length from which a target is an outlier

    @classmethod
    def estimate(cls, batches: Iterable[Activations]) -> Normalisation:
        """Estimate over all tokens of all batches (use many: a single batch is not representative).

        The median length is that of the first batch's tokens: outliers are so much longer that its error is harmless.
        Raises `ValueError` if there are no batches.
        """
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise ValueError("no activations to estimate the normalisation from")
        outlier_norm = OUTLIER * first.mlp_out.norm(dim=-1).median(dim=1).values
        totals: list[Tensor] = []
        for batch in chain([first], batches):
            kept = batch.mlp_out.norm(dim=-1) <= outlier_norm[:, None]
            parts = [
                *_sums(batch.mlp_in, torch.ones_like(kept)),
                *_sums(batch.mlp_out, kept),
                *_sums(batch.mlp_out, batch.is_cls.expand_as(kept)),
            ]
            totals = [a + b for a, b in zip(totals, parts, strict=True)] if totals else parts
        (in_mean, in_scale), (out_mean, out_scale), (cls_mean, cls_scale) = (
            _mean_and_scale(*totals[at : at + 3]) for at in (0, 3, 6)
        )
        cls_scale = cls_scale.clamp_min(_CONSTANT**0.5 * out_scale)
        estimated = in_mean, in_scale, out_mean, out_scale, cls_mean, cls_scale, outlier_norm
        return cls(*(part.float() for part in estimated))

    def to(self, device: torch.device) -> Normalisation:
        """A copy on another device."""
        return Normalisation(*(getattr(self, field.name).to(device) for field in fields(self)))

    def inputs(self, mlp_in: Tensor) -> Tensor:
        """Normalised ln_2 outputs [L, N, d]."""
        return (mlp_in - self.in_mean[:, None]) / self.in_scale[:, None, None]

    def targets(self, mlp_out: Tensor) -> Tensor:
        """Normalised MLP outputs [L, N, d]."""
        return (mlp_out - self.out_mean[:, None]) / self.out_scale[:, None, None]

    def kept(self, mlp_out: Tensor) -> Tensor:
        """Which tokens of MLP outputs [L, N, d] are no outliers: [L, N] bool."""
        return mlp_out.norm(dim=-1) <= self.outlier_norm[:, None]

    @torch.no_grad()
    def fold_into(self, clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
        """A CLT on raw activations equivalent to `clt` on normalised ones, with denormalised outputs; float32.

        Pre-activations do not change, so sparsifiers (thresholds) are copied unchanged.
        """
        folded = CrossLayerTranscoder(clt.architecture)
        encoder: Any
        decoder: Any
        raw: Any
        for layer, (encoder, raw) in enumerate(zip(clt.encoders, folded.encoders, strict=True)):
            weight = encoder.weight.float() / self.in_scale[layer]
            raw.weight.copy_(weight)
            raw.bias.copy_(encoder.bias.float() - weight @ self.in_mean[layer])
            raw.sparsifier.load_state_dict(encoder.sparsifier.state_dict())
        for target, (decoder, raw) in enumerate(zip(clt.decoders, folded.decoders, strict=True)):
            for weight, raw_weight in zip(decoder.weights, raw.weights, strict=True):
                raw_weight.copy_(weight.float() * self.out_scale[target])
            raw.bias.copy_(decoder.bias.float() * self.out_scale[target] + self.out_mean[target])
        return folded.train(clt.training)


def _sums(values: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over chosen tokens, values [L, N, d], chosen [L, N]: (number [L], sum [L, d], sum of squares [L]) in float64."""
    x, weights = values.double(), chosen.double()
    return weights.sum(1), torch.einsum("lnd,ln->ld", x, weights), torch.einsum("lnd,lnd,ln->l", x, x, weights)


def _mean_and_scale(count: Tensor, total: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [L, d], root mean square of the deviation from it, per dimension [L])."""
    mean = total / count[:, None]
    variance = (squares / count - mean.square().sum(1)) / total.shape[1]
    return mean, variance.clamp_min(0).sqrt()
