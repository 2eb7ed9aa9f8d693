"""Predictions under an edit: by the bundle's own graphs, which are what will be served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array, Decomposition
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

    def plain(self, pixels: NDArray[np.float32]) -> tuple[Array, Array]:
        """(unit embeddings [B, D], the stream at [CLS] after the last block [B, d]) without changes."""


class BundleRunner:
    """By an engine. Raises `InterventionError` for a bundle from before interventions."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.network = engine, BundleNetwork(engine.bundle)

    @property
    def modes(self) -> Sequence[Mode]:
        return self.engine.interventions

    def embeddings(self, pixels: NDArray[np.float32], changes: Changes, mode: Mode) -> Array:
        if mode == "rerun":
            assert self.engine.rerun is not None
            found = self.engine.rerun.run(pixels, [changes] * len(pixels))
        else:
            found = [changed(parts, changes, self.engine.bundle) for parts in self._explained(pixels)]
        return np.stack([parts.embedding for parts in found])

    def plain(self, pixels: NDArray[np.float32]) -> tuple[Array, Array]:
        """Embeddings, and streams as the sum of the ledger's rows before they are folded."""
        found, streams = self._explained(pixels), []
        for parts in found:
            assert parts.components is not None
            streams.append(parts.components.astype(np.float64).sum(0))
        return np.stack([parts.embedding for parts in found]), np.stack(streams)

    def _explained(self, pixels: NDArray[np.float32]) -> list[Decomposition]:
        return self.engine.explain(pixels, components=[True] * len(pixels))


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
