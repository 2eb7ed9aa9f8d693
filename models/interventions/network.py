"""What interventions have to know of a bundle (`models.interventions.changes.Network`), read from its tables."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import BASELINE, BASELINE_STREAM, RESIDUAL_ACTIVATIONS, residual_rows_file
from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.spec import Dictionary

Array = NDArray[np.floating]


class BundleNetwork:
    """An opened bundle. Tables are read when they are needed. Raises `InterventionError` for a bundle from before
    interventions."""

    def __init__(self, bundle: Bundle) -> None:
        shape = bundle.manifest.shape
        if shape.heads is None or (bundle.manifest.has_features and bundle.encoders is None):
            raise InterventionError(
                f"the bundle {bundle.manifest.name!r} was exported before there were interventions: export it again"
            )
        self.bundle = bundle
        self.layers, self.tokens, self.heads, self.width = shape.layers, shape.tokens, shape.heads, shape.width

    def features(self, dictionary: Dictionary, layer: int) -> int:
        """How many features a layer of a dictionary has; 0: it has no such layer."""
        if dictionary == "clt":
            return self.bundle.manifest.shape.features if layer < self.layers else 0
        residual = self.bundle.manifest.residual if self.bundle.has_residual_rerun else None
        return residual.features[layer] if residual and layer < len(residual.features) else 0

    def means(self, dictionary: Dictionary, layer: int, index: int) -> Array:
        """[2] mean activation at [CLS] and over patches."""
        table = self._activations if dictionary == "clt" else self._residual_activations
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
            shape = self.features(dictionary, layer), self.width
            row = self.bundle.table(residual_rows_file(layer, kind), shape)[index]
        return np.asarray(row, np.float32)

    def mean_stream(self, at: int) -> Array:
        """[2, d] the average picture's stream before block `at` (L: after the last) at [CLS] and over patches."""
        if self._stream is None:
            raise self._no_average("stream")
        mean: Array = self._stream[at]
        return mean

    @cached_property
    def _stream(self) -> Array | None:
        """[L + 1, 2, d]; None: the bundle has none."""
        return self._average(BASELINE_STREAM, (self.layers + 1, 2, self.width))

    @cached_property
    def _activations(self) -> Array | None:
        """[L, 2, F] of the CLT."""
        return self._average(BASELINE[0], (self.layers, 2, self.bundle.manifest.shape.features))

    @cached_property
    def _residual_activations(self) -> Array | None:
        """[L - 1, 2, F] of the residual SAEs, F the largest of them."""
        residual = self.bundle.manifest.residual
        return self._average(RESIDUAL_ACTIVATIONS, (self.layers - 1, 2, max(residual.features))) if residual else None

    def _average(self, file: str, shape: tuple[int, ...]) -> Array | None:
        return self.bundle.table(file, shape) if file in self.bundle.manifest.files else None

    def _no_average(self, what: str) -> InterventionError:
        return InterventionError(
            f"the bundle {self.bundle.manifest.name!r} has no mean {what}, because it was exported without images; "
            f"use `to: zero`, or export it again with images"
        )
