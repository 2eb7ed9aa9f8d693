"""Choosing words for features, or abstaining.

A feature's exemplars are images; their mean embedding, weighted by activation, is compared with every word, with the
mean of the images and of the words subtracted. Each best word gets:

    score    mean cosine of an exemplar and the word     margin   to the second-best word
    clarity  mean cosine of two exemplars: whether they show the same thing

(The cosine of the *mean* and the word would be near 1 for any few images, because images differ in few dimensions.)
Any set of images has a best word, so a label is given only above three thresholds. They are the lowest for which, on
held-out images, at least `PRECISION` of the labels predict when their feature fires (`training.cards.quality`), and are
never below the values of random sets of images.
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
MIN_LABELS = 20  # minimum number of labels for their precision to be meaningful
RANDOM_SETS, RANDOM_QUANTILE = 10_000, 0.999
_LEVELS = np.linspace(0, 0.9, 10)  # quantiles over features that are tried as thresholds


class Labels(NamedTuple):
    """The best word of each of n features."""

    word: NDArray[np.int64]  # [n] index into the vocabulary
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    clarity: NDArray[np.float64]


class Written(NamedTuple):
    """The word that each of n directions writes most strongly."""

    word: NDArray[np.int64]  # [n]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]


class Thresholds(NamedTuple):
    """Minimum values for a label. Infinity: no label is given."""

    score: float
    clarity: float
    margin: float

    def passed(self, labels: Labels) -> NDArray[np.bool_]:
        """Which labels reach the thresholds [n]."""
        return (
            (labels.score >= self.score) & (labels.clarity >= self.clarity) & (labels.margin >= self.margin)
        )  # nan never passes


def describe(embeddings: Tensor, exemplars: Tensor, weights: Tensor, words: Tensor) -> Labels:
    """The best word of each feature.

    Args:
        embeddings: of all images, centred, then normalised to length 1 [N, D].
        exemplars: indices into them [n, K].
        weights: of the exemplars, non-negative [n, K]; with fewer than two above 0 all figures are nan.
        words: embeddings from `training.cards.vocabulary.embed` [V, D].
    """
    selected = embeddings[exemplars]  # [n, K, D]
    used = (weights > 0).to(selected.dtype)
    mean = (weights[..., None] * selected).sum(1) / weights.sum(1, keepdim=True).clamp_min(1e-9)
    (best, second), indices = _top_two(mean @ words.T)
    count = used.sum(1)
    pairwise = (used[..., None] * selected).sum(1).square().sum(-1)
    clarity = (pairwise - count) / (count * (count - 1))  # of unit vectors: without the diagonal
    enough = count >= 2
    figures = (torch.where(enough, part, torch.nan).double().numpy() for part in (best, best - second, clarity))
    return Labels(indices.numpy(), *figures)


def written(folded: Tensor, words: Tensor) -> Written:
    """The words that directions folded into embedding space [n, D] write. Words [V, D] are centred, so that a component
    common to all of them has no effect."""
    (best, second), indices = _top_two(F.normalize(folded, dim=-1) @ words.T)
    return Written(indices.numpy(), best.double().numpy(), (best - second).double().numpy())


def random_floor(embeddings: Tensor, weights: Tensor, words: Tensor, seed: int) -> Thresholds:
    """The `RANDOM_QUANTILE` quantile of score and clarity over random sets of images. The sets reuse weights [n, K] of
    features with exemplars. The margin has no floor: similar words legitimately have a small margin."""
    if not len(weights):
        return Thresholds(np.inf, np.inf, 0.0)
    generator = torch.Generator().manual_seed(seed)
    sampled = weights[torch.randint(len(weights), (RANDOM_SETS,), generator=generator)]
    sets = torch.randint(len(embeddings), sampled.shape, generator=generator)
    labels = describe(embeddings, sets, sampled, words)
    score, clarity = (float(np.nanquantile(part, RANDOM_QUANTILE)) for part in (labels.score, labels.clarity))
    return Thresholds(score, clarity, 0.0)


def written_floor(fold: Tensor, words: Tensor, seed: int) -> float:
    """The `RANDOM_QUANTILE` quantile of the score over random directions in the residual stream; fold [d, D]."""
    directions = torch.randn(RANDOM_SETS, len(fold), generator=torch.Generator().manual_seed(seed))
    return float(np.quantile(written(directions @ fold, words).score, RANDOM_QUANTILE))


def calibrate(labels: Labels, aurocs: NDArray[np.float64], floor: Thresholds) -> Thresholds:
    """The thresholds that label most features with a precision of `PRECISION`; aurocs [n], nan: not measured."""
    measured = ~np.isnan(aurocs)
    good = measured & (aurocs >= GOOD)
    candidates = [
        sorted({max(minimum, float(value)) for value in np.nanquantile(part, _LEVELS)}) if len(part) else [np.inf]
        for part, minimum in zip((labels.score, labels.clarity, labels.margin), floor, strict=True)
    ]
    best, most = Thresholds(np.inf, np.inf, np.inf), 0
    for candidate in map(Thresholds._make, product(*candidates)):
        passed = candidate.passed(labels)
        measured_count = int((passed & measured).sum())
        count = int(passed.sum())
        if count > most and measured_count >= MIN_LABELS and (passed & good).sum() >= PRECISION * measured_count:
            best, most = candidate, count
    return best


def _top_two(similarity: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((largest, second largest) of each row, index of the largest)."""
    values, indices = similarity.topk(2, dim=-1)
    return (values[:, 0], values[:, 1]), indices[:, 0]
