"""Products with a sparse code whose cost, forward and backward, scales with its active features, never with F.

`embedding_bag` sums rows of a table by an index, which is what a decoder does with a code; the gradients are bag sums
of the same kind, once the code's places are sorted by feature. Measured in training/RESULTS.md.

N tokens, K places of a code, M of them used, F features, d width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class SortedCode(NamedTuple):
    """One layer's code, with what training needs."""

    indices: Tensor  # [N, K]
    values: Tensor  # [N, K]
    active: Tensor  # [N] active features per token; differentiable if the sparsifier learns this number
    order: Order | None  # shared by encoder and decoders; None: each decoder creates its own
    used: Tensor | None = None  # [M] the values at the used places of `order`


_SUM = 0  # embedding_bag's number for mode="sum"


class Order:
    """The M used places of a code [N, K] as bags: of the features of each token, and of the tokens of each feature.

    Places that are left out have activation 0 and get no gradient; tokens with a smaller budget than others have many.
    Both orders are found once, when first needed.
    """

    def __init__(self, indices: Tensor, features: int) -> None:
        self.indices, self.features = indices, features
        self._used: Tensor | None = None  # [N, K] bool; None: all
        self._sorted: tuple[Tensor, Tensor] | None = None  # coefficients, and the same by feature

    def leave_out(self, places: Tensor) -> None:
        """Use all places of the code but these, [N, K] bool. Call it before anything else."""
        self._used = ~places

    def pick(self, values: Tensor) -> Tensor:
        """Of values [N, K] those of the used places: [M]."""
        places = self._places
        return values.flatten() if places is None else values.flatten().index_select(0, places)

    def sum_over_features(self, coefficients: Tensor, weight: Tensor) -> Tensor:
        """sum of coefficients * weight[feature] over each token's features: [M], [F, d] -> [N, d]."""
        features, starts, _ = self._by_token
        return F.embedding_bag(features, weight, starts, per_sample_weights=coefficients, mode="sum")

    def sum_over_tokens(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """sum of coefficients * rows[token] over each feature's tokens: [M], [N, d] -> [F, d]."""
        order, tokens, starts = self._by_feature
        if self._sorted is None or self._sorted[0].data_ptr() != coefficients.data_ptr():  # the targets' are the same
            self._sorted = coefficients, coefficients[order]
        return F.embedding_bag(tokens, rows, starts, per_sample_weights=self._sorted[1], mode="sum")

    def products(self, rows: Tensor, weight: Tensor) -> Tensor:
        """<rows[token], weight[feature]> at every used place, the gradient of `embedding_bag`'s per-sample weights:
        [N, d], [F, d] -> [M]."""
        features, starts, tokens = self._by_token
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows, weight, features, starts, tokens, _SUM, padding_idx=-1
        )

    @cached_property
    def _places(self) -> Tensor | None:
        """The used places, as positions in the flattened code; None: all."""
        places = None if self._used is None else self._used.flatten().nonzero()[:, 0]
        return None if places is None or len(places) == self.indices.numel() else places

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """(features [M]; the start of each token's bag [N]; tokens [M])."""
        count, places = self.indices.shape
        tokens = torch.arange(count, device=self.indices.device)
        if self._places is None:
            return self.indices.flatten(), tokens * places, tokens.repeat_interleave(places)
        assert self._used is not None
        used = self._used.sum(1)
        return self.pick(self.indices), used.cumsum(0) - used, tokens.repeat_interleave(used)

    @cached_property
    def _by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """(the places by feature [M]; their tokens [M]; the start of each feature's bag [F])."""
        features, _, tokens = self._by_token
        sorted_features, order = features.sort(stable=True)
        starts = torch.searchsorted(sorted_features, torch.arange(self.features, device=features.device))
        return order, tokens[order], starts


class SparseLinear(torch.autograd.Function):
    """Pre-activations of chosen features, W[f] x + b[f], whose gradient reads and writes the used places.

    The gradient of W[f] is the sum of da * x over the tokens where f was chosen. With the places sorted by feature this
    is a bag sum, computed by `embedding_bag`'s forward kernel (its own backward scatters row by row).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, chosen: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.order = order
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_chosen: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), order = ctx.saved_tensors, ctx.order
        d_x = d_weight = d_bias = None
        d_used = order.pick(d_chosen)
        if ctx.needs_input_grad[0]:
            d_x = order.sum_over_features(d_used, weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = order.sum_over_tokens(d_used, x.to(weight.dtype))
        if ctx.needs_input_grad[2]:
            d_bias = d_used.new_zeros(len(weight)).scatter_add_(0, order.pick(order.indices), d_used)
        return d_x, d_weight, d_bias, None, None


class SparseProduct(torch.autograd.Function):
    """sum_k z_k W[f_k] for every token, forward and backward by `embedding_bag`. Measured in training/RESULTS.md."""

    @staticmethod
    def forward(ctx: Any, used: Tensor, weight: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(used, weight)
        ctx.order = order
        return order.sum_over_features(used, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (used, weight), order, d_out = ctx.saved_tensors, ctx.order, d_out.contiguous()
        d_used = order.products(d_out, weight) if ctx.needs_input_grad[0] else None
        d_weight = order.sum_over_tokens(used, d_out) if ctx.needs_input_grad[1] else None
        return d_used, d_weight, None


def contribution(code: SortedCode, weight: Tensor) -> Tensor:
    """What a code writes by a decoder's rows [F, d]: sum_k z_k W[f_k] for every token, [N, d]."""
    if code.order is None:
        order = Order(code.indices, len(weight))
        return SparseProduct.apply(order.pick(code.values), weight, order)
    return SparseProduct.apply(code.used, weight, code.order)
