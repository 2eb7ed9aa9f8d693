"""A block's attention written out, so that its weights and values can be read and its matrix products quantised.

open_clip's module computes the same result in fused form and returns neither. Every product uses the weights as they
are stored: one for queries, keys and values, or, where only [CLS] attends, one for its query and one for the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class AttentionOutput(NamedTuple):
    """One block's attention, with its weights and values. H heads, t tokens that attend."""

    out: Tensor  # [B, t, d] what attention adds to the stream
    weights: Tensor  # [B, H, t, T] softmax weights of every head over all tokens; they sum to 1
    values: Tensor  # [B, T, d] the values of every token, heads side by side, without their bias


class Attention(nn.Module):
    """`Tower.attention` of one block; `cls_only`: for [CLS] only.

    The weights of a token sum to 1, so the values' bias is merged into the output's bias (`constant`).
    """

    value_biases: Tensor  # [H, 1, d / H]

    def __init__(self, block: Any, cls_only: bool = False) -> None:
        super().__init__()
        attn = block.attn
        weight, bias = attn.in_proj_weight.detach(), attn.in_proj_bias.detach()
        width = attn.embed_dim
        self.heads, self.cls_only, self.scale = attn.num_heads, cls_only, attn.head_dim**-0.5
        self.ln, self.layer_scale = block.ln_1, block.ls_1
        # biases of queries, keys and values; that of the values is 0
        biases = torch.cat([bias[: 2 * width], torch.zeros_like(bias[:width])])
        if cls_only:
            self.query = linear(weight[:width], biases[:width])
            self.key_value = linear(weight[width:], biases[width:])
        else:
            self.query_key_value = linear(weight, biases)
        self.out = linear(attn.out_proj.weight.detach(), constant(attn).to(bias.dtype))
        self.register_buffer("value_biases", bias[2 * width :].view(self.heads, 1, -1))

    def forward(self, stream: Tensor, factors: Tensor | None = None) -> AttentionOutput:
        """stream: the residual stream [B, T, d] before the block; factors [B, H, t] of what each head writes."""
        normed = self.ln(stream)
        if self.cls_only:
            query = self.query(normed[:, :1])
            key, values = self.key_value(normed).chunk(2, dim=-1)
        else:
            query, key, values = self.query_key_value(normed).chunk(3, dim=-1)
        scores = self._split(query * self.scale) @ self._split(key).transpose(-1, -2)
        weights = scores.softmax(-1)
        return AttentionOutput(self.mixed(weights, values, factors), weights, values)

    def mixed(self, weights: Tensor, values: Tensor, factors: Tensor | None = None) -> Tensor:
        """What attention adds to the stream [B, t, d], by weights and values as in `AttentionOutput`.

        factors [B, H, t] of what each head writes. The values' bias, which is part of that, is merged into the output's
        here: so it is added as often as the factor differs from 1.
        """
        mixed = weights @ self._split(values)
        if factors is not None:
            factors = factors[..., None]
            mixed = mixed * factors + (factors - 1) * self.value_biases
        return self.layer_scale(self.out(mixed.transpose(1, 2).flatten(2)))

    def by_head(self, weights: Tensor, values: Tensor) -> Tensor:
        """What each head writes to one token [B, H, d], by that token's weights [B, H, T]; with the output's own bias
        they sum to what attention adds.

        Every head's channels are padded with 0 to all heads', so that the product uses the weight as it is stored.
        """
        mixed = weights[:, :, None] @ self._split(values) + self.value_biases  # [B, H, 1, d / H]
        own = torch.eye(self.heads, dtype=mixed.dtype, device=mixed.device)[..., None]  # [H, H, 1]
        return self.layer_scale(nn.functional.linear((mixed * own).flatten(2), self.out.weight))

    def _split(self, x: Tensor) -> Tensor:
        """[B, tokens, d] -> [B, H, tokens, d / H]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def constant(attn: Any, read: Tensor | None = None) -> Tensor:
    """What attention adds to every token, whatever it attends to [d], in float64: values that all tokens have in common
    pass through unchanged. They are the values' bias and what the values read of `read` [d], an input common to all."""
    weight, bias = (part.detach().double().chunk(3)[2] for part in (attn.in_proj_weight, attn.in_proj_bias))
    values = bias if read is None else weight @ read.detach().double() + bias
    return attn.out_proj.weight.detach().double() @ values + attn.out_proj.bias.detach().double()


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """x -> x W^T + b with these tensors, [out, in] and [out], uncopied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
    return linear
