"""How well words tell on which images features fire: AUROC.

A word's score on an image is the cosine of the two embeddings. AUROC is the probability that an image on which the
feature fires scores higher than one on which it does not: 1 is perfect, 0.5 is chance (Mann-Whitney U divided by n+ n-;
ties count half).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

GOOD = 0.8  # minimum AUROC of a good label
MIN_IMAGES = 10  # minimum number of images with and without the feature for measuring its AUROC
CHANCE = 1e-3  # that a feature without any meaning gets a word that is this good


def rank_images(similarity: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks of the images for every word, 1 is the lowest, ties averaged: [images, V] -> [images, V]."""
    return rankdata(similarity, axis=0)


def aurocs(fires: NDArray[np.bool_], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC of every word for every feature [F, V]; nan for a feature that fires on too few images, or on too many.

    Args:
        fires: on which images a feature fires [images, F].
        ranks: `rank_images` of the same images [images, V].
    """
    count = len(fires)
    positive = fires.sum(0)[:, None]
    negative = count - positive
    sums = fires.T.astype(np.float64) @ ranks
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = (sums - positive * (positive + 1) / 2) / (positive * negative)
    return np.where(np.minimum(positive, negative) >= MIN_IMAGES, areas, np.nan)


def chance(fires: NDArray[np.bool_], words: int) -> NDArray[np.float64]:
    """What the best of `words` words reaches on a random set of images as large as a feature's with a probability of
    `CHANCE` at most [F]; fires as in `aurocs`.

    The AUROC of random images is normal about 1/2 with variance (n + 1) / (12 n+ n-) (Mann and Whitney 1947); the bound
    is Bonferroni's.
    """
    positive = fires.sum(0)
    with np.errstate(divide="ignore"):
        deviation = np.sqrt((len(fires) + 1) / (12 * positive * (len(fires) - positive)))
    return 0.5 + norm.isf(CHANCE / words) * deviation


def good_share(aurocs: NDArray[np.float64]) -> float | None:
    """The share of AUROCs (without nan) of at least `GOOD`; None if there are none."""
    return float((aurocs >= GOOD).mean()) if len(aurocs) else None
