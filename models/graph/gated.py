"""Directions followed back through whole blocks, MLPs included, for export to ONNX: LibraGrad (arXiv 2509.17401).

Held fast are a LayerNorm's denominators (its mean is not), attention's weights and the gates of the MLP: the activation
is h gate(h), with gate (1 + erf(h / sqrt 2)) / 2 for GELU and sigmoid(1.702 h) for QuickGELU. A block is then affine in
the stream. With G [n, T, d] the gradient at the stream after it, ' transposed, S1 and S2 its LayerScales,

    before the MLP        G' = G  + LN2' (((G S2 V) * gates) W)          W [M, d], V [d, M] the MLP's weights
    before attention      G  = G' + LN1' sum_h A_h' (G' S1 W_O^h W_V^h)

and what it adds whatever it reads, biases and beta, is a constant of each direction. So a number u . x_L of the stream
after the last block is, exactly, at every depth l,

    sum over tokens <x_l, G_l>  +  constants of blocks l, l + 1, ..., L - 1.

This needs no dictionary. What SAEs make of it: `models.graph.residual`.

L layers, T tokens, d width, H heads, M hidden neurons. Of one image, held fast takes L (H T T + T M + 2 T) numbers: at
B/16 51 MB in float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import constant
from vitrine.models.clip.tower import Tower, UnsupportedTower
from vitrine.models.graph.back import through_attention, through_heads, through_norm


class Held(NamedTuple):
    """What one block computed from the image. All may lead with a batch: then of n = B directions each has an image."""

    weights: Tensor  # [H, T, T] of attention
    before_attention: Tensor  # [T] LN1's denominators
    before_mlp: Tensor  # [T] LN2's
    gates: Tensor  # [T, M]


class Spread(NamedTuple):
    """Gradients at all tokens that came from one token each: the sum over H + 1 ways, the heads and straight on, of a
    direction times a share of each token. What has no use for [n, T, d] goes through fewer products."""

    directions: Tensor  # [H + 1, n, d]
    shares: Tensor  # [H + 1, n, T]

    def dense(self) -> Tensor:
        """[n, T, d]"""
        return self.shares.permute(1, 2, 0) @ self.directions.transpose(0, 1)


def gates(activation: nn.Module, hidden: Tensor) -> Tensor:
    """An activation's gates, activation(h) / h, also where h = 0. Raises `UnsupportedTower`."""
    kind = type(activation).__name__
    if isinstance(activation, nn.GELU):
        if activation.approximate == "tanh":
            return (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))) / 2
        return (1 + torch.erf(hidden / math.sqrt(2))) / 2
    if kind == "QuickGELU":
        return torch.sigmoid(1.702 * hidden)
    raise UnsupportedTower(
        f"MLPs with {kind} have no gates to hold constant; only MLPs with GELU or QuickGELU have them"
    )


class GatedBlock(nn.Module):
    """One block backward."""

    attention_constant: Tensor  # [d] what attention adds to every token
    read_constant: Tensor  # [M] what the hidden neurons read whatever the stream is
    write_constant: Tensor  # [d] what the MLP adds to every token

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        read, write = block.mlp.c_fc, block.mlp.c_proj
        added = constant(block.attn, block.ln_1.bias).to(write.bias)
        self.register_buffer("attention_constant", block.ls_1(added).detach())
        self.register_buffer("read_constant", (read.bias + read.weight @ block.ln_2.bias).detach())
        self.register_buffer("write_constant", block.ls_2(write.bias).detach())

    def forward(self, gradient: Tensor, held: Held) -> tuple[Tensor, Tensor]:
        """The gradient [n, T, d] at the stream after the block -> (that before it, constants [n])."""
        gradient, read = self._mlp(gradient, held.gates, held.before_mlp)
        total = gradient.sum(1)
        normed = through_attention(self.block, gradient, held.weights)
        gradient = gradient + through_norm(self.block.ln_1, normed, held.before_attention)
        return gradient, read.sum(1) + total @ self.attention_constant

    def of_one(self, gradient: Tensor, token: Tensor, held: Held) -> tuple[Spread, Tensor]:
        """The same for gradients [n, d] that start at one token [n] each, in one image."""
        at_token = (held.gates.index_select(0, token), held.before_mlp.index_select(0, token))
        gradient, read = self._mlp(gradient, *at_token)
        by_head = through_heads(self.block, gradient, len(held.weights)) * self.block.ln_1.weight
        by_head = by_head - by_head.mean(-1, keepdim=True)  # LN1, but for its denominators
        weights = held.weights.index_select(1, token) / held.before_attention
        at = torch.arange(held.weights.shape[-1], device=token.device) == token[:, None]  # [n, T]
        shares = torch.cat([weights, at[None].to(weights.dtype)])
        return Spread(torch.cat([by_head, gradient[None]]), shares), read + gradient @ self.attention_constant

    def _mlp(self, gradient: Tensor, gates: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients [..., d] through the MLP: (those before it, constants [...])."""
        mlp, ln = self.block.mlp, self.block.ln_2
        hidden = self.block.ls_2(gradient) @ mlp.c_proj.weight * gates
        constants = hidden @ self.read_constant + gradient @ self.write_constant
        return gradient + through_norm(ln, hidden @ mlp.c_fc.weight, denominators), constants


class GatedSourcesGraph(nn.Module):
    """n directions after the last block at [CLS] [n, d], and one image's trace (`models.graph.gated_trace`), back
    through all blocks -> contributions of every token at every depth [n, L, T], the embeddings first, and constants of
    every block [n, L].

    With few directions the last block costs one token's, the others n times a block's MLP and half its attention.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(GatedBlock, tower.blocks))

    def forward(
        self,
        direction: Tensor,
        weights: Tensor,
        before_attention: Tensor,
        before_mlp: Tensor,
        gates: Tensor,
        streams: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """weights [L, H, T, T], before_attention, before_mlp [L, T], gates [L, T, M], streams [L, T, d] before each
        block."""
        contributions, constants = [], []
        gradient = direction
        for layer in reversed(range(len(self.blocks))):
            block: Any = self.blocks[layer]
            held = Held(weights[layer], before_attention[layer], before_mlp[layer], gates[layer])
            if layer == len(self.blocks) - 1:
                spread, added = block.of_one(direction, torch.zeros_like(direction[:, 0], dtype=torch.int64), held)
                gradient = spread.dense()
            else:
                gradient, added = block(gradient, held)
            contributions.append((streams[layer] * gradient).sum(-1))
            constants.append(added)
        return torch.stack(contributions[::-1], dim=1), torch.stack(constants[::-1], dim=1)
