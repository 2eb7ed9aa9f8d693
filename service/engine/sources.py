"""Runs the two graphs of source accounts: an image's trace, and directions followed back through it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.sources import Trace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import SOURCES_OUTPUTS, STARTS, TRACE_OUTPUTS
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
        size = manifest.preprocessing.size
        noise = np.random.default_rng(0).standard_normal((1, 3, *size)).astype(np.float32)
        outputs = self._trace_outputs(noise)
        feeds = self._starts(np.ones((1, manifest.shape.width), np.float32)) | self._held(outputs)
        heads = outputs["attention_weights"].shape[2]
        check_graph(self.bundle, sources_graph(manifest, heads), self._sources, feeds)

    def run(self, pixels: NDArray[np.float32], directions: NDArray[np.floating]) -> tuple[Trace, dict[str, Any]]:
        """One image [3, H, W] and n directions in embedding space [n, D]: its trace, and the outputs of sources.onnx
        for them (`models.account.sources.accounts`)."""
        outputs = self._trace_outputs(pixels[None])
        trace = Trace.from_batch(outputs, 0)
        starts = trace.starts(directions, self.bundle.fold, self.bundle.manifest.logit_scale)
        results = self._sources.run(list(SOURCES_OUTPUTS), self._starts(starts) | self._held(outputs))
        return trace, dict(zip(SOURCES_OUTPUTS, results, strict=True))

    def _trace_outputs(self, pixels: NDArray[np.float32]) -> dict[str, Any]:
        return dict(zip(TRACE_OUTPUTS, self._trace.run(list(TRACE_OUTPUTS), {"pixels": pixels}), strict=True))

    def _starts(self, directions: NDArray[np.floating]) -> dict[str, Any]:
        """Inputs for directions of the residual [n, d] that start after the last block, at [CLS]."""
        count = len(directions)
        layer = np.full(count, self.bundle.manifest.shape.layers, np.int64)
        nothing = np.zeros(count, np.int64)
        return dict(zip(STARTS, (directions.astype(np.float32), layer, nothing, nothing), strict=True))

    @staticmethod
    def _held(outputs: dict[str, Any]) -> dict[str, Any]:
        """One image's trace as inputs of sources.onnx."""
        names = TRACE_OUTPUTS[TRACE_OUTPUTS.index("attention_weights") :]
        return {name: outputs[name][0] for name in names}
