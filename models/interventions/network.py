"""What interventions have to know of a bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Dictionary


class BundleNetwork:
    """A `Network` of an opened bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, shape = bundle, bundle.manifest.shape
        self.layers, self.tokens, self.width = shape.layers, shape.tokens, shape.width
        self.heads = 1

    def features(self, dictionary: Dictionary, layer: int) -> int:
        """How many features a layer of a dictionary has; 0: it has no such layer."""
        manifest = self.bundle.manifest
        if dictionary == "clt":
            return manifest.shape.features if layer < self.layers else 0
        saes = manifest.residual.features if manifest.residual else ()
        return saes[layer] if layer < len(saes) else 0

    def means(self, dictionary: Dictionary, layer: int, index: int) -> NDArray[np.floating]:
        """[2] mean activation at [CLS] and over patches. Raises `InterventionError` if the bundle has none."""
        if dictionary == "residual" or self.bundle.baseline is None:
            raise InterventionError(f"{self.bundle.path} has no mean activations")
        return self.bundle.baseline[0][layer, :, index]

    def direction(self, dictionary: Dictionary, layer: int, index: int, kind: str) -> NDArray[np.floating]:
        """[d] in the stream. Raises `InterventionError`."""
        if dictionary == "residual" or kind == "encoder":
            raise InterventionError(f"{self.bundle.path} has no such directions")
        return np.array(self.bundle.directions[layer, index], np.float32)

    def mean_stream(self, at: int) -> NDArray[np.floating]:
        """Raises `InterventionError`: the bundle has none."""
        raise InterventionError(f"{self.bundle.path} has no mean stream before block {at}")
