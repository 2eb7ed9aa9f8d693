"""Gradients of a logit at what every MLP wrote: the true ones, and those of the source account.

In the source account (`models.account.sources`) this image's attention weights and the denominators of its LayerNorms
are held fast and no MLP runs backward. Here that is autograd with these detached, for any device and many images; the
service runs the same pass as a graph (`models.graph.sources`).

L layers, B images, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention
from vitrine.models.clip.tower import Tower
from vitrine.models.graph.vision import denominator


class Backward(NamedTuple):
    """One pass forward and back."""

    mlp_in: Tensor  # [L, B, T, d] what the MLPs, and the encoders, read
    gradients: Tensor  # [L, B, T, d] of the target, at what the MLPs wrote
    residual: Tensor  # [B, d] [CLS] before ln_post


@torch.enable_grad()
def written_gradients(tower: Tower, pixels: Tensor, target: Callable[[Tensor], Tensor], *, held: bool) -> Backward:
    """Of normalised pixels [B, 3, H, W].

    Args:
        target: maps [CLS] before ln_post [B, d] to a number for each image [B].
        held: hold attention weights, LayerNorms' denominators and MLPs fast; the target must do so with ln_post itself.
    """
    stream = tower.embed(pixels).detach().requires_grad_()
    mlp_ins, streams = [], []
    for layer, block in enumerate(tower.blocks):
        stream = stream + (_held_attention(block, stream) if held else tower.attention(layer, stream))
        mlp_in, mlp_out = tower.mlp(layer, stream)
        stream = stream + (mlp_out.detach() if held else mlp_out)
        mlp_ins.append(mlp_in.detach())
        streams.append(stream)
    gradients = torch.autograd.grad(target(stream[:, 0]).sum(), streams)
    return Backward(torch.stack(mlp_ins), torch.stack(gradients), stream[:, 0].detach())


def _held_attention(block: Any, stream: Tensor) -> Tensor:
    """What a block's attention adds [B, T, d], its weights and LN1's denominators held fast."""
    attention = Attention(block)
    with torch.no_grad():
        weights = attention(stream).weights
    values = attention.query_key_value(_held_norm(stream, block.ln_1)).chunk(3, dim=-1)[2]
    return attention.mixed(weights, values)


def _held_norm(stream: Tensor, ln: nn.LayerNorm) -> Tensor:
    centred = stream - stream.mean(-1, keepdim=True)
    return centred / denominator(stream, ln).detach()[..., None] * ln.weight + ln.bias
