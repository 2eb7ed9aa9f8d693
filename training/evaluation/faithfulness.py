"""Do the attributed layers matter? The last target layer at [CLS] is rebuilt from a subset of its source layers.

The [CLS] residual after the last block is (stream before that MLP) + (MLP output); the latter is replaced by

    b_{L-1} + sum_{i kept} c_{i->L-1}

on CLIP's true stream, and the image is classified. Dropping the best-ranked source layers tests whether they are
necessary; keeping only them tests whether they suffice (arXiv 2604.13304: drop top-1, keep top-4). Source layers are
ranked by C_{i->L-1} over the data set, at [CLS] or at all tokens (the paper's two rows; only the ranking differs, as no
other token's last MLP output reaches the prediction), or per image. Random orders are the baseline.

L layers, B images of a batch, n images in total, O orders, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vitrine.models.bootstrap import Bootstrap, Estimate
from vitrine.models.dictionary.projection import projection_scores
from vitrine.training.evaluation.cascades import divergence, is_right
from vitrine.training.evaluation.results import Curve, Faithfulness, Spread, if_known

Ranking = Literal["cls", "all"]
RANKINGS: tuple[Ranking, ...] = ("cls", "all")
RANDOM_ORDERS = 20
TOP = 4  # source layers kept in the paper's table


def ranked(scores: Tensor) -> Tensor:
    """Source layers sorted by score [..., L], largest first; ties by layer number."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def keep_masks(orders: Tensor) -> Tensor:
    """From orders of source layers [..., L], which layers are kept at k = 0 ... L: [..., L + 1, L] bool."""
    ranks = orders.argsort(dim=-1)
    return ranks[..., None, :] < torch.arange(orders.shape[-1] + 1, device=orders.device)[:, None]


