"""The Cross-Layer Transcoder (CLT; arXiv 2604.13304): sparse replacements for all MLPs of a tower, trained jointly.

    z_i = phi(W_enc[i] x_i + b_enc[i])                 encoder of source layer i, x_i the ln_2 output
    y_j = b_dec[j] + sum_{i <= j} z_i W^{i->j}         decoder of target layer j, the MLP output

so a feature of layer i writes to every MLP output from layer i on. phi is one of `models.dictionary.sparsify`. There is
one bias per *target*: with one per decoder only their sum would be identifiable. With `cross_layer` false, y_j reads
only z_j: per-layer transcoders, the baseline for a CLT.

The forward and backward cost of encoders and decoders scales with the active features, never with F, except for the one
product that finds the active features: see `_SparseLinear`, `_SparseProduct`. `encode_dense` and `decode_dense` compute
the same with dense products; tests compare the two.

L layers, F features per layer, d width, K places of a code, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitrine.models.dictionary.sparsify import JumpReLU, Kind, make_sparsifier


@dataclass(frozen=True)
class Architecture:
    """The shape of a CLT. k, k_cls: active features per token, one number per layer, for patches and for [CLS]."""

    layers: int
    width: int
    features: int
    k: tuple[int, ...]
    k_cls: tuple[int, ...]
    sparsifier: Kind = "relu_topk"
    cross_layer: bool = True

    def __post_init__(self) -> None:
        for name, budgets in (("k", self.k), ("k_cls", self.k_cls)):
            if len(budgets) != self.layers:
                raise ValueError(f"{name} has {len(budgets)} numbers for {self.layers} layers")

    def sources(self, target: int) -> range:
        """The source layers that write to a target layer."""
        return range(0 if self.cross_layer else target, target + 1)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        pairs = sum(len(self.sources(target)) for target in range(self.layers))
        encoders = self.layers * self.features * (self.width + 1 + (self.sparsifier == "jumprelu"))
        return encoders + pairs * self.features * self.width + self.layers * self.width


class Encoder(nn.Module):
    """Maps tokens [N, d] of one source layer to their code."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(architecture.features, architecture.width))
        self.bias = nn.Parameter(torch.empty(architecture.features))
        self.sparsifier = make_sparsifier(
            architecture.sparsifier, architecture.features, architecture.k[layer], architecture.k_cls[layer]
        )

    def forward(self, x: Tensor, is_cls: Tensor) -> SortedCode:
        """x [N, d] ln_2 outputs, is_cls [N] bool."""
        with torch.no_grad():
            preactivations = _linear(x, self.weight, self.bias)
            indices = self.sparsifier.select(preactivations)
            chosen = preactivations.gather(-1, indices)
        order = Order(indices, len(self.weight))
        chosen = _SparseLinear.apply(x, self.weight, self.bias, chosen, order)
        return self._code(indices, chosen, is_cls, order)

    def _code(self, indices: Tensor, chosen: Tensor, is_cls: Tensor, order: Order | None) -> SortedCode:
        values = self.sparsifier(chosen, indices, is_cls)
        if order is not None and not self.sparsifier.learns_from_silent_places:
            order.leave_out(values == 0)
        used = None if order is None else order.pick(values)
        return SortedCode(indices, values, self.sparsifier.active(chosen, indices, values), order, used)

    def encode_dense(self, x: Tensor, is_cls: Tensor) -> SortedCode:
        """The same with autograd through all F pre-activations: the reference implementation."""
        preactivations = _linear(x, self.weight, self.bias)
        indices = self.sparsifier.select(preactivations.detach())
        return self._code(indices, preactivations.gather(-1, indices), is_cls, None)


