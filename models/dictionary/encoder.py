"""The encoder of every dictionary: z = phi(W x + b), of which only the chosen features have a gradient.

phi is one of `models.dictionary.sparsify`. All F pre-activations are computed once, without gradient, to find the
active features; everything after that scales with these. `encode_dense` computes the same with autograd through all F;
tests compare the two.

N tokens, K places of a code, F features, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.dictionary.sparse_products import Order, SortedCode, SparseLinear
from vitrine.models.dictionary.sparsify import JumpReLU, Sparsifier


class Encoder(nn.Module):
    """Maps tokens [N, d] of one layer to their code."""

    def __init__(self, width: int, sparsifier: Sparsifier) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sparsifier.features, width))
        self.bias = nn.Parameter(torch.empty(sparsifier.features))
        self.sparsifier = sparsifier

    def forward(self, x: Tensor, is_cls: Tensor) -> SortedCode:
        """x [N, d] what is read, is_cls [N] bool."""
        with torch.no_grad():
            preactivations = linear(x, self.weight, self.bias)
            indices = self.sparsifier.select(preactivations)
            chosen = preactivations.gather(-1, indices)
        order = Order(indices, len(self.weight))
        chosen = SparseLinear.apply(x, self.weight, self.bias, chosen, order)
        return self._code(indices, chosen, is_cls, order)

    def _code(self, indices: Tensor, chosen: Tensor, is_cls: Tensor, order: Order | None) -> SortedCode:
        values = self.sparsifier(chosen, indices, is_cls)
        if order is not None and not self.sparsifier.learns_from_silent_places:
            order.leave_out(values == 0)
        used = None if order is None else order.pick(values)
        return SortedCode(indices, values, self.sparsifier.active(chosen, indices, values), order, used)

    def encode_dense(self, x: Tensor, is_cls: Tensor) -> SortedCode:
        """The same with autograd through all F pre-activations: the reference implementation."""
        preactivations = linear(x, self.weight, self.bias)
        indices = self.sparsifier.select(preactivations.detach())
        return self._code(indices, preactivations.gather(-1, indices), is_cls, None)

    def of_features(self, x: Tensor, features: Tensor) -> Tensor:
        """Pre-activations of some features [M] alone, by a dense product with its gradients: [N, M]."""
        return linear(x, self.weight[features], self.bias[features])

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set a learnt threshold so that initially k features per token are active, on average, on tokens [N, d]."""
        if isinstance(self.sparsifier, JumpReLU):
            self.sparsifier.calibrate(linear(x, self.weight, self.bias))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; returns float32 under autocast, which computes the product itself in half precision."""
    product = F.linear(x, weight, bias)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def unit_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a table [F, d] with random rows of length 1, in place."""
    weight.normal_(generator=generator)
    return weight.div_(weight.norm(dim=-1, keepdim=True))
