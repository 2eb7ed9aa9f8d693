"""The Cross-Layer Transcoder (CLT; arXiv 2604.13304): sparse stand-ins for all MLPs of a tower at once.

    z_i = topk(relu(W_enc[i] x_i + b_enc[i]))          encoder of source layer i, x_i the ln_2 output
    y_j = b_dec[j] + sum_{i <= j} z_i W^{i->j}         target layer j, the MLP output

so a feature of layer i writes to every MLP output from i on. One bias per *target*: one per decoder could not be
told apart. The decoders are ragged, `w_dec[j]` being [j + 1, F, d]: one product a target and no masked waste.

L layers, F features a layer, d width, k active features a layer and token, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sparsify import Code, relu_topk


class CrossLayerTranscoder(nn.Module):
    """L encoders, L(L+1)/2 decoders. `encode` and `decode` work on tokens [L, N, d]."""

    def __init__(self, layers: int, width: int, features: int, k: int) -> None:
        super().__init__()
        if not 0 < k <= features:
            raise ValueError(f"k = {k} must lie between 1 and the number of features, {features}")
        self.layers, self.width, self.features, self.k = layers, width, features, k
        self.w_enc = nn.Parameter(torch.empty(layers, features, width))
        self.b_enc = nn.Parameter(torch.zeros(layers, features))
        self.w_dec = nn.ParameterList(torch.empty(target + 1, features, width) for target in range(layers))
        self.b_dec = nn.Parameter(torch.zeros(layers, width))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit rows for the encoders; for the decoders too, shared out over the sources of a target."""
        self.w_enc.normal_(generator=generator)
        self.w_enc.div_(self.w_enc.norm(dim=-1, keepdim=True))
        self.b_enc.zero_()
        self.b_dec.zero_()
        for target, w_dec in enumerate(self.w_dec):
            w_dec.normal_(generator=generator)
            w_dec.div_(w_dec.norm(dim=-1, keepdim=True) * (target + 1) * self.k**0.5)

    def preactivations(self, mlp_in: Tensor) -> Tensor:
        """[L, N, d] -> [L, N, F]."""
        return torch.baddbmm(self.b_enc[:, None], mlp_in, self.w_enc.transpose(1, 2))

    def encode(self, mlp_in: Tensor) -> Code:
        """ln_2 outputs [L, N, d] to codes [L, N, k]."""
        return relu_topk(self.preactivations(mlp_in), self.k)

    def decode(self, code: Code) -> Tensor:
        """Codes [L, N, k] to MLP outputs [L, N, d], reading k rows a source and token (see `_SparseDecode`)."""
        decoded = _SparseDecode.apply(code.indices, code.values, *self.w_dec)
        return torch.stack(decoded) + self.b_dec[:, None]

    def decode_dense(self, code: Code) -> Tensor:
        """The same by dense products over all F features: the reference that `decode` is tested against."""
        layers, tokens, _ = code.indices.shape
        dense = code.values.new_zeros(layers, tokens, self.features).scatter_add(-1, code.indices, code.values)
        outputs = [torch.einsum("inf,ifd->nd", dense[: j + 1], w_dec) for j, w_dec in enumerate(self.w_dec)]
        return torch.stack(outputs) + self.b_dec[:, None]

    def forward(self, mlp_in: Tensor) -> Tensor:
        """ln_2 outputs [L, N, d] to the CLT's MLP outputs [L, N, d]."""
        return self.decode(self.encode(mlp_in))

    @torch.no_grad()
    def directions(self) -> Tensor:
        """[L, F, d]: what one unit of a feature adds to the final residual, sum_{j >= i} W^{i->j}."""
        total = torch.zeros_like(self.w_enc)
        for target, w_dec in enumerate(self.w_dec):
            total[: target + 1] += w_dec
        return total


class _SparseDecode(torch.autograd.Function):
    """sum_i z_i W^{i->j} for every target j, forward and backward by `embedding_bag`: k rows a token, never F.

    Autograd's own backward of `embedding_bag` scatters row by row. The gradient of a decoder is itself a bag sum,
    dW[f] = sum over the tokens where f is active of z * dy, so we sort the code by feature once for all targets
    and let the same fast kernel do it. Measured in training/RESULTS.md.
    """

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, *w_dec: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(indices, values, *w_dec)
        rows, weights = _rows_by_token(indices, values, w_dec[0].shape[1])
        return tuple(_bag(rows[:, : j + 1], w.flatten(0, 1), weights[:, : j + 1]) for j, w in enumerate(w_dec))

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor | None, ...]:
        indices, values, *w_dec = ctx.saved_tensors
        layers, _, k = indices.shape
        features = w_dec[0].shape[1]
        rows, weights = _rows_by_token(indices, values, features)

        # dz = <dy, W[f]>: embedding_bag's own gradient of its weights, summed over the targets by autograd.
        with torch.enable_grad():
            weights = weights.detach().requires_grad_()
            outputs = [
                _bag(rows[:, : j + 1], w.detach().flatten(0, 1), weights[:, : j + 1]) for j, w in enumerate(w_dec)
            ]
            (d_weights,) = torch.autograd.grad(outputs, weights, d_out)

        # dW: the code sorted by feature, each feature a bag of tokens.
        by_feature = indices.flatten(1)
        order = by_feature.argsort(dim=1, stable=True)
        tokens, token_weights = order // k, values.flatten(1).gather(1, order)
        counts = torch.zeros(layers, features, dtype=torch.long, device=indices.device)
        counts.scatter_add_(1, by_feature, torch.ones_like(by_feature))
        per_source = by_feature.shape[1]
        starts = counts.cumsum(1) - counts + torch.arange(layers, device=indices.device)[:, None] * per_source
        d_w_dec = tuple(
            F.embedding_bag(
                tokens[: j + 1].flatten(),
                d_out[j].contiguous(),
                offsets=starts[: j + 1].flatten(),
                per_sample_weights=token_weights[: j + 1].flatten(),
                mode="sum",
            ).view_as(w)
            for j, w in enumerate(w_dec)
        )
        return None, d_weights.transpose(0, 1), *d_w_dec


def _rows_by_token(indices: Tensor, values: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Codes [L, N, k] as rows [N, L, k] of the decoders flattened to [(j+1) * F, d], and their weights."""
    offsets = torch.arange(indices.shape[0], device=indices.device)[:, None, None] * features
    return (indices + offsets).transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()


def _bag(rows: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    """sum over [i, k] of weights * table[rows], per token: [N, i, k] -> [N, d]."""
    return F.embedding_bag(rows.flatten(1), table, per_sample_weights=weights.flatten(1), mode="sum")
