"""Runs the graphs of interventions: the network with something changed in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import ALWAYS, RERUN, RESIDUAL_RERUN, Dictionary
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import Changes
from vitrine.service.engine.fit import check_graph
from vitrine.service.engine.fit_rerun import rerun_feeds, rerun_graph
from vitrine.service.engine.on_first_use import GraphsOnFirstUse
from vitrine.service.engine.runtime import Runtime, open_session


class RerunGraph(GraphsOnFirstUse[InferenceSession]):
    """One of them, by the features that can be changed in it. Thread-safe."""

    def __init__(self, bundle: Bundle, runtime: Runtime, file: str) -> None:
        super().__init__(bundle, runtime)
        self.file = file
        self.name = f"interventions ({file})"

    def open_sessions(self) -> InferenceSession:
        """As `GraphsOnFirstUse`."""
        return open_session(self.bundle.path / self.file, self.runtime)

    def check(self) -> None:
        """As `GraphsOnFirstUse`."""
        manifest = self.bundle.manifest
        check_graph(self.bundle, rerun_graph(manifest, self.file), self.open(), rerun_feeds(manifest))


class RerunGraphs:
    """rerun.onnx of a bundle, and that of its residual SAEs if it has any. Thread-safe. They compute in float32,
    whatever the vision graph's precision."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle = bundle
        self._clt = RerunGraph(bundle, runtime, RERUN)
        self._residual = RerunGraph(bundle, runtime, RESIDUAL_RERUN) if bundle.has_residual_rerun else None

    def of(self, dictionary: Dictionary) -> RerunGraph:
        """The graph in which a dictionary's features can be changed; `models.interventions.changes.resolve` refuses
        changes of a dictionary that the bundle has not."""
        if dictionary == "clt":
            return self._clt
        assert self._residual is not None
        return self._residual

    def run(self, pixels: NDArray[np.float32], changes: Sequence[Changes]) -> list[Decomposition]:
        """Decompositions of normalised pixels [B, 3, H, W], each image with its own changes, of the same features and
        directions in all (`models.interventions.batch.stacked`). Their rows are 2L + 4: the last is `edit`.

        Raises `BundleError` or `EngineError` if the graph is not open yet and cannot be opened.
        """
        feeds = stacked(changes)
        session = self.of(changes[0].dictionary).open()
        names = [output.name for output in session.get_outputs() if output.name in ALWAYS]
        named = dict(zip(names, session.run(names, {"pixels": pixels} | feeds), strict=True))
        return [Decomposition.from_batch(named, image) for image in range(len(pixels))]

    def check(self) -> None:
        """Open them. Raises `BundleError` or `EngineError` unless the graphs are what the manifest says, and run."""
        self._clt.open()
        if self._residual is not None:
            self._residual.open()
