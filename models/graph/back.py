"""One step back through a part of a block, for n directions at once, with what the part computed from the image held
fast: a LayerNorm's denominators, and attention's weights. No autograd, so that it can be exported to ONNX.

Tensors of the image may lead with a batch: then the n directions are one for each image.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def through_norm(ln: nn.LayerNorm, gradient: Tensor, denominators: Tensor) -> Tensor:
    """From the gradient at a LayerNorm's output [n, T, d] to that at its input; denominators [T]."""
    scaled = gradient * ln.weight
    return (scaled - scaled.mean(-1, keepdim=True)) / denominators[..., None]


def through_attention(block: Any, gradient: Tensor, weights: Tensor) -> Tensor:
    """From the gradient at what a block's attention adds [n, T, d] to that at LN1's output, through the values:
    weights [H, T, T]."""
    mixed, values = _products(block, gradient)
    by_head = mixed.unflatten(-1, (weights.shape[-3], -1)).transpose(1, 2)  # [n, H, T, d / H]
    return (weights.transpose(-1, -2) @ by_head).transpose(1, 2).flatten(2) @ values


def through_attention_of_one(block: Any, gradient: Tensor, weights: Tensor) -> Tensor:
    """The same for gradients at one token each [n, d], with that token's weights [H, n, T]: with few directions, a
    product less than of all tokens."""
    return weights.permute(1, 2, 0) @ through_heads(block, gradient, len(weights)).transpose(0, 1)


def through_heads(block: Any, gradient: Tensor, heads: int) -> Tensor:
    """From gradients at one token each [n, d] to what each head brings to the tokens it attends to, for a weight of 1
    [H, n, d]."""
    mixed, values = _products(block, gradient)
    return mixed.unflatten(-1, (heads, -1)).transpose(0, 1) @ values.unflatten(0, (heads, -1))


def _products(block: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(the gradient [..., d] through LayerScale and the output's weights, the weights of the values [d, d])."""
    attn = block.attn
    return block.ls_1(gradient) @ attn.out_proj.weight, attn.in_proj_weight[2 * attn.embed_dim :]
