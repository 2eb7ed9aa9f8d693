"""Whether a label predicts on which images its feature fires: AUROC on images not used for choosing the label.

A label's score on an image is the cosine of the two embeddings. AUROC is the probability that an image on which the
feature fires scores higher than one on which it does not: 1 is perfect, 0.5 is chance (Mann-Whitney U divided by n+ n-;
ties count half).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

GOOD = 0.8  # minimum AUROC of a good label
MIN_IMAGES = 10  # minimum number of images with and without the feature for measuring its AUROC


def rank_images(similarity: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks of the images for every word, 1 is the lowest, ties averaged: [images, V] -> [images, V]."""
    return rankdata(similarity, axis=0)


def auroc(fires: NDArray[np.bool_], ranks: NDArray[np.float64], words: NDArray[np.integer]) -> NDArray[np.float64]:
    """AUROC of each feature's word [F]; nan for too few images.

    Args:
        fires: on which images a feature fires [images, F].
        ranks: `rank_images` of the same images [images, V].
        words: each feature's word [F].
    """
    count = len(fires)
    positive = fires.sum(0)
    negative = count - positive
    sums = (fires.T.astype(np.float64) @ ranks)[np.arange(len(words)), words]
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = (sums - positive * (positive + 1) / 2) / (positive * negative)
    return np.where(np.minimum(positive, negative) >= MIN_IMAGES, areas, np.nan)


def good_share(aurocs: NDArray[np.float64]) -> float | None:
    """The share of AUROCs (without nan) of at least `GOOD`; None if there are none."""
    return float((aurocs >= GOOD).mean()) if len(aurocs) else None
