"""Groups where nobody says what the cue is: by the features that move the errors.

Take the prediction for the group. Then the group effect b (`ranking`) is how many logits more a feature gives where the
first label is predicted, among images of one label; and the label effect a is how many more where the first label is
right, among images predicted alike. Features of the label itself have both of one sign. A cue that the CLIP takes for
the label argues for the prediction, and yet among images predicted alike it is rather found with the other label: that
is why these were mistaken for it. So features are ranked by -sign(b) a, and

    s = sum over the first of them of sign(b) * contribution

parts the images of each label, by Otsu's threshold, into those with the cue and those without. It needs images in which
the cue does not go with the label as often as the CLIP takes it to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.service.offline.debias.contributions import Contributions
from vitrine.service.offline.debias.cue import otsu
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.ranking import effects

FEATURES = 10  # that part the images


@dataclass(frozen=True)
class CueScore:
    """What parts the images of two labels, as learnt on the finding half."""

    keys: NDArray[np.int64]
    signs: Array
    thresholds: Array  # [2] of the second label, the first

    def has_cue(self, contributions: Contributions, is_first: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[n] of images of these labels."""
        sums = _sums(contributions, self.keys, self.signs)
        has: NDArray[np.bool_] = sums > self.thresholds[is_first.astype(int)]
        return has


def by_errors(
    contributions: Contributions, is_first: NDArray[np.bool_], predicted_first: NDArray[np.bool_]
) -> CueScore:
    """From the finding half's images of two labels [n]. Raises `DebiasError` if they do not tell."""
    right = is_first == predicted_first
    if not any(right[is_first == label].any() and not right[is_first == label].all() for label in (False, True)):
        raise DebiasError(
            f"the {len(right):,} images of two labels are, for each label, all right or all wrong, which does not "
            "show what causes the errors; give groups (--groups), or the cue in words (--cue)"
        )
    found = effects(contributions, is_first, predicted_first)
    signs = np.sign(found.group)
    against = -signs * found.label
    keys = np.argsort(-against, kind="stable")[:FEATURES]
    keys = keys[against[keys] > 0]
    if not len(keys):
        raise DebiasError("no feature agrees with the prediction and not with the label, so no cue causes the errors")
    sums = _sums(contributions, keys, signs[keys])
    thresholds = np.array([otsu(sums[is_first == label]) for label in (False, True)])
    return CueScore(keys, signs[keys], thresholds)


def _sums(contributions: Contributions, keys: NDArray[np.int64], signs: Array) -> Array:
    sums: Array = contributions.dense(keys) @ signs
    return sums
