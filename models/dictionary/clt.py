"""The Cross-Layer Transcoder (CLT; arXiv 2604.13304): sparse replacements for all MLPs of a tower, trained jointly.

    z_i = phi(W_enc[i] x_i + b_enc[i])                 encoder of source layer i, x_i the ln_2 output
    y_j = b_dec[j] + sum_{i <= j} z_i W^{i->j}         decoder of target layer j, the MLP output

so a feature of layer i writes to every MLP output from layer i on. phi is one of `models.dictionary.sparsify`. There is
one bias per *target*: with one per decoder only their sum would be identifiable. With `cross_layer` false, y_j reads
only z_j: per-layer transcoders, the baseline for a CLT.

The forward and backward cost of encoders and decoders scales with K places per token, never with F, except for the one
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
        chosen = _SparseLinear.apply(x, self.weight, self.bias, chosen, indices, order)
        return self._code(indices, chosen, is_cls, order)

    def _code(self, indices: Tensor, chosen: Tensor, is_cls: Tensor, order: Order | None) -> SortedCode:
        values = self.sparsifier(chosen, indices, is_cls)
        return SortedCode(indices, values, self.sparsifier.active(chosen, indices, values), order)

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

    def contribution(self, source: int, code: SortedCode) -> Tensor:
        """What one of the `sources` writes by its code: [N, d]."""
        weight = self.weights[source - self.sources[0]]
        return _SparseProduct.apply(code.values, weight, code.indices, code.order or Order(code.indices, len(weight)))

    def decode_dense(self, codes: list[SortedCode]) -> Tensor:
        """The same with dense products over all F features: the reference implementation."""
        output = self.bias
        for source, weight in zip(self.sources, self.weights, strict=True):
            code = codes[source]
            dense = code.values.new_zeros(len(code.values), len(weight)).scatter_add(1, code.indices, code.values)
            output = output + dense @ weight
        return output

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


class Order:
    """The places of a code [N, K] sorted by feature, so that each feature is a bag of tokens.

    Sorted once, when the first weight gradient needs it.
    """

    def __init__(self, indices: Tensor, features: int) -> None:
        self.indices, self.features = indices, features

    def sum_over_tokens(self, coefficients: Tensor, rows: Tensor) -> Tensor:
        """sum_n coefficients[n, feature] * rows[n], for every feature: [N, K], [N, d] -> [F, d]."""
        places, tokens, starts = self._bags
        return F.embedding_bag(tokens, rows, starts, per_sample_weights=coefficients.flatten()[places], mode="sum")

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor, Tensor]:
        """(places [N * K], flat positions in [N, K]; their tokens [N * K]; the start of each feature's bag [F])."""
        sorted_features, places = self.indices.flatten().sort(stable=True)
        starts = torch.searchsorted(sorted_features, torch.arange(self.features, device=sorted_features.device))
        return places, places // self.indices.shape[-1], starts


class _SparseLinear(torch.autograd.Function):
    """Pre-activations of chosen features, W[f] x + b[f], whose gradient reads and writes K places per token.

    The gradient of W[f] is the sum of da * x over the tokens where f was chosen. With the places sorted by feature this
    is a bag sum, computed by `embedding_bag`'s forward kernel (its own backward scatters row by row).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, chosen: Tensor, indices: Tensor, order: Order
    ) -> Tensor:
        ctx.save_for_backward(x, weight, indices)
        ctx.order = order
        return chosen.view_as(chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_chosen: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices = ctx.saved_tensors
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = F.embedding_bag(indices, weight, per_sample_weights=d_chosen, mode="sum").to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = ctx.order.sum_over_tokens(d_chosen, x.to(weight.dtype))
        if ctx.needs_input_grad[2]:
            d_bias = d_chosen.new_zeros(len(weight)).scatter_add_(0, indices.flatten(), d_chosen.flatten())
        return d_x, d_weight, d_bias, None, None, None


class _SparseProduct(torch.autograd.Function):
    """sum_k z_k W[f_k] for every token, forward and backward by `embedding_bag`. Measured in training/RESULTS.md."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, indices: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(values, weight, indices)
        ctx.order = order
        return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        values, weight, indices = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_values = d_weight = None
        if ctx.needs_input_grad[0]:  # dz = <dy, W[f]>, embedding_bag's own gradient of its weights
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                output = F.embedding_bag(indices, weight.detach(), per_sample_weights=leaf, mode="sum")
                (d_values,) = torch.autograd.grad(output, leaf, d_out)
        if ctx.needs_input_grad[1]:
            d_weight = ctx.order.sum_over_tokens(values, d_out)
        return d_values, d_weight, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b; returns float32 under autocast, which computes the product itself in half precision."""
    product = F.linear(x, weight, bias)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def _unit_rows(weight: Tensor, generator: torch.Generator) -> Tensor:
    weight.normal_(generator=generator)
    return weight.div_(weight.norm(dim=-1, keepdim=True))
