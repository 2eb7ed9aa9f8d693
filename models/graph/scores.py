"""The queries and keys of attention heads on one image, and the weights that make them, for export to ONNX.

An image's trace (`models.graph.trace`) has attention weights, not scores. This graph goes through it forward once, by
attention alone (what the MLPs wrote is in the trace), to the stream before every block, and reads the queries and keys
of the heads that are asked for there. Their weights are the directions from which `models.graph.sources` goes back. The
mathematics is in `models.account.attention_score`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrine.models.clip.attention import Attention
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
        # As in the graphs of the vision tower, whose tensors are then these.
        self.attention = nn.ModuleList(Attention(block) for block in tower.blocks)

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
        places = torch.stack([of_head, of_head + self.width], dim=1)  # [n, 2, d / H] of queries, then keys
        stream = embedded[None]
        tokens = rows = biases = stream.new_zeros(())
        attentions: Any = self.attention
        for number, attention in enumerate(attentions):
            centred = stream - stream.mean(-1, keepdim=True)
            normed = centred / before_attention[number][:, None] * attention.ln.weight + attention.ln.bias
            product = attention.query_key_value(normed)  # [1, T, 3 d]
            here = (layer == number)[:, None, None, None]
            found = product[0].index_select(1, places.flatten()).view(-1, *places.shape)  # [T, n, 2, d / H]
            tokens = torch.where(here, found.permute(1, 2, 0, 3), tokens)
            table = attention.query_key_value.weight.T.index_select(1, places.flatten())  # [d, n * 2 * d / H]
            rows = torch.where(here, table.T.view(*places.shape, self.width), rows)
            bias = attention.query_key_value.bias.index_select(0, places.flatten()).view(places.shape)
            biases = torch.where(here[..., 0], bias, biases)
            if number < self.tower.layers - 1:
                by_head = product[..., 2 * self.width :].unflatten(-1, (self.heads, -1)).transpose(1, 2)
                mixed = (weights[number] @ by_head).transpose(1, 2).flatten(2)
                stream = stream + attention.layer_scale(attention.out(mixed)) + written[number]
        return tokens[:, 0], tokens[:, 1], rows, biases
