"""Which features of a picture made a prediction: rankings of its nodes, to be tried in the running network.

A node is a feature (layer, index) over all tokens of one image, in the last layer at [CLS] alone, which is read there.
The target is a logit, or a difference of logits. The rankings, the largest score first:

    sources_mean     what its mean activation in its place takes away, by the source account: sum of (z - mean z) <W, G>
    sources          its part of the source account: sum of z <W, G> (`models.account.sources`)
    direct           its part of the ledger: what it writes at [CLS], straight to the logit
    gradient         gradient x activation: the true gradient, through MLPs, attention and norms, in place of G
    activation       its activation, summed over tokens
    random           a random number

L layers, T tokens, N tokens of an image, F features, d width, D embedding size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.sparse_products import Order, SortedCode
from vitrine.models.graph.vision import denominator
from vitrine.training.evaluation.gradients import written_gradients

NodeRanking = Literal["sources_mean", "sources", "direct", "gradient", "activation", "random"]
NODE_RANKINGS: tuple[NodeRanking, ...] = ("sources_mean", "sources", "direct", "gradient", "activation", "random")


class Rankings:
    """Scores the nodes of images.

    Args:
        clip, clt: on the same device; the CLT on raw activations, in evaluation mode.
        mean: mean activations [L, 2, F] at [CLS] and over patches, on that device.
        seed: of the random ranking.
    """

    def __init__(self, clip: Clip, clt: CrossLayerTranscoder, mean: Tensor, seed: int) -> None:
        self.clip, self.tower, self.clt, self.mean = clip, clip.tower, clt, mean
        self._fold = self.tower.fold()[0].to(mean)
        self._directions = clt.directions()  # [L, F, d]
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, pixels: Tensor, direction: Tensor) -> tuple[dict[NodeRanking, Tensor], Tensor]:
        """(scores [L, F] by ranking, which nodes are active [L, F] bool) of one image [1, 3, H, W], for the logit of a
        direction in embedding space [D]."""
        tower, scaled = self.tower, direction * self.clip.logit_scale

        def logit(residual: Tensor) -> Tensor:
            return torch.nn.functional.normalize(tower.head(residual), dim=-1) @ scaled

        def held_logit(residual: Tensor) -> Tensor:
            return residual @ self._straight(residual.detach(), scaled)

        mlp_in, held, residual = written_gradients(tower, pixels, held_logit, held=True)
        true = written_gradients(tower, pixels, logit, held=False).gradients
        with torch.no_grad():
            is_cls = torch.arange(tower.tokens, device=pixels.device) == 0
            *codes, last = self.clt.encode(mlp_in[:, 0], is_cls)
            codes.append(last._replace(values=last.values * is_cls[:, None]))  # nothing reads the last patches
            dense = torch.stack([_by_feature(code.indices, code.values, self.clt.features) for code in codes])
            at_cls = torch.stack([_by_feature(code.indices[:1], code.values[:1], self.clt.features) for code in codes])
            sources = self._inner(codes, held[:, 0])
            by_type = torch.stack([held[:, 0, 0], held[:, 0, 1:].sum(1)], dim=1)  # [L, 2, d]
            scores: dict[NodeRanking, Tensor] = {
                "sources_mean": sources - self._of_means(by_type),
                "sources": sources,
                "direct": at_cls * (self._directions @ self._straight(residual, scaled)),
                "gradient": self._inner(codes, true[:, 0]),
                "activation": dense,
                "random": torch.rand(dense.shape, generator=self._generator).to(dense),
            }
            active = [_by_feature(code.indices, (code.values != 0).float(), self.clt.features) > 0 for code in codes]
        return scores, torch.stack(active)

    def _straight(self, residual: Tensor, scaled: Tensor) -> Tensor:
        """The direction of a logit in residual space [d], with ln_post's denominator and |z| of [CLS] [1, d] fast."""
        norm = self.tower.head(residual).norm() * denominator(residual, self.tower.visual.ln_post)
        return self._fold @ scaled / norm

    def _inner(self, codes: list[SortedCode], gradients: Tensor) -> Tensor:
        """sum over tokens of z <W, G> of every feature [L, F], for gradients at what was written [L, N, d]."""
        orders = [Order(code.indices, self.clt.features) for code in codes]
        products = [torch.zeros_like(code.values) for code in codes]  # <W, G> at each place
        for target, decoder in enumerate(self.clt.decoders):
            for source, weight in zip(decoder.sources, decoder.weights, strict=True):
                products[source] += orders[source].products(gradients[target], weight).view_as(products[source])
        return torch.stack(
            [
                _by_feature(code.indices, code.values * part, self.clt.features)
                for code, part in zip(codes, products, strict=True)
            ]
        )

    def _of_means(self, by_type: Tensor) -> Tensor:
        """The same of the mean activations at every token [L, F], for gradients summed by token type [L, 2, d]."""
        scores = torch.zeros_like(self.mean[:, 0])
        for target, decoder in enumerate(self.clt.decoders):
            for source, weight in zip(decoder.sources, decoder.weights, strict=True):
                scores[source] += (self.mean[source] * (by_type[target] @ weight.T)).sum(0)
        return scores


def _by_feature(indices: Tensor, values: Tensor, features: int) -> Tensor:
    """Values of a code's places [N, K], summed by feature: [F]."""
    return values.new_zeros(features).index_add_(0, indices.flatten(), values.flatten())
