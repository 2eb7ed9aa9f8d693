"""Choosing words for features, or abstaining.

A word stands for a feature if it tells on which images the feature fires: its score is the AUROC of the cosine between
image and word, both about their means, on the exemplar images (`training.cards.quality`). The best word gets:

    score    its AUROC                          margin   its lead over the second-best word
    clarity  mean cosine of two exemplars: whether the strongest images show the same thing

Any set of images has a best word. So a label is given only above a threshold of the score: the lowest for which, on
held-out images, at least `PRECISION` of the labels tell when their feature fires; and only above what the best word
reaches by chance on as many images (`quality.chance`).

Not chosen: the word nearest to the mean of the strongest images. On photographs of a few classes no threshold of its
score, margin or clarity singles out the labels that tell (training/RESULTS.md).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vitrine.training.cards.quality import GOOD, aurocs, chance

PRECISION = 0.85
MIN_LABELS = 20  # minimum number of labels for their precision to be meaningful
RANDOM_SETS, RANDOM_QUANTILE = 10_000, 0.999
_LEVELS = np.linspace(0, 0.98, 50)  # quantiles over features that are tried as thresholds


class Labels(NamedTuple):
    """The best word of each of n features; score and margin are nan for one that fires on too few images."""

    word: NDArray[np.int64]  # [n] index into the vocabulary
    score: NDArray[np.float64]
    margin: NDArray[np.float64]
    chance: NDArray[np.float64]  # minimum score that is more than chance


class Written(NamedTuple):
    """The word that each of n directions writes most strongly."""

    word: NDArray[np.int64]  # [n]
    score: NDArray[np.float64]
    margin: NDArray[np.float64]


def describe(fires: NDArray[np.bool_], ranks: NDArray[np.float64]) -> Labels:
    """The best word of each feature.

    Args:
        fires: on which exemplar images a feature fires [N, n].
        ranks: `quality.rank_images` of the same images [N, V].
    """
    every = aurocs(fires, ranks)
    best, second = np.sort(np.partition(every, -2)[:, -2:])[:, ::-1].T
    return Labels(np.nan_to_num(every).argmax(1), best, best - second, chance(fires, ranks.shape[1]))


def clarity(embeddings: Tensor, exemplars: Tensor, weights: Tensor) -> NDArray[np.float64]:
    """Mean cosine between two exemplars of each feature [n]; nan for fewer than two.

    Args:
        embeddings: of all images, centred, then normalised to length 1 [N, D].
        exemplars: indices into them [n, K].
        weights: of the exemplars [n, K]; 0: none there.
    """
    used = (weights > 0).to(embeddings.dtype)
    count = used.sum(1)
    square = (used[..., None] * embeddings[exemplars]).sum(1).square().sum(-1)
    pairwise = (square - count) / (count * (count - 1))  # of unit vectors: without the diagonal
    return torch.where(count >= 2, pairwise, torch.nan).double().numpy()


def written(folded: Tensor, words: Tensor) -> Written:
    """The words that directions folded into embedding space [n, D] write. Words [V, D] are centred, so that a component
    common to all of them has no effect."""
    (best, second), indices = _top_two(F.normalize(folded, dim=-1) @ words.T)
    return Written(indices.numpy(), best.double().numpy(), (best - second).double().numpy())


def written_floor(fold: Tensor, words: Tensor, seed: int) -> float:
    """The `RANDOM_QUANTILE` quantile of the score over random directions in the residual stream; fold [d, D]."""
    directions = torch.randn(RANDOM_SETS, len(fold), generator=torch.Generator().manual_seed(seed))
    return float(np.quantile(written(directions @ fold, words).score, RANDOM_QUANTILE))


def given(labels: Labels, threshold: float) -> NDArray[np.bool_]:
    """Which labels reach the threshold, and more than chance [n]."""
    return (labels.score >= threshold) & (labels.score >= labels.chance)  # nan never is


def calibrate(labels: Labels, held_out: NDArray[np.float64]) -> float:
    """The lowest score for which the labels that are given have a precision of `PRECISION`; infinity if there is none.

    held_out: AUROC of the words on held-out images [n]; nan: not measured.
    """
    earned = labels.score[given(labels, 0.0)]
    for threshold in np.quantile(earned, _LEVELS) if len(earned) else ():
        checked = given(labels, threshold) & ~np.isnan(held_out)
        if checked.sum() >= MIN_LABELS and (held_out[checked] >= GOOD).sum() >= PRECISION * checked.sum():
            return float(threshold)
    return np.inf


def _top_two(similarity: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((largest, second largest) of each row, index of the largest)."""
    values, indices = similarity.topk(2, dim=-1)
    return (values[:, 0], values[:, 1]), indices[:, 0]