class Decoder(nn.Module):
    """Maps codes of the source layers to the MLP output [N, d] of one target layer."""

    def __init__(self, architecture: Architecture, target: int) -> None:
        super().__init__()
        self.sources = architecture.sources(target)
        shape = architecture.features, architecture.width
        self.weights = nn.ParameterList(torch.empty(shape) for _ in self.sources)
        self.bias = nn.Parameter(torch.empty(architecture.width))

    def forward(self, codes: Sequence[SortedCode]) -> Tensor:
        """codes: of at least layers 0 to the target."""
        return sum(self._products(codes), start=self.bias)

    def contributions(self, codes: list[SortedCode]) -> Tensor:
        """What each source layer writes, without the bias: [sources, N, d]."""
        return torch.stack(self._products(codes))

    def decode_dense(self, codes: list[SortedCode]) -> Tensor:
        """The same with dense products over all F features: the reference implementation."""
        output = self.bias
        for source, weight in zip(self.sources, self.weights, strict=True):
            code = codes[source]
            dense = code.values.new_zeros(len(code.values), len(weight)).scatter_add(1, code.indices, code.values)
            output = output + dense @ weight
        return output

    def contribution(self, source: int, code: SortedCode) -> Tensor:
        """What one of the `sources` writes by its code: [N, d]."""
        weight = self.weights[source - self.sources[0]]
        if code.order is None:
            order = Order(code.indices, len(weight))
            return _SparseProduct.apply(order.pick(code.values), weight, order)
        return _SparseProduct.apply(code.used, weight, code.order)

    def _products(self, codes: Sequence[SortedCode]) -> list[Tensor]:
        return [self.contribution(source, codes[source]) for source in self.sources]


class CrossLayerTranscoder(nn.Module):
    """L encoders and L decoders."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.encoders: Any  # of Encoder
        self.decoders: Any  # of Decoder
        self.architecture = architecture
        self.layers, self.width, self.features = architecture.layers, architecture.width, architecture.features
        self.encoders = nn.ModuleList(Encoder(architecture, layer) for layer in range(self.layers))
        self.decoders = nn.ModuleList(Decoder(architecture, target) for target in range(self.layers))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit rows for the encoders, and for the decoders divided by (number of sources * sqrt(k))."""
        for encoder in self.encoders:
            _unit_rows(encoder.weight, generator)
            encoder.bias.zero_()
        for target, decoder in enumerate(self.decoders):
            decoder.bias.zero_()
            for weight in decoder.weights:
                _unit_rows(weight, generator).div_(len(decoder.weights) * self.architecture.k[target] ** 0.5)

    @torch.no_grad()
    def calibrate(self, mlp_in: Tensor) -> None:
        """Set learnt thresholds so that initially k features per token are active, on average, on tokens [L, N, d]."""
        for encoder, x in zip(self.encoders, mlp_in, strict=True):
            if isinstance(encoder.sparsifier, JumpReLU):
                encoder.sparsifier.calibrate(_linear(x, encoder.weight, encoder.bias))

    def encode(self, mlp_in: Tensor, is_cls: Tensor) -> list[SortedCode]:
        """ln_2 outputs [L, N, d] to one code per source layer; is_cls [N] bool."""
        return [encoder(x, is_cls) for encoder, x in zip(self.encoders, mlp_in, strict=True)]

    def decode(self, codes: list[SortedCode]) -> Tensor:
        """Codes of all layers to MLP outputs [L, N, d]."""
        return torch.stack([decoder(codes) for decoder in self.decoders])

    def forward(self, mlp_in: Tensor, is_cls: Tensor) -> tuple[list[SortedCode], Tensor]:
        """ln_2 outputs [L, N, d] to (codes, the CLT's MLP outputs [L, N, d])."""
        codes = self.encode(mlp_in, is_cls)
        return codes, self.decode(codes)

    def widen(self, factor: float) -> None:
        """Set the budgets of every layer to `factor` times their configured values."""
        for encoder in self.encoders:
            encoder.sparsifier.widen(factor)

    @torch.no_grad()
    def directions(self) -> Tensor:
        """[L, F, d]: what one unit of a feature adds to the final residual, sum_{j >= i} W^{i->j}."""
        total = self.decoders[0].bias.new_zeros(self.layers, self.features, self.width)
        for decoder in self.decoders:
            for source, weight in zip(decoder.sources, decoder.weights, strict=True):
                total[source] += weight
        return total

    @torch.no_grad()
    def writers(self, target: int) -> Tensor:
        """[L, F, d]: the decoders of one target; 0 for sources that do not write to it."""
        decoder = self.decoders[target]
        table = decoder.bias.new_zeros(self.layers, self.features, self.width)
        for source, weight in zip(decoder.sources, decoder.weights, strict=True):
            table[source] = weight
        return table

    @torch.no_grad()
    def decoder_biases(self) -> Tensor:
        """[L, d]."""
        return torch.stack([decoder.bias for decoder in self.decoders])


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


class _SparseLinear(torch.autograd.Function):
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


class _SparseProduct(torch.autograd.Function):
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


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; returns float32 under autocast, which computes the product itself in half precision."""
    product = F.linear(x, weight, bias)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def _unit_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    weight.normal_(generator=generator)
    return weight.div_(weight.norm(dim=-1, keepdim=True))
