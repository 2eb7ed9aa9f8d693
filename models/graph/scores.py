"""The queries and keys of attention heads on one image, and the weights that make them, for export to ONNX.

An image's trace (`models.graph.trace`) has attention weights, not scores. This graph goes through it forward once, by
attention alone (what the MLPs wrote is in the trace), to the stream before every block, and reads the queries and keys
of the heads that are asked for there. Their weights are the directions from which `models.graph.sources` goes back. The
mathematics is in `models.account.attention_score`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrine.models.clip.tower import Tower


class ScoresGraph(nn.Module):
    """n heads and one image's trace -> their queries, keys [n, T, d / H], the rows of W_Q and W_K [n, 2, d / H, d] that
    make them of LN1's output, and the biases [n, 2, d / H].

    Inputs: layer [n], head [n]; weights [L, H, T, T], before_attention [L, T], embedded [T, d], written [L, T, d]: the
    trace.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower, self.width = tower, tower.width
        self.heads = int(tower.blocks[0].attn.num_heads)
        self.head_width = self.width // self.heads

    def forward(
        self,
        layer: Tensor,
        head: Tensor,
        weights: Tensor,
        before_attention: Tensor,
        embedded: Tensor,
        written: Tensor,
    ) -> tuple[Tensor, ...]:
        of_head = head[:, None] * self.head_width + torch.arange(self.head_width)  # [n, d / H]
        places = torch.stack([of_head, of_head + self.width], dim=1)  # [n, 2, d / H] of W_Q above W_K
        stream = embedded
        normed = stream.new_zeros(())
        rows = biases = normed
        for number, block in enumerate(self.tower.blocks):
            attn, here = block.attn, (layer == number)[:, None, None]
            read = self._normed(block.ln_1, stream, before_attention[number])
            table = attn.in_proj_weight.index_select(0, places.flatten()).view(*places.shape, self.width)
            normed = torch.where(here, read, normed)
            rows = torch.where(here[..., None], table, rows)
            biases = torch.where(here, attn.in_proj_bias.index_select(0, places.flatten()).view(places.shape), biases)
            if number < self.tower.layers - 1:
                stream = stream + self._attention(block, read, weights[number]) + written[number]
        queries, keys = ((normed @ rows[:, side].mT + biases[:, side, None]) for side in range(2))
        return queries, keys, rows, biases

    def _normed(self, ln: nn.LayerNorm, stream: Tensor, denominators: Tensor) -> Tensor:
        """A LayerNorm of the stream [T, d], by the trace's denominators [T]."""
        return (stream - stream.mean(-1, keepdim=True)) / denominators[:, None] * ln.weight + ln.bias

    def _attention(self, block: Any, normed: Tensor, weights: Tensor) -> Tensor:
        """What a block's attention adds to the stream [T, d], by the trace's weights [H, T, T]."""
        attn = block.attn
        values = F.linear(normed, attn.in_proj_weight[2 * self.width :], attn.in_proj_bias[2 * self.width :])
        by_head = values.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [H, T, d / H]
        mixed = (weights @ by_head).transpose(0, 1).flatten(1)
        return block.ls_1(F.linear(mixed, attn.out_proj.weight, attn.out_proj.bias))
