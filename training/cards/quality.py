"""Whether a label tells the images on which its feature fires: AUROC on images that had no part in choosing it.

A label's score on an image is the cosine of the two embeddings. AUROC is the chance that an image on which the feature
fires scores higher than one on which it does not: 1 always, 0.5 a guess (Mann and Whitney's U over n+ n-; ties half).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

GOOD = 0.8  # an AUROC from which a label is said to tell
LEAST_IMAGES = 10  # on which a feature must fire, and must not fire, for its AUROC to be measured


def rank_images(similarity: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks of the images for every word, 1 the lowest, ties shared: [images, V] -> [images, V]."""
    return rankdata(similarity, axis=0)


def auroc(fires: NDArray[np.bool_], ranks: NDArray[np.float64], words: NDArray[np.integer]) -> NDArray[np.float64]:
    """AUROC of each feature's word [F]; nan with too few images.

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
        found = (sums - positive * (positive + 1) / 2) / (positive * negative)
    return np.where(np.minimum(positive, negative) >= LEAST_IMAGES, found, np.nan)


def good_share(aurocs: NDArray[np.float64]) -> float | None:
    """Of labels, all with a known AUROC, the share with `GOOD` or better; None of no labels."""
    return float((aurocs >= GOOD).mean()) if len(aurocs) else None
