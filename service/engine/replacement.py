"""Runs the replacement graph: CLIP with the CLT in place of MLPs, and who writes what (`models.account.windows`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.bundle.layout import REPLACED_INPUT, REPLACEMENT_OUTPUTS
from vitrine.service.engine.fit import check_graph, replacement_graph
from vitrine.service.engine.on_first_use import GraphsOnFirstUse
from vitrine.service.engine.runtime import open_session


class ReplacementGraph(GraphsOnFirstUse[InferenceSession]):
    """replacement.onnx of a bundle. Thread-safe."""

    name = "the replacement model"

    def open_sessions(self) -> InferenceSession:
        """As `GraphsOnFirstUse`."""
        return open_session(self.bundle.path / "replacement.onnx", self.runtime)

    def check(self) -> None:
        """As `GraphsOnFirstUse`."""
        manifest = self.bundle.manifest
        check_graph(self.bundle, replacement_graph(manifest), self.open())
        pixels = np.zeros((1, 3, *manifest.preprocessing.size), np.float32)
        self.run(pixels, np.zeros((manifest.shape.layers, 2), bool))  # so that no request pays for the first run

    def run(
        self, pixels: NDArray[np.float32], replaced: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normalised pixels [B, 3, H, W] with replacement [L, 2] (`models.account.windows`): (unit embeddings [B, D],
        C_{i->j} [B, 2, L, L] of [CLS] and of the patches, by target and source)."""
        embeddings, contributions = self.open().run(REPLACEMENT_OUTPUTS, {"pixels": pixels, REPLACED_INPUT: replaced})
        return embeddings, contributions
