"""From logits to probabilities: of labels that exclude one another, or of each label for itself.

The softmax shares out all of the probability among the labels that it is given, so that one of them comes first even
where none fits. Independent scoring asks of each label whether its cosine reaches a threshold t, whatever the others
do: 1 / (1 + exp(-s (cosine - t))), s being the CLIP's logit scale. That is SigLIP's form (arXiv 2303.15343) with -s t
as its bias; it is .5 at the threshold, and as far calibrated as the threshold was well chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger

Array = NDArray[np.floating]


class Scoring(Protocol):
    """How the logits [..., N] of N labels are compared."""

    def margins(self, logits: Array) -> Array:
        """[..., N], by which labels are ranked."""

    def probabilities(self, logits: Array) -> Array:
        """[..., N], in float64. They rank labels as the margins do."""


class Softmax:
    """CLIP's own."""

    def margins(self, logits: Array) -> Array:
        return logits

    def probabilities(self, logits: Array) -> Array:
        return ledger.probabilities(logits)


@dataclass(frozen=True)
class Independent:
    """Each label for itself. thresholds: cosines [N]; logit_scale: s."""

    thresholds: Array
    logit_scale: float

    def margins(self, logits: Array) -> Array:
        """How far each label is above its threshold, in logits: not below 0 exactly where the cosine is not."""
        return self.logit_scale * (np.asarray(logits, np.float64) / self.logit_scale - self.thresholds)

    def probabilities(self, logits: Array) -> Array:
        margins = self.margins(logits)
        small = np.exp(-np.abs(margins))  # never too large for a float
        return np.where(margins >= 0, 1, small) / (1 + small)


SOFTMAX = Softmax()
