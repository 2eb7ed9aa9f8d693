"""To which images a conditional edit is applied, where that is said of predictions with and without it. numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitrine.models.interventions.edit import Condition

Array = NDArray[np.floating]


def moved(before: Array, after: Array) -> Array:
    """[n] by how much the lead of the plain top-1 over its runner-up changes; logits [n, N] without the edit and with
    it. 0 where there is one label."""
    order = np.argsort(-before, axis=1, kind="stable")[:, :2]
    leads = [np.take_along_axis(part, order, 1) for part in (before, after)]
    was, now = (lead[:, 0] - lead[:, -1] for lead in leads)
    difference: Array = np.abs(now - was)
    return difference


def applied(condition: Condition, before: Array, after: Array) -> NDArray[np.bool_]:
    """[n] which images the edit is applied to; the condition is one that `compares`."""
    if condition.moves_logit is not None:
        far: NDArray[np.bool_] = moved(before, after) >= condition.moves_logit
        return far
    other: NDArray[np.bool_] = before.argmax(-1) != after.argmax(-1)
    return other
