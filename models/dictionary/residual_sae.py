"""Sparse autoencoders (SAEs) of the residual stream, one after every block but the last (arXiv 2509.17401).

    x'  = (x - mean(x)) / (std(x) + 1e-5)        of the stream after a block, each token by itself; std unbiased
    z   = phi(W_enc x' + b_enc)                  phi one of `models.dictionary.sparsify`; the paper's is relu_topk
    x^  = (z W_dec + b_dec) (std(x) + 1e-5) + mean(x)

The rows of W_dec have length 1, so that an activation is a length in units of the token's own standard deviation, and
W_enc begins as W_dec. The paper reads x' - b_dec and has no b_enc: that is b_enc = -W_enc b_dec, where training begins
here. Standardised by itself a massive token (`training.data.normalisation`) is a token like any other.

F and k differ by layer. L blocks, d width, N tokens, K places of a code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.dictionary.architecture import SaeArchitecture
from vitrine.models.dictionary.encoder import Encoder, unit_rows
from vitrine.models.dictionary.sparse_products import SortedCode, contribution
from vitrine.models.dictionary.sparsify import make_sparsifier

EPSILON = 1e-5  # added to a token's standard deviation


class Standardised(NamedTuple):
    """Tokens, each with mean 0 and standard deviation 1, and what gives them back."""

    x: Tensor  # [..., d]
    mean: Tensor  # [..., 1]
    scale: Tensor  # [..., 1] standard deviation + EPSILON

    def undone(self, x: Tensor) -> Tensor:
        """Standardised tokens [..., d] in units of the stream."""
        return x * self.scale + self.mean


def standardise(x: Tensor) -> Standardised:
    """Tokens [..., d] of the stream, each by its own mean and (unbiased) standard deviation."""
    mean = x.mean(-1, keepdim=True)
    scale = x.std(-1, keepdim=True) + EPSILON
    return Standardised((x - mean) / scale, mean, scale)


class SaeDecoder(nn.Module):
    """Maps codes of one layer to standardised tokens [N, d]."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, width))  # unit rows
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, code: SortedCode) -> Tensor:
        return self.bias + contribution(code, self.weight)

    def of_features(self, activations: Tensor, features: Tensor) -> Tensor:
        """What some features [M] write with these activations [N, M], without the bias, by a dense product."""
        product = activations @ self.weight[features]
        return product.to(activations.dtype)  # autocast computes it in half precision

    def decode_dense(self, code: SortedCode) -> Tensor:
        """The same with a dense product over all F features: the reference implementation."""
        dense = code.values.new_zeros(len(code.values), len(self.weight)).scatter_add(1, code.indices, code.values)
        return dense @ self.weight + self.bias


class ResidualSaes(nn.Module):
    """L - 1 SAEs. `layers` is their number, `features` the largest F of them."""

    def __init__(self, architecture: SaeArchitecture) -> None:
        super().__init__()
        self.encoders: Any  # of Encoder
        self.decoders: Any  # of SaeDecoder
        self.architecture = architecture
        self.layers, self.width = architecture.layers, architecture.width
        self.features = max(architecture.features, default=0)
        shapes = list(zip(architecture.features, architecture.k, architecture.k_cls, strict=True))
        self.encoders = nn.ModuleList(
            Encoder(self.width, make_sparsifier(architecture.sparsifier, *shape)) for shape in shapes
        )
        self.decoders = nn.ModuleList(SaeDecoder(features, self.width) for features, _, _ in shapes)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit rows, the same for encoder and decoder, and no biases."""
        for encoder, decoder in zip(self.encoders, self.decoders, strict=True):
            unit_rows(decoder.weight, generator)
            encoder.weight.copy_(decoder.weight)
            encoder.bias.zero_()
            decoder.bias.zero_()

    @torch.no_grad()
    def calibrate(self, stream: Tensor) -> None:
        """Begin at the mean of standardised tokens [L - 1, N, d], which the decoders' biases give and the encoders read
        nothing of; set learnt thresholds so that k features per token are active on average."""
        for encoder, decoder, x in zip(self.encoders, self.decoders, stream, strict=True):
            decoder.bias.copy_(x.mean(0))
            encoder.bias.copy_(-(encoder.weight @ decoder.bias))
            encoder.calibrate(x)

    def forward(self, stream: Tensor, is_cls: Tensor) -> tuple[list[SortedCode], Tensor]:
        """Standardised tokens [L - 1, N, d], is_cls [N] bool, to (codes, the same tokens by the SAEs)."""
        codes = [encoder(x, is_cls) for encoder, x in zip(self.encoders, stream, strict=True)]
        return codes, torch.stack([decoder(code) for decoder, code in zip(self.decoders, codes, strict=True)])

    def reconstruct(self, layer: int, x: Tensor, is_cls: Tensor) -> tuple[SortedCode, Tensor]:
        """One layer's code, and the SAE's version of tokens of the stream [N, d], in its units."""
        standardised = standardise(x)
        code = self.encoders[layer](standardised.x, is_cls)
        return code, standardised.undone(self.decoders[layer](code))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Divide every decoder row by its length; to be called after each step of training."""
        for decoder in self.decoders:
            decoder.weight.div_(decoder.weight.norm(dim=-1, keepdim=True))

    def widen(self, factor: float) -> None:
        """Set the budgets of every layer to `factor` times their configured values."""
        for encoder in self.encoders:
            encoder.sparsifier.widen(factor)
