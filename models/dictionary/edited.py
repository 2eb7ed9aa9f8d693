"""The running network with some features set to their mean: the true MLPs go on.

    x_j     = ln_2(stream + attention)      of the stream *as edited below*
    z_i     = encoder i of x_i
    stream  = stream + attention + MLP j(x_j) + sum_{i <= j} (z'_i - z_i) W^{i->j}

with z' the mean activation of an edited feature, by token type, and z of every other. So only differences enter: where
nothing is edited this is the tower itself, whatever the CLT does not explain, and no edit changes nothing. An edited
feature has its mean at every token, also where it was silent, and also if edits below would have changed it.

R runs (an image, edited in one way each), L layers, T tokens, N = R * T, F features, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import which_are_cls
from vitrine.models.dictionary.sparse_products import Order, SortedCode


class Edited:
    """A tower and its CLT, and the mean activations [L, 2, F] (`models.dictionary.average`), on one device."""

    def __init__(self, tower: Tower, clt: CrossLayerTranscoder, mean: Tensor) -> None:
        self.tower, self.clt, self.mean = tower, clt, mean

    @torch.no_grad()
    def __call__(self, embedded: Tensor, edited: Tensor) -> Tensor:
        """[CLS] before ln_post [R, d], of embedded images [R, T, d] (`Tower.embed`) with the features `edited`
        [R, L, F] bool at their means."""
        stream, is_cls = embedded, which_are_cls(embedded, "all")
        written = self._means(edited)
        removed: list[SortedCode] = []  # of each layer, -z of the edited features
        for layer, decoder in enumerate(self.clt.decoders):
            stream = stream + self.tower.attention(layer, stream)
            mlp_in = self.tower.mlp_input(layer, stream)
            removed.append(_only(self.clt.encoders[layer](mlp_in.flatten(0, 1), is_cls), edited[:, layer]))
            difference = torch.stack([decoder.contribution(source, removed[source]) for source in decoder.sources]).sum(
                0
            )
            by_type = written[layer]  # [R, 2, d]
            added = torch.cat([by_type[:, :1], by_type[:, 1:].expand(-1, stream.shape[1] - 1, -1)], dim=1)
            stream = stream + self.tower.mlp_output(layer, mlp_in) + added + difference.view_as(stream)
        return stream[:, 0]

    def _means(self, edited: Tensor) -> list[Tensor]:
        """What the means of the edited features write, by target: [R, 2, d] each."""
        means = edited[:, :, None] * self.mean  # [R, L, 2, F]
        return [
            torch.stack([means[:, source] @ w for source, w in zip(decoder.sources, decoder.weights, strict=True)]).sum(
                0
            )
            for decoder in self.clt.decoders
        ]


def _only(code: SortedCode, edited: Tensor) -> SortedCode:
    """A code [N, K] of which the edited features [R, F] alone are left, with their sign changed."""
    chosen = edited.gather(1, code.indices.unflatten(0, (len(edited), -1)).flatten(1)).view_as(code.indices)
    values = torch.where(chosen, -code.values, 0)
    order = Order(code.indices, edited.shape[-1])
    order.leave_out(values == 0)
    return code._replace(values=values, order=order, used=order.pick(values))
