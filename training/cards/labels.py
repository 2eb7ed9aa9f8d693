"""Words for features, and when to give none.

A feature's exemplars are images; their mean embedding, weighted by activation, is compared with every word, images and
words each about their mean. What is said of the best word:

    score    mean cosine of an exemplar and the word     margin   to the runner-up
    clarity  mean cosine of two exemplars: do they show the same thing?

(The cosine of the *mean* and the word would be near 1 for any few images, in the few dimensions that images differ in.)
Any set of images has a best word, so a label is given only above three thresholds. They are the lowest for which, on
held-out images, at least `PRECISION` of the labels tell when their feature fires (`training.cards.quality`), and never
below what sets of random images reach.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrine.training.cards.quality import GOOD

PRECISION = 0.85
LEAST_LABELS = 20  # whose precision is measured, for it to mean anything
RANDOM_SETS, RANDOM_QUANTILE = 10_000, 0.999
_LEVELS = np.linspace(0, 0.9, 10)  # of features, at whose quantiles thresholds are tried


class Labels(NamedTuple):
    """The best word of each of n features."""

    word: NDArray[np.int64]  # [n] its place in the vocabulary
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    clarity: NDArray[np.float64]


class Written(NamedTuple):
    """The word that each of n directions adds most to."""

    word: NDArray[np.int64]  # [n]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]


class Thresholds(NamedTuple):
    """What a label must reach. infinity: no label is given."""

    score: float
    clarity: float
    margin: float

    def passed(self, labels: Labels) -> NDArray[np.bool_]:
        """[n]"""
        return (
            (labels.score >= self.score) & (labels.clarity >= self.clarity) & (labels.margin >= self.margin)
        )  # nan passes nothing


def describe(embeddings: Tensor, exemplars: Tensor, weights: Tensor, words: Tensor) -> Labels:
    """The best words.

    Args:
        embeddings: of all images, about their mean, then of length 1 [N, D].
        exemplars: places among them [n, K].
        weights: of each, 0 or more [n, K]; fewer than two above 0: everything is nan.
        words: `training.cards.vocabulary.embed` [V, D].
    """
    chosen = embeddings[exemplars]  # [n, K, D]
    used = (weights > 0).to(chosen.dtype)
    mean = (weights[..., None] * chosen).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-9)
    (best, second), places = _two(mean @ words.T)
    count = used.sum(1)
    together = (used[..., None] * chosen).sum(1).square().sum(-1)
    clarity = (together - count) / (count * (count - 1))  # of unit vectors: the diagonal taken out
    enough = count >= 2
    found = (torch.where(enough, part, torch.nan).double().numpy() for part in (best, best - second, clarity))
    return Labels(places.numpy(), *found)


def written(folded: Tensor, words: Tensor) -> Written:
    """What directions folded into embedding space [n, D] write: words [V, D] are about their mean, so that adding the
    same to all of them counts for nothing."""
    (best, second), places = _two(F.normalize(folded, dim=-1) @ words.T)
    return Written(places.numpy(), best.double().numpy(), (best - second).double().numpy())


def random_floor(embeddings: Tensor, weights: Tensor, words: Tensor, seed: int) -> Thresholds:
    """What `RANDOM_QUANTILE` of sets of random images stay below, in score and in clarity; weights [n, K]: of features
    that have exemplars, which the sets borrow. The margin has no floor: near words share one honestly."""
    if not len(weights):
        return Thresholds(np.inf, np.inf, 0.0)
    generator = torch.Generator().manual_seed(seed)
    borrowed = weights[torch.randint(len(weights), (RANDOM_SETS,), generator=generator)]
    sets = torch.randint(len(embeddings), borrowed.shape, generator=generator)
    found = describe(embeddings, sets, borrowed, words)
    score, clarity = (float(np.nanquantile(part, RANDOM_QUANTILE)) for part in (found.score, found.clarity))
    return Thresholds(score, clarity, 0.0)


def written_floor(fold: Tensor, words: Tensor, seed: int) -> float:
    """The score that `RANDOM_QUANTILE` of random directions in the residual stream stay below; fold [d, D]."""
    directions = torch.randn(RANDOM_SETS, len(fold), generator=torch.Generator().manual_seed(seed))
    return float(np.quantile(written(directions @ fold, words).score, RANDOM_QUANTILE))


def calibrate(labels: Labels, aurocs: NDArray[np.float64], floor: Thresholds) -> Thresholds:
    """The thresholds that label most features while `PRECISION` of the labels tell; aurocs [n], nan: not measured."""
    measured = ~np.isnan(aurocs)
    good = measured & (aurocs >= GOOD)
    tried = [
        sorted({max(least, float(value)) for value in np.nanquantile(part, _LEVELS)}) if len(part) else [np.inf]
        for part, least in zip((labels.score, labels.clarity, labels.margin), floor, strict=True)
    ]
    best, most = Thresholds(np.inf, np.inf, np.inf), 0
    for candidate in map(Thresholds._make, product(*tried)):
        passed = candidate.passed(labels)
        known = int((passed & measured).sum())
        count = int(passed.sum())
        if count > most and known >= LEAST_LABELS and (passed & good).sum() >= PRECISION * known:
            best, most = candidate, count
    return best


def _two(similarity: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((largest, second largest) of each row, place of the largest)."""
    values, places = similarity.topk(2, dim=-1)
    return (values[:, 0], values[:, 1]), places[:, 0]
