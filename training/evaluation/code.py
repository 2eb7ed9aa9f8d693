"""The code of one residual SAE for a batch of images, and what a gradient at the stream finds in it.

As a sum over active features, x = s sum of z W_dec[f] + s b_dec + error + mean, with a token's standard deviation s
held fast (`models.graph.residual`), and an activation is linear in the stream, z = W_enc[f] (x - mean) / s + b_enc[f],
where the feature is active. Every gradient here is orthogonal to the mean over channels.

B images, T tokens, d width, F features. Dense, for a code about medians is: some times B T F numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise


class Code:
    """Of the stream [B, T, d] after block `layer`.

    Args:
        medians: about which relevance is measured, activations [T, F] and errors [T, d]; None: about 0.
    """

    values: Tensor  # [B, T, F] activations
    errors: Tensor  # [B, T, d]

    def __init__(
        self, saes: ResidualSaes, layer: int, stream: Tensor, medians: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.encoder, self.decoder, self.medians = saes.encoders[layer], saes.decoders[layer], medians
        tokens = standardise(stream)
        is_cls = torch.arange(stream.shape[1], device=stream.device).expand(len(stream), -1) == 0
        code = self.encoder(tokens.x.flatten(0, 1), is_cls.flatten())
        dense = code.values.new_zeros(is_cls.numel(), len(self.decoder.weight))
        self.values = dense.scatter_(1, code.indices, code.values).view(*is_cls.shape, -1)
        self.active = self.values != 0
        self.scale = tokens.scale  # [B, T, 1]
        self.errors = (tokens.x - self.values @ self.decoder.weight - self.decoder.bias) * tokens.scale

    def products(self, gradient: Tensor) -> Tensor:
        """The gradient [B, T, d] at each activation, active or not: s <g, W_dec[f]> [B, T, F]."""
        return (gradient * self.scale) @ self.decoder.weight.T

    def relevance(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(features [B, T, F], errors [B, T], both about the medians, what is subtracted [B])."""
        products = self.products(gradient)
        features, errors = products * self.values, (self.errors * gradient).sum(-1)
        if self.medians is None:
            return features, errors, torch.zeros_like(errors[:, 0])
        activations, usual = self.medians
        baseline, of_errors = products * activations, (gradient * usual).sum(-1)
        return features - baseline, errors - of_errors, baseline.sum((1, 2)) + of_errors.sum(1)

    def of_bias(self, gradient: Tensor) -> Tensor:
        """[B] of the decoder's bias."""
        return ((gradient * self.scale) @ self.decoder.bias).sum(1)

    def through_encoder(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient at activations [B, T, F], of which those that are not active read nothing -> (that at the stream
        [B, T, d], the part of the encoder's biases [B])."""
        active = products * self.active
        rows = self.encoder.weight - self.encoder.weight.mean(-1, keepdim=True)
        return active @ rows / self.scale, (active @ self.encoder.bias).sum(1)

    def through_error(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient [B, T, d] at the error alone -> (that at the stream, the part of biases [B]): the error is the
        stream less what the SAE says of it."""
        said, biases = self.through_encoder(self.products(gradient))
        return gradient - said, -biases - self.of_bias(gradient)
