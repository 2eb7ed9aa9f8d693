"""Runs the two graphs of source accounts: an image's trace, and directions followed back through it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.sources import Trace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import HELD, SOURCES_OUTPUTS, STARTS, TRACE_OUTPUTS
from vitrine.service.engine.fit import check_graph, sources_graph, trace_graph
from vitrine.service.engine.runtime import Runtime, open_session


class SourceGraphs:
    """trace.onnx and sources.onnx of a bundle. Thread-safe. They compute in float32, whatever the vision graph's
    precision."""

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        self.bundle = bundle
        self._trace = open_session(bundle.path / "trace.onnx", runtime)
        self._sources = open_session(bundle.path / "sources.onnx", runtime)

    def check(self) -> None:
        """Raise `BundleError` or `EngineError` unless the graphs are what the manifest says, and run."""
        manifest = self.bundle.manifest
        check_graph(self.bundle, trace_graph(manifest), self._trace)
        noise = np.random.default_rng(0).standard_normal((3, *manifest.preprocessing.size)).astype(np.float32)
        trace = self.trace(noise)
        feeds = self._after_the_last_block(np.ones((1, manifest.shape.width), np.float32)) | _held(trace)
        check_graph(self.bundle, sources_graph(manifest, trace.weights.shape[1]), self._sources, feeds)

    def trace(self, pixels: NDArray[np.float32]) -> Trace:
        """Of one image [3, H, W]."""
        outputs = self._trace.run(list(TRACE_OUTPUTS), {"pixels": pixels[None]})
        return Trace.from_batch(dict(zip(TRACE_OUTPUTS, outputs, strict=True)), 0)

    def of_directions(self, trace: Trace, directions: NDArray[np.floating]) -> dict[str, Any]:
        """The outputs of sources.onnx for directions in embedding space [n, D] (`models.account.sources.accounts`)."""
        starts = trace.starts(directions, self.bundle.fold, self.bundle.manifest.logit_scale)
        return self._run(self._after_the_last_block(starts), trace)

    def of_features(
        self,
        trace: Trace,
        layers: NDArray[np.integer],
        tokens: NDArray[np.integer],
        features: NDArray[np.integer],
    ) -> dict[str, Any]:
        """The same for the pre-activations of features, [n] each (`models.account.sources.feature_accounts`)."""
        unused = np.zeros((len(layers), self.bundle.manifest.shape.width), np.float32)
        at = (part.astype(np.int64) for part in (layers, tokens, features))
        return self._run(dict(zip(STARTS, (unused, *at), strict=True)), trace)

    def run(self, pixels: NDArray[np.float32], directions: NDArray[np.floating]) -> tuple[Trace, dict[str, Any]]:
        """One image's trace, and what `of_directions` gives for it."""
        trace = self.trace(pixels)
        return trace, self.of_directions(trace, directions)

    def _run(self, starts: dict[str, Any], trace: Trace) -> dict[str, Any]:
        results = self._sources.run(list(SOURCES_OUTPUTS), starts | _held(trace))
        return dict(zip(SOURCES_OUTPUTS, results, strict=True))

    def _after_the_last_block(self, directions: NDArray[np.floating]) -> dict[str, Any]:
        """Starts of directions of the residual [n, d], at [CLS]."""
        count = len(directions)
        layer = np.full(count, self.bundle.manifest.shape.layers, np.int64)
        nothing = np.zeros(count, np.int64)
        return dict(zip(STARTS, (directions.astype(np.float32), layer, nothing, nothing), strict=True))


def _held(trace: Trace) -> dict[str, Any]:
    """A trace as inputs of sources.onnx."""
    return {"attention_weights": trace.weights} | {name: getattr(trace, name) for name in HELD[1:]}
