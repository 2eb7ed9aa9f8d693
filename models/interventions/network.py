"""What interventions have to know of a bundle (`models.interventions.changes.Network`), read from its tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Dictionary

Array = NDArray[np.floating]


class BundleNetwork:
    """An opened bundle. Tables are read when they are needed. Raises `InterventionError` for a bundle from before
    interventions."""

    def __init__(self, bundle: Bundle) -> None:
        shape = bundle.manifest.shape
        if shape.heads is None or bundle.encoders is None:
            raise InterventionError(
                f"the bundle {bundle.manifest.name!r} was exported before there were interventions: export it again"
            )
        self.bundle = bundle
        self.layers, self.tokens, self.heads, self.width = shape.layers, shape.tokens, shape.heads, shape.width

    def features(self, dictionary: Dictionary, layer: int) -> int:
        """How many features a layer of a dictionary has; 0: it has no such layer."""
        if dictionary == "clt":
            return self.bundle.manifest.shape.features if layer < self.layers else 0
        residual = self.bundle.manifest.residual
        return residual.features[layer] if residual and layer < len(residual.features) else 0

    def means(self, dictionary: Dictionary, layer: int, index: int) -> Array:
        """[2] mean activation at [CLS] and over patches."""
        if dictionary == "clt":
            table = None if self.bundle.baseline is None else self.bundle.baseline[0]
        else:
            table = self.bundle.residual_activations
        if table is None:
            raise self._no_average("activations")
        mean: Array = table[layer, :, index]
        return mean

    def direction(self, dictionary: Dictionary, layer: int, index: int, kind: str) -> Array:
        """[d] in the stream, of any length, what a feature writes (decoder) or reads (encoder)."""
        if dictionary == "clt":
            table = self.bundle.directions if kind == "decoder" else self.bundle.encoders
            assert table is not None
            row = table[layer, index]
        else:
            row = self.bundle.residual_rows(layer, kind)[index]
        return np.asarray(row, np.float32)

    def mean_stream(self, at: int) -> Array:
        """[2, d] the average picture's stream before block `at` (L: after the last) at [CLS] and over patches."""
        if self.bundle.baseline_stream is None:
            raise self._no_average("stream")
        mean: Array = self.bundle.baseline_stream[at]
        return mean

    def _no_average(self, what: str) -> InterventionError:
        return InterventionError(
            f"the bundle {self.bundle.manifest.name!r} has no mean {what}: it was exported without images; "
            "use `to: zero`, or export it again with some"
        )
