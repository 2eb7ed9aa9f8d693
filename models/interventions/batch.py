"""The changes of several images as the inputs of the graphs that make them (`models.bundle.layout.RERUN_INPUTS`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.layout import RERUN_INPUTS
from vitrine.models.interventions.changes import Changes

SHARED = ("layers", "indices", "places", "directions")  # the same in every image


def stacked(changes: Sequence[Changes]) -> dict[str, NDArray[Any]]:
    """The inputs, but for pixels. Raises `ValueError` unless all images have the same features and directions: what is
    changed may differ by gains, offsets and factors alone."""
    first, *others = changes
    for name in SHARED:
        if not all(np.array_equal(getattr(first, name), getattr(other, name)) for other in others):
            raise ValueError(f"images of one batch must have the same {name}")
    if any(other.dictionary != first.dictionary for other in others):
        raise ValueError("images of one batch must have features of the same dictionary")
    return {
        name: getattr(first, name) if name in SHARED else np.stack([getattr(one, name) for one in changes])
        for name in RERUN_INPUTS
    }
