"""A block's attention written out, so that its weights and values can be read and its products quantised.

open_clip's own module gives the same sums fused, and hands out neither. Every product has its weights as they are
stored: one for queries, keys and values, or, where [CLS] alone attends, one for its query and one for the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Attended(NamedTuple):
    """One block's attention, seen from inside. H heads, t tokens that attend."""

    out: Tensor  # [B, t, d] what attention adds to the stream
    weights: Tensor  # [B, H, t, T] how much of every token each head takes; they sum to 1
    values: Tensor  # [B, T, d] what every token offers, heads side by side, without the values' bias


class Attention(nn.Module):
    """`Tower.attention` of one block; `cls_only`: for [CLS] alone.

    The weights of a token sum to 1, so the values' bias reaches it whole: it is added to the output's.
    """

    def __init__(self, block: Any, cls_only: bool = False) -> None:
        super().__init__()
        attn = block.attn
        weight, bias = attn.in_proj_weight.detach(), attn.in_proj_bias.detach()
        width = attn.embed_dim
        self.heads, self.cls_only, self.scale = attn.num_heads, cls_only, attn.head_dim**-0.5
        self.ln, self.layer_scale = block.ln_1, block.ls_1
        # of the queries, keys and values, the last without their bias
        biases = torch.cat([bias[: 2 * width], torch.zeros_like(bias[:width])])
        if cls_only:
            self.query = linear(weight[:width], biases[:width])
            self.key_value = linear(weight[width:], biases[width:])
        else:
            self.query_key_value = linear(weight, biases)
        constant = attn.out_proj.weight.detach().double() @ bias[2 * width :].double() + attn.out_proj.bias.double()
        self.out = linear(attn.out_proj.weight.detach(), constant.to(bias.dtype))

    def forward(self, stream: Tensor) -> Attended:
        """The residual stream [B, T, d] before the block."""
        normed = self.ln(stream)
        if self.cls_only:
            query = self.query(normed[:, :1])
            key, values = self.key_value(normed).chunk(2, dim=-1)
        else:
            query, key, values = self.query_key_value(normed).chunk(3, dim=-1)
        scores = self._split(query * self.scale) @ self._split(key).transpose(-1, -2)
        weights = scores.softmax(-1)
        mixed = (weights @ self._split(values)).transpose(1, 2).flatten(2)
        return Attended(self.layer_scale(self.out(mixed)), weights, values)

    def _split(self, x: Tensor) -> Tensor:
        """[B, tokens, d] -> [B, H, tokens, d / H]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """x -> x W^T + b with these very tensors, [out, in] and [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(part, requires_grad=False) for part in (weight, bias))
    return linear
