"""Predictions under an edit: by the bundle's own graphs, which are what will be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.interventions.changes import Changes, Network, resolve
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.offline.debias.pictures import Pictures


class Runner(Protocol):
    """Runs images with changes made."""

    network: Network
    modes: tuple[Mode, ...]  # that this bundle can do

    def embeddings(self, pixels: NDArray[np.float32], changes: Changes, mode: Mode) -> Array:
        """Unit embeddings [B, D] of normalised pixels [B, 3, H, W], all with the same changes."""


def edited(
    runner: Runner,
    pictures: Pictures,
    images: Sequence[str],
    interventions: Sequence[Intervention],
    mode: Mode,
    batch: int,
) -> Array:
    """Unit embeddings [n, D] of images under an edit. Raises `InterventionError` for what this bundle has not."""
    changes = resolve(interventions, runner.network, mode)
    return np.concatenate([runner.embeddings(pixels, changes, mode) for pixels in pictures.batches(images, batch)])
