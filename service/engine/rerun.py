"""Runs the graphs of interventions: the network with something changed in it. Opened on first use, since few ask."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import ALWAYS, RERUN, RESIDUAL_RERUN
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import Changes
from vitrine.service.engine.fit import check_graph
from vitrine.service.engine.fit_rerun import rerun_feeds, rerun_graph
from vitrine.service.engine.runtime import Runtime, open_session


class RerunGraphs:
    """rerun.onnx of a bundle, and that of its residual SAEs if it has any. Thread-safe. They compute in float32,
    whatever the vision graph's precision."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle, self._runtime = bundle, runtime
        self._sessions: dict[str, InferenceSession] = {}
        self._opening = Lock()

    def run(self, pixels: NDArray[np.float32], changes: Sequence[Changes]) -> list[Decomposition]:
        """Decompositions of normalised pixels [B, 3, H, W], each image with its own changes, of the same features and
        directions in all (`models.interventions.batch.stacked`). Their rows are 2L + 4: the last is `edit`.

        Raises `BundleError` or `EngineError` on first use, as `check` does.
        """
        feeds = stacked(changes)
        file = RESIDUAL_RERUN if changes[0].dictionary == "residual" else RERUN
        outputs = self._session(file).run(list(ALWAYS), {"pixels": pixels} | feeds)
        named = dict(zip(ALWAYS, outputs, strict=True))
        return [Decomposition.from_batch(named, image) for image in range(len(pixels))]

    def check(self) -> None:
        """Raise `BundleError` or `EngineError` unless the graphs are what the manifest says, and run."""
        self._session(RERUN)
        if self.bundle.has_residual_rerun:
            self._session(RESIDUAL_RERUN)

    def _session(self, file: str) -> InferenceSession:
        with self._opening:
            if file not in self._sessions:
                session, manifest = open_session(self.bundle.path / file, self._runtime), self.bundle.manifest
                self.bundle.check_unchanged()  # ONNX Runtime opens graphs by path
                check_graph(self.bundle, rerun_graph(manifest, file), session, rerun_feeds(manifest))
                self._sessions[file] = session
            return self._sessions[file]