class Interventions:
    """Records, per image, whether the prediction is right for each choice of source layers.

    Args:
        classify: maps [CLS] residuals [..., d] to log-probabilities of the labels [..., labels].
        bias: the last decoder's bias [d].
        rankings: per ranking, the source layers, largest C first.
        random_orders: number of random orders.
        seed: of the random orders.
    """

    def __init__(
        self,
        classify: Callable[[Tensor], Tensor],
        bias: Tensor,
        rankings: dict[Ranking, Tensor],
        random_orders: int = RANDOM_ORDERS,
        seed: int = 0,
    ) -> None:
        self.classify, self.bias, self.rankings = classify, bias, rankings
        self.layers = layers = len(next(iter(rankings.values())))
        generator = torch.Generator().manual_seed(seed)
        orders = [order.cpu() for order in rankings.values()]
        orders += [torch.randperm(layers, generator=generator) for _ in range(random_orders)]
        self._keep = keep_masks(torch.stack(orders)).to(bias.device)  # [O, L + 1, L]
        self._one = ~torch.eye(layers, dtype=torch.bool, device=bias.device)
        self._right: dict[str, list[Tensor]] = {}
        self._diverges: dict[str, list[Tensor]] = {}

    def update(self, before: Tensor, parts: Tensor, own: Tensor, truth: Tensor) -> None:
        """[CLS] stream before the last MLP [B, d], what each source layer writes there [L, B, d], CLIP's own
        log-probabilities [B, labels], label indices [B], -1: unknown."""
        by_image = keep_masks(ranked(projection_scores(parts, 0).T))  # [B, L + 1, L]
        predictions = {
            "keep": self._predictions(before, parts, self._keep),
            "drop": self._predictions(before, parts, ~self._keep),
            "one": self._predictions(before, parts, self._one),
            "image_keep": self._per_image(before, parts, by_image),
            "image_drop": self._per_image(before, parts, ~by_image),
        }
        for name, predicted in predictions.items():  # [..., B, labels]
            right = is_right(predicted.argmax(-1), truth.to(predicted.device))
            self._right.setdefault(name, []).append(right.movedim(-1, 0).float().cpu())
            self._diverges.setdefault(name, []).append(divergence(own, predicted).movedim(-1, 0).float().cpu())

    def right(self, name: str) -> Tensor:
        """Whether each image's prediction is right, or NaN: `keep`, `drop` [n, O, L + 1], `one` [n, L], `image_keep`,
        `image_drop` [n, L + 1].

        O: the rankings in their order, then the random orders.
        """
        return torch.cat(self._right[name]).double()

    def diverges(self, name: str) -> Tensor:
        """Each image's divergence from CLIP's own distribution; names and shapes as in `right`."""
        return torch.cat(self._diverges[name]).double()

    def _predictions(self, before: Tensor, parts: Tensor, kept: Tensor) -> Tensor:
        """Predictions when every image keeps the same layers [..., L]: [..., B, labels]."""
        return self.classify(before + self.bias + torch.einsum("...l,lbd->...bd", kept.to(parts.dtype), parts))

    def _per_image(self, before: Tensor, parts: Tensor, kept: Tensor) -> Tensor:
        """Predictions when each image keeps its own layers [B, K, L]: [K, B, labels]."""
        return self.classify(before + self.bias + torch.einsum("bkl,lbd->kbd", kept.to(parts.dtype), parts))

    def figures(self, bootstrap: Bootstrap, clip_right: Tensor) -> Faithfulness:
        """All curves; `clip_right` [n]: whether CLIP's own prediction is right, NaN where that is not known."""
        keep, drop, own = self.right("keep"), self.right("drop"), clip_right.double()[:, None]
        keep_kl, drop_kl = self.diverges("keep").mean(0), self.diverges("drop").mean(0)  # [O, L + 1]
        curves = []
        for at, (name, order) in enumerate(self.rankings.items()):
            kl = keep_kl[at], drop_kl[at]
            curves.append(self._curve(name, order.tolist(), keep[:, at], drop[:, at], kl, bootstrap, own))
        kl = self.diverges("image_keep").mean(0), self.diverges("image_drop").mean(0)
        image = self.right("image_keep"), self.right("image_drop")
        curves.append(self._curve("image", None, *image, kl, bootstrap, own))
        first, without_one = len(self.rankings), self.right("one")
        return Faithfulness(
            curves=curves,
            random_orders=keep.shape[1] - first,
            random_keep=_spreads(keep[:, first:].mean(0)),
            random_drop=_spreads(drop[:, first:].mean(0)),
            random_keep_divergence=_spreads(keep_kl[first:]),
            random_drop_divergence=_spreads(drop_kl[first:]),
            drop_one=_known(bootstrap.estimates(without_one.numpy())) or [],
            drop_one_mean=if_known(bootstrap.estimate(without_one.mean(1).numpy())),
            drop_one_divergence=self.diverges("one").mean(0).tolist(),
        )

    def _curve(
        self,
        ranking: Literal["cls", "all", "image"],
        order: list[int] | None,
        keep: Tensor,
        drop: Tensor,
        divergences: tuple[Tensor, Tensor],
        bootstrap: Bootstrap,
        own: Tensor,
    ) -> Curve:
        """keep, drop: right or wrong [n, L + 1]; mean divergences [L + 1]; own: whether CLIP itself is right [n, 1]."""
        changes = torch.stack([keep[:, min(TOP, self.layers)], drop[:, 1]], dim=1) - own
        keep_top4, drop_top1 = bootstrap.estimates(changes.numpy())
        return Curve(
            ranking=ranking,
            order=order,
            keep=_known(bootstrap.estimates(keep.numpy())),
            drop=_known(bootstrap.estimates(drop.numpy())),
            keep_divergence=divergences[0].tolist(),
            drop_divergence=divergences[1].tolist(),
            keep_top4=if_known(keep_top4),
            drop_top1=if_known(drop_top1),
        )


def _known(estimates: list[Estimate]) -> list[Estimate] | None:
    return None if any(if_known(estimate) is None for estimate in estimates) else estimates


def _spreads(figures: Tensor) -> list[Spread]:
    """The spread over random orders [O, L + 1], for each k; empty without random orders, and without classes."""
    if not len(figures) or figures.isnan().any():
        return []
    return [
        Spread(
            mean=column.mean().item(),
            deviation=column.std(unbiased=False).item(),
            lowest=column.min().item(),
            highest=column.max().item(),
        )
        for column in figures.T
    ]
