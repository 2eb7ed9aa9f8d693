"""Predictions under an edit: by the bundle's own graphs, which are what will be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.interventions.changes import Changes, Network, resolve
from vitrine.models.interventions.direct import changed
from vitrine.models.interventions.network import BundleNetwork
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.engine.engine import Engine
from vitrine.service.offline.debias.pictures import Pictures


class Runner(Protocol):
    """Runs images with changes made."""

    @property
    def network(self) -> Network:
        """What has to be known of the bundle."""

    @property
    def modes(self) -> Sequence[Mode]:
        """Those that the bundle can do."""

    def embeddings(self, pixels: NDArray[np.float32], changes: Changes, mode: Mode) -> Array:
        """Unit embeddings [B, D] of normalised pixels [B, 3, H, W], all with the same changes."""


class BundleRunner:
    """By an engine. Raises `InterventionError` for a bundle from before interventions."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.network = engine, BundleNetwork(engine.bundle)

    @property
    def modes(self) -> Sequence[Mode]:
        return self.engine.interventions

    def embeddings(self, pixels: NDArray[np.float32], changes: Changes, mode: Mode) -> Array:
        count = len(pixels)
        if mode == "rerun":
            assert self.engine.rerun is not None
            found = self.engine.rerun.run(pixels, [changes] * count)
        else:
            plain = self.engine.explain(pixels, components=[True] * count)
            found = [changed(parts, changes, self.engine.bundle) for parts in plain]
        return np.stack([parts.embedding for parts in found])


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
