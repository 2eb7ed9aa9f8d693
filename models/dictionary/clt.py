"""The Cross-Layer Transcoder (CLT; arXiv 2604.13304): sparse replacements for all MLPs of a tower, trained jointly.

    z_i = phi(W_enc[i] x_i + b_enc[i])                 encoder of source layer i, x_i the ln_2 output
    y_j = b_dec[j] + sum_{i <= j} z_i W^{i->j}         decoder of target layer j, the MLP output

so a feature of layer i writes to every MLP output from layer i on. phi is one of `models.dictionary.sparsify`. There is
one bias per *target*: with one per decoder only their sum would be identifiable. With `cross_layer` false, y_j reads
only z_j: per-layer transcoders, the baseline for a CLT.

The forward and backward cost of encoders and decoders scales with the active features, never with F, except for the one
product that finds the active features: see `models.dictionary.encoder`, `models.dictionary.sparse_products`.
`encode_dense` and `decode_dense` compute the same with dense products; tests compare the two.

L layers, F features per layer, d width, K places of a code, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.dictionary.architecture import Architecture
from vitrine.models.dictionary.encoder import Encoder, unit_rows
from vitrine.models.dictionary.sparse_products import SortedCode, contribution
from vitrine.models.dictionary.sparsify import make_sparsifier


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
        return contribution(code, self.weights[source - self.sources[0]])

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
        budgets = zip(architecture.k, architecture.k_cls, strict=True)
        sparsifiers = (make_sparsifier(architecture.sparsifier, self.features, k, k_cls) for k, k_cls in budgets)
        self.encoders = nn.ModuleList(Encoder(self.width, sparsifier) for sparsifier in sparsifiers)
        self.decoders = nn.ModuleList(Decoder(architecture, target) for target in range(self.layers))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit rows for the encoders, and for the decoders divided by (number of sources * sqrt(k))."""
        for encoder in self.encoders:
            unit_rows(encoder.weight, generator)
            encoder.bias.zero_()
        for target, decoder in enumerate(self.decoders):
            decoder.bias.zero_()
            for weight in decoder.weights:
                unit_rows(weight, generator).div_(len(decoder.weights) * self.architecture.k[target] ** 0.5)

    @torch.no_grad()
    def calibrate(self, mlp_in: Tensor) -> None:
        """Set learnt thresholds so that initially k features per token are active, on average, on tokens [L, N, d]."""
        for encoder, x in zip(self.encoders, mlp_in, strict=True):
            encoder.calibrate(x)

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
