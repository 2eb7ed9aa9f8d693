"""Groups where no table has them: by a cue in words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array

RARE = 0.1  # of a label's images: a threshold that leaves fewer on one side tells the label, not the cue


def in_words(embeddings: Array, labels: NDArray[np.int64], cue: Array, others: Array) -> NDArray[np.bool_]:
    """[n] which images have a cue, by their unit embeddings [n, D] and those of its prompts [m, D].

    others [k, D]: prompts of what is there instead. The score is the difference of mean similarities. Its threshold is
    Otsu's over all images, so that a label may have the cue more often than another; where that leaves nearly none of a
    label's images on one side, it is the label's median.
    """
    scores = embeddings @ (cue.mean(0) - others.mean(0))
    has_cue = scores > otsu(scores)
    for label in np.unique(labels):
        members = labels == label
        if not RARE <= has_cue[members].mean() <= 1 - RARE:
            has_cue[members] = scores[members] > np.median(scores[members])
    return has_cue


def otsu(values: Array) -> float:
    """The threshold between the two clusters of numbers that differ most (Otsu, 1979)."""
    ordered = np.sort(values.astype(np.float64))
    count = np.arange(1, len(ordered))
    below = np.cumsum(ordered)[:-1]
    means = below / count, (ordered.sum() - below) / (len(ordered) - count)
    between = count * (len(ordered) - count) * (means[1] - means[0]) ** 2
    place = int(between.argmax())
    return float(ordered[place] + ordered[place + 1]) / 2
